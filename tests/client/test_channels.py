"""A client that cannot be used any more says so, and a connection that is cut is left."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import traceback
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest

import timernn
from instruments.proxy import FaultProxy, Faults, Link
from timernn import aio, errors
from timernn._core.channels import Links
from timernn._core.options import Options

XS = np.ones((1, 2, 3), np.float32)
MOST_LINES = 20
AFTER_A_FORK = """
import os, sys, timernn
client = timernn.connect(sys.argv[1], timeout=20)
session = client.session(sys.argv[2])
child = os.fork()
if child:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    session.forward([[[0, 0, 0]]])
    sys.exit(code)
calls = (client.ping, session.reset_state, lambda: client.frame([(session, [[[0, 0, 0]]])]),
         lambda: next(session.stream([[[0, 0, 0]]])))
for call in calls:
    try:
        call()
    except timernn.WrongProcess:
        continue
    sys.exit("the parent's client was used")
client.close()
try:
    timernn.connect(sys.argv[1], timeout=20).ping()
    print("new client works")
except timernn.WrongProcess:
    print("new client refused")
"""


@pytest.mark.parametrize(
    ("support", "new"), [("0", "new client refused"), ("1", "new client works")]
)
def test_a_forked_process_is_refused_at_once(
    live: timernn.Client, model_id: str, replicas: list[str], support: str, new: str
) -> None:
    """The parent's client is refused there; a new one works where gRPC supports forks."""
    environment = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": support}
    live.create_model(model_id, input_size=3, hidden_size=2)
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_FORK, replicas[0], model_id],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, new), done.stderr


@pytest.mark.parametrize("others", [0, 1])
def test_an_address_without_a_listener_is_reported_soon(others: int) -> None:
    """In a third of the time that a server which says nothing gets, with every address."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(1 + others)]
        for each in taken:
            each.bind(("127.0.0.1", 0))  # and does not listen
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in taken]
        client = stack.enter_context(timernn.connect(addresses, connect_timeout=3.0))
        with pytest.raises(timernn.NoServer) as caught:
            client.ping()
    where = ", ".join(addresses)
    expected = (
        f"no server at {where} after {caught.value.attempts} tries; is `timernn serve` running?"
    )
    assert caught.value.message == expected
    assert isinstance(caught.value.cause, grpc.RpcError)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_a_name_that_cannot_be_resolved_is_reported_as_such(others: int, *, is_async: bool) -> None:
    """Also beside an address where nothing listens, and not in gRPC's words."""
    with socket.socket() as taken, socket.socket(type=socket.SOCK_DGRAM) as no_name_server:
        for each in (taken, no_name_server):
            each.bind(("127.0.0.1", 0))
        name_server = f"127.0.0.1:{no_name_server.getsockname()[1]}"
        no_name_server.close()
        addresses = [f"dns://{name_server}/nowhere.example:50051"]
        addresses += [f"127.0.0.1:{taken.getsockname()[1]}"] * others
        with pytest.raises(timernn.NoServer) as caught:
            ping(addresses, is_async=is_async)
    expected = (
        f"no server at {', '.join(addresses)} after {caught.value.attempts} tries: "
        "the name nowhere.example cannot be resolved"
    )
    assert caught.value.message == expected + "; is `timernn serve` running?" * others
    assert isinstance(caught.value.cause, grpc.RpcError)


def ping(addresses: list[str], *, is_async: bool) -> None:
    """Ping a server with either frontend of the library."""

    async def ask() -> None:
        async with aio.connect(addresses, connect_timeout=3.0) as client:
            await client.ping()

    if is_async:
        asyncio.run(ask())
        return
    with timernn.connect(addresses, connect_timeout=3.0) as client:
        client.ping()


def test_a_server_that_went_away_is_waited_for(doomed: Any) -> None:
    """Refused connections are no reason to give up soon on one that has answered."""
    with timernn.connect(doomed, timeout=3.0, connect_timeout=0.3) as client:
        client.ping()
        doomed.process.kill()
        doomed.process.wait()
        with pytest.raises(timernn.Unavailable) as caught:
            client.ping()
    assert caught.value.attempts > 4  # the waits before the fifth are longer than a connect_timeout


def lines_of(error: BaseException) -> int:
    """Count the lines that Python would print."""
    return sum(text.count("\n") for text in traceback.format_exception(error))


