"""What strangers do to a port: floods of large messages, halves of messages, resets, silence."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn
from instruments.processes import ServiceProcess, wait_until
from raw_http2 import RawConnection
from scenes.figures import figure
from scenes.wire import TIMEOUT_S
from timernn._core.convert import tensor_to_proto
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.report import Proof

MIB = 1 << 20
MESSAGE = 16 * MIB
IN_FLIGHT = 64 * MIB
CALLS = 128
WINDOW = 512 << 10
# In work or being read, what may come unasked, and copies of what is parsed, computed and answered at the moment.
BOUND = IN_FLIGHT + CALLS * WINDOW + 8 * MESSAGE
# glibc gives back what is free, less what lies between blocks in use; below this nothing is given back.
REMAINS = 96 * MIB
FORWARD = "/timernn.v1.TimeRnnService/Forward"
STREAM = "/timernn.v1.TimeRnnService/Stream"


@pytest.fixture
def server() -> Iterator[ServiceProcess]:
    """A server as in a container of 512 MiB, with a model of 512 inputs."""
    options = (
        "--limit-request-bytes-in-flight", str(IN_FLIGHT), "--limit-operations-in-flight", str(CALLS),
        "--session-cache-bytes", str(32 * MIB), "--weights-cache-bytes", str(64 * MIB),
    )  # fmt: skip
    with ServiceProcess("", *options) as running:
        with timernn.connect(running.address, timeout=60) as client:
            client.create_model("m", input_size=512, hidden_size=16, seed=1)
        yield running


async def flood(address: str, calls: int) -> dict[str, int]:
    """Send so many calls of nearly the largest size at once; return how many ended with each code."""
    xs = tensor_to_proto(np.zeros((16, 488, 512), np.float32))
    request = rnn_pb.ForwardRequest(model_id="m", xs=xs, return_hs=rnn_pb.RETURN_HS_NONE)
    raw = request.SerializeToString()
    codes: dict[str, int] = {}
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        forward: Any = channel.unary_unary(FORWARD)

        async def call() -> None:
            try:
                await forward(raw, timeout=TIMEOUT_S)
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            codes[code] = codes.get(code, 0) + 1

        await asyncio.gather(*(call() for _ in range(calls)))
    return codes


def check_memory(proof: Proof, server: ServiceProcess, before: int) -> None:
    """The peak kept to the bound, and what was free went back."""
    peak = server.peak_rss_bytes() - before
    proof.figures["peak MiB over idle"] = peak / MIB
    proof.require(peak <= BOUND, f"{peak // MIB} MiB over idle, over {BOUND // MIB} MiB")
    wait_until("freed memory goes back", lambda: server.rss_bytes() - before <= REMAINS, 60)


def check_alive(proof: Proof, server: ServiceProcess) -> None:
    """Somebody else is served."""
    with timernn.connect(server.address, timeout=60) as client:
        proof.require(bool(client.list_models()), "another client is served")


@pytest.mark.timeout(300)
@pytest.mark.promise("R36", "memory keeps to its bound whatever comes in, and goes back afterwards")
@figure("calls", 32, 128)
def test_a_flood_of_large_messages_keeps_to_the_bound(
    proof: Proof, server: ServiceProcess, calls: int
) -> None:
    """Calls of 15.3 MiB at once are served or refused as OVERLOADED, within the bound of memory."""
    proof.is_control = True
    before = server.rss_bytes()
    codes = asyncio.run(flood(server.address, calls))
    proof.require(set(codes) <= {"OK", "RESOURCE_EXHAUSTED"}, f"{codes}")
    proof.require(codes.get("OK", 0) > 0, f"some are served: {codes}")
    check_memory(proof, server, before)
    check_alive(proof, server)


@pytest.mark.timeout(300)
@pytest.mark.promise("R36", "memory keeps to its bound whatever comes in, and goes back afterwards")
def test_halves_of_messages_keep_to_the_bound(proof: Proof, server: ServiceProcess) -> None:
    """Sixty calls that send 15 of 16 MiB and stop get no further than the room, and end."""
    proof.is_control = True
    before = server.rss_bytes()
    with RawConnection(server.address) as connection:
        streams = [connection.open(FORWARD) for _ in range(60)]
        sent = connection.send_parts(streams, MESSAGE, 15 * MIB, limit_s=20)
        proof.figures["MiB let in"] = sent / MIB
        check_alive(proof, server)
        end = time.monotonic() + 90
        while len(connection.ended) < 60 and time.monotonic() < end:
            connection.receive(1)
        proof.require(len(connection.ended) == 60, f"{len(connection.ended)} of 60 calls ended")
        check_memory(proof, server, before)


@pytest.mark.timeout(300)
@pytest.mark.promise("R36", "memory keeps to its bound whatever comes in, and goes back afterwards")
def test_quiet_streams_with_halves_of_messages_are_ended(
    proof: Proof, server: ServiceProcess
) -> None:
    """Of streams with half of a message only as many stay as may be quiet."""
    proof.is_control = True
    with RawConnection(server.address) as connection:
        streams = [connection.open(STREAM) for _ in range(10)]
        connection.send_parts(streams, MESSAGE, 15 * MIB, limit_s=20)
        end = time.monotonic() + 90
        while len(connection.ended) < 8 and time.monotonic() < end:
            connection.receive(1)
        proof.require(len(connection.ended) == 8, f"{len(connection.ended)} streams ended")
    check_alive(proof, server)


@pytest.mark.timeout(300)
@pytest.mark.promise("R37", "resets and silent connections take nothing from others")
@figure("resets", 5_000, 50_000)
def test_calls_reset_at_once_leave_nothing_behind(
    proof: Proof, server: ServiceProcess, resets: int
) -> None:
    """Opened and reset in one breath (CVE-2023-44487): the server goes on, without growing."""
    proof.is_control = True
    before = server.rss_bytes()
    done = 0
    while done < resets:
        with RawConnection(server.address) as connection:
            for _ in range(1_000):
                connection.open(FORWARD, reset=True)
                connection.receive(0)
            done += 1_000
    check_alive(proof, server)
    grown = server.rss_bytes() - before
    proof.require(grown <= REMAINS, f"{grown // MIB} MiB more after {resets} resets")


@pytest.mark.timeout(300)
@pytest.mark.promise("R37", "resets and silent connections take nothing from others")
def test_connections_that_say_nothing_are_closed(proof: Proof, server: ServiceProcess) -> None:
    """A thousand sockets without a byte: others are served, and the handshake has an end."""
    proof.is_control = True
    host, _, port = server.address.rpartition(":")
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(1_000)
        ]
        check_alive(proof, server)
        for each in silent[:10]:
            each.settimeout(60)
            while each.recv(4096):  # the server's settings, and then the end
                pass
    check_alive(proof, server)
