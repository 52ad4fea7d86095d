"""`timernn doctor`: what it finds between a machine, a server and its store, and what it advises."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from instruments.redis_servers import RedisServer
from service.cli import doctor
from service.cli.cgroup import memory_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Timernn = Callable[..., Any]

MIB = 1 << 20


def statuses(shown: Any) -> dict[str, str]:
    """Return by check how it ended."""
    return {each["check"]: each["status"] for each in json.loads(shown.out)["findings"]}


def test_a_server_that_is_well_is_exit_code_0(timernn: Timernn) -> None:
    """Each check has a line, and nothing failed."""
    shown = timernn("doctor", "--json")
    assert (shown.code, shown.err) == (0, "")
    assert json.loads(shown.out)["ok"] is True
    found = statuses(shown)
    wanted = ("address", "tls", "health", "token", "version", "clock")
    assert {found[check] for check in wanted} == {"ok"}
    assert found["store"] == "skipped"
    lines = timernn("doctor").out.splitlines()
    assert any(line.startswith("ok       version") for line in lines)


def test_where_nobody_listens_is_exit_code_1_with_advice(timernn: Timernn, nobody: str) -> None:
    """What to change stands below what was found."""
    shown = timernn("doctor", "--server", nobody, "--timeout=1")
    assert (shown.code, shown.err) == (1, "")
    assert f"{nobody} cannot be reached" in shown.out
    assert "-> start the server" in shown.out


def test_of_a_name_with_several_addresses_each_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, nobody: str
) -> None:
    """As of `localhost`, where the last one may be ::1 on a machine that has no IPv6."""
    port = int(nobody.rpartition(":")[2])
    addresses = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
        for host in ("127.0.0.1", "255.255.255.255")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: addresses)
    (found,) = doctor.check_address(f"node.example:{port}", 5)
    assert "Connection refused, " in found.text


@pytest.fixture
def speaks_tls() -> Iterator[Callable[[timedelta], str]]:
    """Serve TLS, and nothing over it, with a certificate that holds for as long as is asked."""
    listening = []

    def serve(holds: timedelta) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued = trustme.CA().issue_cert("127.0.0.1", not_after=datetime.now(UTC) + holds)
        issued.configure_cert(context)
        listener = socket.create_server(("127.0.0.1", 0))
        listening.append(listener)
        threading.Thread(target=_handshakes, args=(listener, context), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for each in listening:
        each.close()


def _handshakes(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # closed: the test has ended
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            connection.close()


@pytest.mark.parametrize(
    ("holds", "status"),
    [
        (timedelta(days=90), "ok"),
        (timedelta(days=3), "warning"),
        (timedelta(seconds=-1), "failed"),
    ],
)
def test_a_certificate_is_judged_by_the_days_that_it_holds(
    speaks_tls: Callable[[timedelta], str], holds: timedelta, status: str
) -> None:
    """Whoever signed it; an end that is near is a warning."""
    address = speaks_tls(holds)
    (tls,) = [each for each in doctor.check_address(address, 10) if each.check == "tls"]
    assert tls.status == status
    assert f"{round(holds.total_seconds() / 86400)} days" in tls.text


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    """A store of its own."""
    with RedisServer(append_only=False) as running:
        yield running


def test_a_store_without_a_file_or_a_bound_is_a_warning(
    timernn: Timernn, store: RedisServer
) -> None:
    """It can be used; what a restart loses and what fills the machine is said."""
    shown = timernn("doctor", "--redis-url", store.url, "--json")
    assert shown.code == 0
    found = statuses(shown)
    assert found | {"store": "ok", "persistence": "warning", "store memory": "warning"} == found


def test_the_server_s_file_of_settings_names_the_store(
    timernn: Timernn, store: RedisServer, tmp_path: Path
) -> None:
    """Its store, its caches and its workers; its certificate is not what a client shows."""
    file = tmp_path / "timernn.toml"
    file.write_text(f"""
redis-url = "{store.url}"
workers = 1000
tls-cert = "tls.crt"
tls-key = "tls.key"
""")
    found = statuses(timernn("doctor", "--config", str(file), "--json"))
    assert found | {"store": "ok", "tls": "ok", "memory": "warning"} == found


def test_a_store_that_evicts_fails(timernn: Timernn, store: RedisServer) -> None:
    """The line names the policy."""
    store.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        shown = timernn("doctor", "--redis-url", store.url)
    finally:
        store.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert shown.code == 1
    assert "maxmemory-policy is allkeys-lru" in shown.out


def test_a_store_whose_user_lacks_rights_fails(timernn: Timernn, store: RedisServer) -> None:
    """The line names the right, and not the password."""
    store.ask("ACL", "SETUSER", "poor", "on", ">marker-password", "~*", "+@all", "-evalsha")
    url = store.url.replace("://", "://poor:marker-password@") if "unix" not in store.url else ""
    if not url:
        url = f"{store.url}?username=poor&password=marker-password"
    shown = timernn("doctor", "--redis-url", url)
    assert shown.code == 1
    assert "evalsha" in shown.out
    assert "marker-password" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("off_s", "status"), [(0, "ok"), (4, "ok"), (-6, "warning"), (6, "warning")]
)
def test_a_clock_that_is_seconds_off_is_a_warning(off_s: float, status: str) -> None:
    """In either direction; the time that the question takes is no difference."""
    before = datetime(2026, 1, 1, tzinfo=UTC)
    after = before + timedelta(seconds=3)
    theirs = (after if off_s > 0 else before) + timedelta(seconds=off_s)
    found = doctor._check_clock("the server", before, theirs, after)
    assert found.status == status


def test_the_memory_limit_is_the_smallest_around_the_process(tmp_path: Path) -> None:
    """Of its control group and those that hold it, in both versions of the interface."""
    own = tmp_path / "own"
    own.write_text("0::/pod/container\n")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    (tmp_path / "pod" / "container" / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path, own) is None
    (tmp_path / "pod" / "memory.max").write_text(f"{512 * MIB}\n")
    assert memory_limit(tmp_path, own) == 512 * MIB
    own.write_text("5:cpu,memory:/docker/7\n")
    (tmp_path / "memory" / "docker" / "7").mkdir(parents=True)
    (tmp_path / "memory" / "docker" / "7" / "memory.limit_in_bytes").write_text(f"{MIB}\n")
    assert memory_limit(tmp_path, own) == MIB


def test_more_memory_than_there_is_is_a_warning(
    timernn: Timernn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full caches, requests and a step of the largest model count, in each worker."""
    monkeypatch.setattr(doctor, "memory_limit", lambda: 8192 * MIB)
    assert statuses(timernn("doctor", "--json"))["memory"] == "ok"
    shown = timernn("doctor", "--workers=3")
    assert shown.code == 0
    worst = 3 * (100 + 1536 + 768 + 2048 + 128 + 2560)
    assert f"at the worst the server takes {worst:,} MiB of the container's 8,192 MiB" in shown.out
