"""What strangers do to the port below gRPC's own messages: resets, endless headers, silence, frames that are none."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from instruments.processes import ServiceProcess, wait_until
from random_messages import mutated
from timernn.v1 import model_service_pb2 as pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

# `make security` takes more.
RESETS = int(os.environ.get("WIRE_RESETS", "500"))
SOCKETS = int(os.environ.get("WIRE_SOCKETS", "100"))
GARBLED = int(os.environ.get("WIRE_GARBLED", "100"))
GROWTH_BYTES = 64 << 20

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = b"/timernn.v1.ModelService/GetServerInfo"
# A call without compression (RFC 7541, literal fields).
CALL = (
    b"\x83\x86\x44" + bytes([len(PATH)]) + PATH + b"\x41\x01x"
    b"\x40\x02te\x08trailers\x5f\x10application/grpc"
)  # fmt: skip


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """Return a frame of HTTP/2 (RFC 9113)."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


HELLO = PREFACE + frame(SETTINGS, 0, 0)


@pytest.fixture(scope="module")
def server(store_url: str) -> Iterator[ServiceProcess]:
    """A server as a process."""
    with ServiceProcess(store_url) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(server: ServiceProcess) -> Iterator[None]:
    """Whatever a test does, memory stays, the log shows no bug, and others are served."""
    ask(server)
    before = server.rss_bytes()
    yield
    ask(server)
    assert server.rss_bytes() - before < GROWTH_BYTES
    assert "internal error" not in server.log


def ask(server: ServiceProcess) -> Any:
    """Make a call that succeeds, on a connection of its own."""
    with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = ModelServiceStub(channel)
        return stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60)


def connected(server: ServiceProcess) -> socket.socket:
    """Open a connection."""
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def ended(connection: socket.socket, *, limit_s: float = 60) -> bool:
    """Read until the server ends the connection; return whether it did in time."""
    connection.settimeout(limit_s)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:  # reset, because of what was not read
        return True
    return True


def send(connection: socket.socket, data: bytes) -> None:
    """Send, as far as the server takes it."""
    with contextlib.suppress(OSError):
        connection.sendall(data)


def test_calls_that_are_reset_at_once_leave_nothing_behind(server: ServiceProcess) -> None:
    """Opened and reset in one breath (CVE-2023-44487), again and again: the processor is idle afterwards."""
    ping = frame(PING, 0, 0, bytes(8))
    with connected(server) as connection:
        connection.sendall(HELLO)
        for number in range(RESETS):
            stream = 2 * number + 1
            opened = frame(HEADERS, END_HEADERS, stream, CALL)
            send(connection, opened + frame(RST_STREAM, 0, stream, bytes([0, 0, 0, 8])))
        send(connection, ping)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while connection.recv(1 << 16):
                pass
    ask(server)

    def is_idle() -> bool:
        began = server.cpu_s()
        time.sleep(0.5)
        return server.cpu_s() - began < 0.25

    wait_until("the processor", is_idle)


def test_headers_without_end_end_the_connection(server: ServiceProcess) -> None:
    """A header block in ever more CONTINUATION frames is not kept (CVE-2024-24549 and its kin)."""
    more = b"\x40\x04name" + b"\x7f\x81\x07" + b"v" * 1024  # a literal field of a kilobyte
    with connected(server) as connection:
        connection.sendall(HELLO)
        send(connection, frame(HEADERS, 0, 1, CALL))
        for _ in range(20_000):
            try:
                connection.sendall(frame(CONTINUATION, 0, 1, more))
            except OSError:
                break
        else:
            connection.shutdown(socket.SHUT_WR)
        assert ended(connection)


@pytest.mark.parametrize(
    "repeated",
    [
        frame(SETTINGS, 0, 0),
        frame(PING, 0, 0, bytes(8)),
        frame(WINDOW_UPDATE, 0, 0, bytes([0, 0, 0, 1])),
        frame(DATA, 0, 1),
        frame(RST_STREAM, 0, 1, bytes(4)),
        frame(200, 0, 0, bytes(64)),
    ],
    ids=["settings", "ping", "window", "empty data", "reset", "unknown"],
)
def test_a_flood_of_one_frame_is_survived(server: ServiceProcess, repeated: bytes) -> None:
    """The server takes them, or ends the connection; it keeps none of them."""
    with connected(server) as connection:
        connection.sendall(HELLO + frame(HEADERS, END_HEADERS, 1, CALL))
        connection.settimeout(5)
        for _ in range(50):
            with contextlib.suppress(OSError):
                connection.sendall(repeated * 200)


