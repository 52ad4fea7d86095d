"""What a client can have logged as often as it likes: few lines are written, the others are counted."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from redis.exceptions import ConnectionError as StoreConnectionError
from redis.exceptions import ResponseError

from instruments.processes import ServiceProcess
from secured import secured_process, write_files
from service.logs import INTERVAL_S, KINDS, REPEATED, JsonFormatter, SparingHandler
from service.rpc.audit import operation_ended, refused_login
from service.rpc.auth import Principal
from service.security.roles import Role
from service.security.tokens import create_token
from service.store.failures import as_domain_error
from timernn.v1 import model_service_pb2 as pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Log:
    """The lines that a server would write, on a clock that the test sets."""

    def __init__(self) -> None:
        """Start at zero."""
        self.now_s = 0.0
        self._stream = io.StringIO()
        self.handler = SparingHandler(self._stream, clock=lambda: self.now_s)
        self.handler.setFormatter(JsonFormatter())

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was written."""
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]


@pytest.fixture(params=["service.audit"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    """Handle a log, the audit log if the test names no other."""
    made, logger = Log(), logging.getLogger(request.param)
    logger.addHandler(made.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield made
    logger.removeHandler(made.handler)
    logger.setLevel(level)


def test_failed_logins_of_one_host_are_a_line_and_a_count(log: Log) -> None:
    """The first at once, the number of the others when the interval is over."""
    for port in range(1000):
        refused_login("refused", peer=f"ipv4:10.0.0.66:{port}")
    assert [line["peer"] for line in log.lines] == ["10.0.0.66:0"]
    log.now_s = INTERVAL_S
    refused_login("refused", peer="ipv4:10.0.0.66:7")
    assert [line.get("left_out") for line in log.lines] == [None, 999, None]


def test_other_hosts_and_reasons_have_lines_of_their_own(log: Log) -> None:
    """One who guesses does not hide another."""
    refused_login("refused", peer="ipv4:10.0.0.66:1")
    refused_login("refused", peer="ipv4:10.0.0.67:1")
    refused_login("missing", peer="ipv4:10.0.0.66:1")
    refused_login("expired", peer="ipv4:10.0.0.66:1", name="trainer")
    assert len(log.lines) == 4


def test_a_flood_from_many_hosts_is_bounded(log: Log) -> None:
    """Whoever has many addresses gets the lines of a fixed number of them, and one for the rest."""
    for number in range(5000):
        refused_login("refused", peer=f"ipv6:%5B2001:db8::{number:x}%5D:1")
    log.handler.report()
    assert len(log.lines) == KINDS + 1
    assert (log.lines[-1]["message"], log.lines[-1]["left_out"]) == (
        "refusals of many kinds",
        5000 - KINDS,
    )


def test_refusals_of_one_token_are_counted_and_successes_are_all_written(log: Log) -> None:
    """Nothing that changed something is missing in the audit log."""
    caller = Principal("acme", name="n", credential_id="0123")
    for number in range(50):
        for outcome in ("OK", "SESSION_NOT_FOUND"):
            operation_ended(
                "close_session",
                principal=caller,
                peer=f"ipv4:10.0.0.{number}:1",
                outcome=outcome,
                request=None,
            )
    outcomes = [line["outcome"] for line in log.lines]
    assert (outcomes.count("OK"), outcomes.count("SESSION_NOT_FOUND")) == (50, 1)


@pytest.mark.parametrize("log", ["service.store"], indirect=True)
def test_failures_of_the_store_are_a_line_of_each_kind_and_a_count(log: Log) -> None:
    """A store that fails, fails every call: as a whole, or in the middle of a script."""
    midway = ResponseError("OOM command not allowed, script: 1f0a, on user_script:7.")
    for _ in range(50):
        as_domain_error(midway, is_decision=True)
        as_domain_error(StoreConnectionError("connection refused"))
    assert [(line["level"], line["message"]) for line in log.lines] == [
        ("ERROR", f"a script failed midway: ResponseError: {midway}"),
        ("WARNING", "the store failed: ConnectionError: connection refused"),
    ]
    log.handler.report()
    assert [line["left_out"] for line in log.lines[2:]] == [49, 49]


def test_what_is_still_counted_is_written_at_the_end(log: Log) -> None:
    """A server that stops in the middle of an interval says how many it left out."""
    for _ in range(3):
        refused_login("missing", peer="ipv4:10.0.0.66:1")
    log.handler.close()
    assert [line.get("left_out") for line in log.lines] == [None, 2]


async def test_the_end_of_a_flood_is_reported_without_another_line(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer of the event loop writes the count."""
    timers: list[tuple[float, Any]] = []

    class Loop:
        """Keeps what it shall call."""

        def call_later(self, delay_s: float, action: Any) -> None:
            """Keep it."""
            timers.append((delay_s, action))

    monkeypatch.setattr("asyncio.get_running_loop", Loop)
    for _ in range(3):
        refused_login("missing", peer="ipv4:10.0.0.66:1")
    ((delay_s, action),) = timers
    action()
    assert delay_s == INTERVAL_S
    assert log.lines[-1]["left_out"] == 2


def test_a_summary_keeps_no_traceback(log: Log) -> None:
    """It would hold the request until the interval's end, and repeat what stands above."""
    logger = logging.getLogger("service.audit")
    for _ in range(2):
        logger.error("internal error", exc_info=ZeroDivisionError(), extra={REPEATED: "bug"})
    log.handler.report()
    assert ["traceback" in line for line in log.lines] == [True, False]


def test_a_flood_of_wrong_tokens_costs_a_server_two_lines(store_url: str, tmp_path: Path) -> None:
    """And metrics have counted each of them."""
    tokens = tmp_path / "tokens.toml"
    create_token(tokens, Role.INFER, "acme", name="n", expires=None)
    options = ("--tokens", str(tokens), "--metrics-listen", "127.0.0.1:0")
    with ServiceProcess(store_url, *options, "--log-format", "json") as process:
        with grpc.insecure_channel(process.address) as channel:
            stub: Any = ModelServiceStub(channel)
            metadata = [("authorization", "Bearer wrong")]
            calls = [
                stub.GetServerInfo.future(pb.GetServerInfoRequest(), metadata=metadata, timeout=30)
                for _ in range(300)
            ]
            assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
        url = process.wait_for_line(r".*metrics on (http://[^\s\"]+).*")[1]
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - this server's
            assert b'timernn_logins_total{result="refused"} 300.0' in answer.read()
        process.terminate()
        logins = [json.loads(line) for line in process.log.splitlines() if '"login"' in line]
    assert [line.get("left_out") for line in logins] == [None, 299]


HOSTILE = (
    b"GET /metrics HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"no HTTP\r\n\r\n",
    b"\x16\x03\x01\x00\x05hello\r\n\r\n", b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
)  # fmt: skip


def test_warnings_of_libraries_are_counted(log: Log) -> None:
    """By their texts without values; what they say below a warning, and all lines of the service, are written."""
    library, own = logging.getLogger("audited.library"), logging.getLogger("service.audit")
    library.setLevel(logging.INFO)
    library.addHandler(log.handler)
    try:
        for number in range(3):
            library.error("cannot read %s", number)
            library.info("reads %s", number)
            own.warning("a line of ours")
    finally:
        library.removeHandler(log.handler)
    found = [line["message"] for line in log.lines]
    assert (found.count("cannot read 0"), found.count("a line of ours")) == (1, 3)
    assert len(found) == 7


def say(port: int, junk: bytes) -> None:
    """Open a connection, say something that is no request, and wait for the end."""
    # The server may have ended the connection before it has read all of this.
    connecting = socket.create_connection(("127.0.0.1", port), timeout=30)
    with connecting as connection, contextlib.suppress(OSError):
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - with TLS
def test_connections_that_speak_something_else_cost_no_line(
    store_url: str, tmp_path: Path, host: str
) -> None:
    """Nobody who reaches a port can write into the log without a token: neither the clients' nor that of metrics."""
    write_files(tmp_path)
    with secured_process(store_url, tmp_path, "--metrics-listen", f"{host}:0") as process:
        metrics = int(process.wait_for_line(r".*metrics on https?://[^:]+:(\d+).*")[1])
        before = process.log
        for junk in HOSTILE:
            say(process.port, junk)
            say(metrics, junk)
        assert process.log == before
