"""What the documentation says that the store's user needs is what a run needs: no less and no more.

To renew the list: run this test, put into service/store/permissions.py what it says, run it again, and put
the row that it prints into docs/operations.md.
"""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

import timernn
from instruments.processes import ServiceProcess, wait_until
from instruments.redis_servers import Cluster, RedisServer, SentinelGroup
from service.store import permissions
from timernn._core.convert import tensor_to_proto
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
LUA = ROOT / "service" / "store" / "lua"
USER, PASSWORD = "app", "s3cret"
CONTENT = np.ones((1, 2, 3), np.float32)


def test_the_documentation_has_the_lists() -> None:
    """Row by row; this is the form of a row."""
    rows: dict[str, Sequence[str]] = {
        "keys": permissions.KEY_PATTERNS,
        "commands": permissions.COMMANDS,
        "with a database other than 0": permissions.DATABASE_COMMANDS,
        "on a Cluster's nodes": permissions.CLUSTER_COMMANDS,
        "with `--durability replica`": (
            *permissions.WAIT_COMMANDS,
            *(f"~{pattern}" for pattern in permissions.WAIT_KEY_PATTERNS),
        ),
        "with `--metrics-listen`": [f"~{pattern}" for pattern in permissions.PAGE_KEY_PATTERNS],
    }
    page = (ROOT / "docs" / "operations.md").read_text()
    for name, listed in rows.items():
        row = " ".join(listed).replace("|", "\\|")
        assert f"| {name} | `{row}` |" in page


@pytest.mark.parametrize(
    "kind", ["one server", "metrics", "database 3", "durability", "Sentinel", "Cluster"]
)
def test_a_user_with_the_listed_rights_can_do_everything_and_needs_each(kind: str) -> None:
    """A refused command stands in the server's ACL log; one that is never run has no call counted."""
    with contextlib.ExitStack() as stack:
        url, servers, wanted, options = start(stack, kind)
        for server in servers:
            grant(server, wanted, shows_page=kind == "metrics")
            server.ask("CONFIG", "RESETSTAT")
        with ServiceProcess(url, *options) as replica, timernn.connect(replica.address) as client:
            do_everything(client)
            ask_for_no_tape(replica.address, client.session("m", session_id="d"))
            if kind == "metrics":
                wait_until("the replica on the page", lambda: replicas_on_the_page(replica))
            client.delete_model("m")
        refused = {name for server in servers for name in refused_by(server)}
        assert not refused, "add these to service/store/permissions.py"
        run = {name for server in servers for name in commands_run(server)}
        assert set(wanted) <= run, "take the others out of service/store/permissions.py"
        assert commands_of_scripts() <= run, "let do_everything reach the others"


def start(
    stack: contextlib.ExitStack, kind: str
) -> tuple[str, Sequence[RedisServer], tuple[str, ...], tuple[str, ...]]:
    """Start a store; return its URL, servers, what its user may do, and options of `timernn serve`."""
    login: str = f"{USER}:{PASSWORD}@"
    listed: tuple[str, ...] = permissions.COMMANDS
    if kind == "Sentinel":
        group = stack.enter_context(SentinelGroup())
        return group.url.replace("://", f"://{login}"), group.servers[:1], listed, ()
    if kind == "Cluster":
        cluster = stack.enter_context(Cluster(with_replicas=False))
        # ASKING is sent while a slot moves only, which tests/store/test_cluster.py does.
        for node in cluster.masters:
            node.ask("ACL", "SETUSER", USER, "+asking")
        listed = (*listed, *(name for name in permissions.CLUSTER_COMMANDS if name != "asking"))
        return cluster.url.replace("://", f"://{login}"), cluster.masters, listed, ()
    server = stack.enter_context(RedisServer(append_only=False))
    url = f"redis://{login}{server.address}"
    if kind == "metrics":
        return url, [server], listed, ("--metrics-listen", "127.0.0.1:0")
    if kind == "database 3":
        return f"{url}/3", [server], (*listed, *permissions.DATABASE_COMMANDS), ()
    if kind == "durability":
        follower = stack.enter_context(RedisServer(append_only=False))
        follower.follow("127.0.0.1", server.port)
        options = ("--durability", "replica", "--durability-timeout-ms", "400")
        return url, [server], (*listed, *permissions.WAIT_COMMANDS), options
    return url, [server], listed, ()