def test_sockets_that_say_nothing_keep_nobody_out(server: ServiceProcess) -> None:
    """Many connections without a byte, and as many that stop after the preface."""
    with ExitStack() as stack:
        for number in range(SOCKETS):
            connection = stack.enter_context(connected(server))
            if number % 2:
                connection.sendall(HELLO + frame(HEADERS, END_HEADERS, 1, CALL)[: number % 40])
        ask(server)


@pytest.mark.parametrize(
    "body",
    [b"", b"\0", b"\0\0\0", b"\0\0\0\0\5x", b"\0\xff\xff\xff\xff", b"\7\0\0\0\0"],
    ids=["nothing", "a flag", "half a length", "half a message", "too large", "another flag"],
)
def test_what_is_no_message_ends_its_call(server: ServiceProcess, body: bytes) -> None:
    """Nothing, half of a message, a length that is too large, a flag that is none: no call waits for more."""
    with connected(server) as connection:
        connection.sendall(HELLO + frame(HEADERS, END_HEADERS, 1, CALL))
        connection.sendall(frame(DATA, END_STREAM, 1, body))
        connection.settimeout(60)
        received = b""
        while not ends_stream(received):
            received += connection.recv(1 << 16)


@pytest.mark.parametrize(
    "headers",
    [
        CALL.replace(b"ServerInfo", b"Server\xffnfo"),
        CALL.replace(b"\x41\x01x", b"\x41\x01\xff"),
        CALL + b"\x40\x01x\x02\xff\xfe",
        CALL + b"\x40\x0cgrpc-timeout\x02\xffS",
        CALL + b"\x40\x14grpc-accept-encoding\x02\xff\xfe",
        CALL + b"\x40\x0dauthorization\x09Bearer \xffS",
        CALL + b"\x40\x0ax-user-bin\x02@@",
    ],
    ids=["path", "authority", "metadata", "timeout", "encoding", "token", "binary"],
)
def test_headers_that_are_no_text_end_their_call_in_one_line(
    server: ServiceProcess, headers: bytes
) -> None:
    """GRPC answers or refuses them; a token does not stand in the log, and many of them cost one line."""
    before = len(server.log)
    call = frame(HEADERS, END_HEADERS, 1, headers) + frame(DATA, END_STREAM, 1, bytes(5))
    for _ in range(5):
        with connected(server) as connection:
            connection.sendall(HELLO + call)
            received = b""
            while not ends_stream(received) and (part := connection.recv(1 << 16)):
                received += part
    written = server.log[before:]
    assert "Bearer" not in written
    assert written.count("ERROR") <= 1
    assert "hpack" not in written


def ends_stream(received: bytes) -> bool:
    """Return whether a frame in these bytes ends stream 1."""
    while len(received) >= 9:
        size, kind, flags = int.from_bytes(received[:3], "big"), received[3], received[4]
        stream = int.from_bytes(received[5:9], "big")
        if stream == 1 and (kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM)):
            return True
        received = received[9 + size :]
    return False


def test_garbled_connections_are_survived(server: ServiceProcess) -> None:
    """The bytes of a right call with some of them changed."""
    right = HELLO + frame(HEADERS, END_HEADERS, 1, CALL) + frame(DATA, END_STREAM, 1, bytes(5))
    source = random.Random(20_261_128)
    for _ in range(GARBLED):
        with connected(server) as connection:
            send(connection, mutated(right, source))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            assert ended(connection)


def test_the_port_serves_the_contract_health_and_reflection_alone(server: ServiceProcess) -> None:
    """No metrics, no pages, no channelz on the clients' port, and one port alone is open."""
    with connected(server) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = connection.recv(1 << 16)
    assert b"timernn_" not in answer
    channel: Any
    with grpc.insecure_channel(server.address) as channel:
        for path in ("/grpc.channelz.v1.Channelz/GetServers", "/grpc.admin/X", "/metrics"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(b"", timeout=60)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        raw = check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=60)
        assert health_pb2.HealthCheckResponse.FromString(raw).status == 1
    assert listening_ports(server.pid) == {int(server.address.rpartition(":")[2])}


def listening_ports(pid: int) -> set[int]:
    """Return the TCP ports on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(descriptor.readlink()))
    ports = set()
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        for fields in map(str.split, lines):
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports
