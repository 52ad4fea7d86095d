"""A server process from its start to its end: readiness, drain, haste, reasons not to start."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from instruments.processes import ServiceProcess, wait_until
from instruments.redis_servers import RedisServer
from lab import D, Lab, tensor
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVING, NOT_SERVING = 1, 2


@pytest.fixture
def store_server() -> Iterator[RedisServer]:
    """A store of the test's own, to be stopped and paused."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def service(store_server: RedisServer) -> Iterator[ServiceProcess]:
    """A server process on it."""
    with ServiceProcess(store_server.url, "--drain-s", "10") as process:
        yield process


def health_of(service: ServiceProcess, name: str = "") -> int:
    """Ask a process for a status."""
    with grpc.insecure_channel(service.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=2).status)


def chunk(lab: Lab, seq: int) -> pb.StreamRequest:
    """Make the next chunk of the lab's session."""
    forward = pb.ForwardRequest(
        session_id="s", epoch=lab.session.epoch, chunk_seq=seq, xs=tensor(1, 2, D)
    )
    return pb.StreamRequest(operations=[pb.Operation(tag=seq, forward=forward)])


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused"])
def test_readiness_follows_the_store_and_liveness_does_not(
    service: ServiceProcess, store_server: RedisServer, fault: signal.Signals
) -> None:
    """NOT_SERVING soon after the store is lost, SERVING soon after it is back, one process."""
    assert health_of(service) == SERVING
    store_server.signal(fault)
    lost_s = wait_until("NOT_SERVING", lambda: health_of(service) == NOT_SERVING)
    assert health_of(service, "liveness") == SERVING
    if fault is signal.SIGKILL:
        store_server.wait()
        store_server.start()
    else:
        store_server.resume()
    back_s = wait_until("SERVING", lambda: health_of(service) == SERVING)
    assert service.is_alive
    assert max(lost_s, back_s) < 10  # the promise is 2 s; a busy machine gets more


def test_a_store_that_evicts_is_refused(store_server: RedisServer) -> None:
    """Sessions would be lost without a word."""
    store_server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    process = ServiceProcess(store_server.url)
    with pytest.raises(RuntimeError, match="maxmemory-policy is allkeys-lru"):
        process.start()


def test_a_data_directory_that_cannot_be_written_is_one_line() -> None:
    """The log says which and why."""
    process = ServiceProcess("", "--data-dir", "/dev/null/data")
    with pytest.raises(
        RuntimeError, match="cannot use the data directory /dev/null/data"
    ) as caught:
        process.start()
    assert "Traceback" not in str(caught.value)


def test_the_embedded_store_is_started_again_when_it_dies() -> None:
    """The process heals itself; nobody has to restart it."""
    with ServiceProcess("") as service:
        pid_file = service.dir / "data" / "store.pid"
        pid = pid_file.read_text()
        os.kill(int(pid), signal.SIGKILL)
        wait_until("another store", lambda: pid_file.read_text() not in ("", pid))
        wait_until("SERVING", lambda: health_of(service) == SERVING)
        assert service.terminate() == 0


async def test_sigterm_in_the_middle_of_a_stream_loses_no_accepted_chunk(
    service: ServiceProcess,
) -> None:
    """Every chunk is answered or unanswered, none half; then the client is asked to move, and the exit code is 0."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        lab = await Lab(channel).opened()
        call = lab.rnn.Stream()
        answered, drained = 0, asyncio.Event()

        async def send() -> None:
            for seq in range(1, 100_000):
                if drained.is_set():
                    break
                await call.write(chunk(lab, seq))
            await call.done_writing()

        sending = asyncio.ensure_future(send())
        async for message in call:
            assert all(result.HasField("forward") for result in message.results)
            if answered < 20 <= answered + len(message.results):
                service.signal(signal.SIGTERM)
            answered += len(message.results)
            if message.draining:
                drained.set()
        await sending
        assert drained.is_set()
        assert await call.code() is grpc.StatusCode.OK
    assert await asyncio.to_thread(service.wait) == 0

    service.start()
    async with grpc.aio.insecure_channel(service.address) as channel:
        lab = Lab(channel, session=lab.session)
        assert (await lab.forward(answered, value=0.0)).replayed
        assert not (await lab.forward(answered + 1, value=0.0)).replayed


def test_a_second_signal_ends_a_drain_at_once(service: ServiceProcess) -> None:
    """A stream that never ends does not hold an operator up who means it."""
    with grpc.insecure_channel(service.address) as channel:
        upload: Any = channel.stream_unary("/timernn.v1.ModelService/PutWeights")
        held = upload.future(_endless())
        wait_until("the upload", lambda: health_of(service) == SERVING and not held.done())
        service.signal(signal.SIGTERM)
        service.wait_for_line(".*draining")
        assert service.is_alive
        service.signal(signal.SIGTERM)
        assert service.wait(5) == 1


def _endless() -> Iterator[bytes]:
    """An upload whose first message never comes."""
    import threading

    threading.Event().wait(30)
    yield b""


async def test_names_made_by_the_server_are_unique(service: ServiceProcess) -> None:
    """Names that the server makes are 128 random bits: a thousand opens, a thousand names."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        lab = Lab(channel)
        await lab.create()
        sessions = await asyncio.gather(*(lab.open("") for _ in range(1000)))
    names = {session.session_id for session in sessions}
    assert len(names) == 1000
    assert all(len(name) == 22 for name in names)