def test_an_errors_traceback_is_short(client: timernn.Client, stand_in: Any, refusal: Any) -> None:
    """It shows the caller's line; what it came from is its cause."""
    session = client.session("m")
    calls = (
        lambda: session.forward(XS),
        lambda: next(session.stream([XS])),
        lambda: raised(client.frame([(session, XS)])[0]),
        lambda: session.backward(XS),
    )
    for call in calls:
        stand_in.fail_next("Forward", refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"))
        with pytest.raises(timernn.Error) as caught:
            call()
        assert lines_of(caught.value) < MOST_LINES
    stand_in.fail_next("GetModel", refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"))
    with pytest.raises(timernn.ModelNotFound) as caught:
        client.get_model("m")
    assert lines_of(caught.value) < MOST_LINES
    assert isinstance(caught.value.cause, grpc.RpcError)


async def test_an_asyncio_errors_traceback_is_short(stand_in: Any, refusal: Any) -> None:
    """It shows the caller's line; what it came from is its cause."""
    async with aio.connect(stand_in.address) as client:
        session = await client.session("m")

        async def frame() -> None:
            raised((await client.frame([(session, XS)]))[0])

        for call in (lambda: session.forward(XS), lambda: anext(session.stream([XS])), frame):
            stand_in.fail_next("Forward", refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL"))
            with pytest.raises(timernn.StoreFull) as caught:
                await call()
            assert lines_of(caught.value) < MOST_LINES


def raised(outcome: object) -> None:
    """Raise a frame's error as a caller may."""
    assert isinstance(outcome, timernn.Error)
    raise outcome


def test_a_closed_client_says_so(client: timernn.Client) -> None:
    """So do its sessions; closing again is no error."""
    session = client.session("m")
    client.close()
    client.close()
    for call in (client.ping, lambda: session.forward(XS), lambda: client.frame([(session, XS)])):
        with pytest.raises(timernn.ClientClosed):
            call()


async def test_a_closed_asyncio_client_says_so(stand_in: Any) -> None:
    """So do its sessions; closing again is no error."""
    client = aio.connect(stand_in.address)
    session = await client.session("m")
    await client.close()
    await client.close()
    for call in (client.server_info(), session.forward(XS), client.frame([(session, XS)])):
        with pytest.raises(timernn.ClientClosed):
            await call


def test_a_second_event_loop_is_refused(stand_in: Any) -> None:
    """The client belongs to the loop of its first call."""
    client = aio.connect(stand_in.address)
    with asyncio.Runner() as one, asyncio.Runner() as other:
        one.run(client.server_info())
        with pytest.raises(timernn.WrongLoop):
            other.run(client.server_info())
        one.run(client.close())


class Channel:
    """Stands for a channel that `Links` makes."""

    def __init__(self, target: str, options: Any) -> None:
        self.target, self.options = target, dict(options)


class Channels:
    """Stands for `grpc`."""

    def insecure_channel(self, target: str, options: Any) -> Any:
        """Make one without encryption."""
        return Channel(target, options)

    def secure_channel(self, target: str, credentials: Any, options: Any) -> Any:
        """Make one with it."""
        return Channel(target, [*options, ("credentials", credentials)])


def test_a_channel_over_which_nothing_came_is_left() -> None:
    """The next call takes a fresh one, which tries the name's addresses in another order."""
    links = Links(["a"], Options(), Channels())
    first = links.get(0)
    links.leave_if_silent(first, errors.DeadlineExceeded(), started=0.5)
    second = links.get(0)
    assert second is not first
    assert "shuffleAddressList" in second.channel.options["grpc.service_config"]


@pytest.mark.parametrize(
    ("error", "answered", "started"),
    [
        (errors.DeadlineExceeded(), 1.0, 0.5),
        (errors.DeadlineExceeded(), 0.0, float("inf")),
        (errors.DeadlineExceeded(reason="STORE_DOWN"), 0.0, 0.5),
        (errors.Unavailable(), 0.0, 0.5),
    ],
    ids=["another call was answered", "too short an attempt", "the server's", "not silent"],
)
def test_a_channel_without_a_sign_of_a_cut_is_kept(
    error: errors.Error, answered: float, started: float
) -> None:
    """A slow call alone is no reason to connect again."""
    links = Links(["a"], Options(), Channels())
    link = links.get(0)
    link.answered = answered
    links.leave_if_silent(link, error, started)
    assert links.get(0) is link


def test_calls_under_way_keep_a_channel_that_is_left(stand_in: Any) -> None:
    """It closes when the last of them has ended."""
    links = Links([stand_in.address], Options(), grpc)
    link = links.get(0)
    grpc.channel_ready_future(link.channel).result(10)
    links.leave(link)
    assert links.get(0) is not link
    assert link.channel.unary_unary("/timernn.v1.ModelService/GetServerInfo")(b"", timeout=10)
    for each in links.close():
        each.channel.close()
    link.channel.close()


def test_a_slow_handshake_is_waited_for(live: timernn.Client, replicas: list[str]) -> None:
    """Over a line with 0.6 s for a round trip the client connects once, not again and again."""
    slow = Faults(up=Link(latency_s=0.3), down=Link(latency_s=0.3))
    with FaultProxy(replicas[0], faults=slow) as proxy:
        with timernn.connect(proxy.address, timeout=20) as client:
            assert client.server_info().server_version == live.server_info().server_version
        assert proxy.counts["connections"] == 1