def replicas_on_the_page(replica: ServiceProcess) -> list[object]:
    """Return the replicas that the page's JSON has."""
    url = replica.wait_for_line(r".*metrics on (http://\S+)/metrics")[1]
    with urllib.request.urlopen(f"{url}/api/now", timeout=30) as answer:  # noqa: S310 - our own server
        found: list[object] = json.load(answer)["replicas"]
    return found


def grant(server: RedisServer, commands: Sequence[str], *, shows_page: bool) -> None:
    """Make the user, with rights to these and to the documented keys alone."""
    keys = [f"~{pattern}" for pattern in permissions.KEY_PATTERNS]
    keys += [f"~{pattern}" for pattern in permissions.WAIT_KEY_PATTERNS if "wait" in commands]
    keys += [f"~{pattern}" for pattern in permissions.PAGE_KEY_PATTERNS if shows_page]
    rights = [f"+{name}" for name in commands]
    server.ask("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "resetkeys", *keys, *rights)


def do_everything(client: timernn.Client) -> None:
    """Make each call of the library, with all that a script does differently for what it finds."""
    client.create_model("m", input_size=3, hidden_size=4, optimizer=timernn.Adam())
    session = client.session("m", session_id="a", train=True)
    hs = session.forward(CONTENT)
    session.backward(hs)
    session.update()
    session.set_state(session.h)
    session.reset_state()
    session.fork("b").close()
    session.forward(CONTENT)
    session.discard_gradients()
    session.close()
    with client.session("m", session_id="c", train=True) as trainer:
        trainer.backward(trainer.forward(CONTENT))
    client.discard_gradients("m")
    streamed = client.session("m")
    list(streamed.stream([CONTENT] * 3))
    client.create_checkpoint("m", "k")
    client.put_weights("m", Wx=np.ones((3, 4)), Wh=np.eye(4), b=np.zeros(4))
    client.restore_checkpoint("m", "k")
    client.delete_checkpoint("m", "k")
    client.get_weights("m", include_moments=True)
    list(client.list_models())
    list(client.list_sessions())
    client.get_session("c")


def ask_for_no_tape(address: str, session: timernn.Session) -> None:
    """Send a Backward for a chunk that kept no tape, which the library would not."""
    session.forward(CONTENT)
    request = pb.BackwardRequest(
        session_id="d",
        epoch=session.epoch,
        chunk_seq=1,
        state_token=bytes(16),
        dhs=tensor_to_proto(np.ones((1, 2, 4))),
    )
    with (
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError, match=r"FAILED_PRECONDITION"),
    ):
        TimeRnnServiceStub(channel).Backward(request)


def refused_by(server: RedisServer) -> Iterator[str]:
    """Return what the server's ACL log says that the user asked for in vain."""
    for entry in server.ask("ACL", "LOG"):
        fields = dict(zip(entry[::2], entry[1::2], strict=True))
        # A client sends its name and version where it may; nothing needs that.
        if fields[b"username"] == USER.encode() and not fields[b"object"].startswith(b"client"):
            yield f"{fields[b'reason'].decode()} {fields[b'object'].decode()}"


def commands_run(server: RedisServer) -> set[str]:
    """Return the commands that the server ran since its counts were reset, in scripts as well."""
    names = server.info("commandstats")
    return {
        name.removeprefix("cmdstat_")
        for name, fields in names.items()
        if not fields.startswith("calls=0,")
    }


def commands_of_scripts() -> set[str]:
    """Return what the scripts call, so that a new one is not left out of the run."""
    texts = (path.read_text() for path in LUA.rglob("*.lua"))
    return {name.lower() for text in texts for name in re.findall(r"call\('(\w+)'", text)}
