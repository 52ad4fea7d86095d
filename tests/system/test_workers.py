"""`timernn serve --workers N`: several processes, one port, one store."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import grpc
import pytest

import timernn
from instruments.processes import ServiceProcess, wait_until
from timernn.v1 import model_service_pb2, model_service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.random import Generator


@pytest.fixture
def supervisor(store_url: str) -> Iterator[ServiceProcess]:
    """A supervisor with two workers."""
    with ServiceProcess(store_url, "--workers", "2", name="supervisor") as running:
        yield running


def replica_ids(address: str, calls: int = 40) -> set[str]:
    """Ask over many connections which process answers."""
    found = set()
    for number in range(calls):
        # Channels with equal options share a connection; each of these has its own.
        with grpc.insecure_channel(address, [("timernn.test", number)]) as channel:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            info = stub.GetServerInfo(
                model_service_pb2.GetServerInfoRequest(), wait_for_ready=True, timeout=20
            )
            found.add(info.replica_id)
    return found


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    path = f"/proc/{pid}/task/{pid}/children"
    with open(path) as listing:  # noqa: PTH123 - a file of the kernel's
        return [int(child) for child in listing.read().split()]


def is_alive(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_connections_are_spread_over_the_workers(supervisor: ServiceProcess) -> None:
    """Both processes answer on the one port."""
    assert len(replica_ids(supervisor.address)) == 2


def test_a_session_goes_on_when_a_worker_is_killed(
    supervisor: ServiceProcess, rng: Generator
) -> None:
    """A killed worker is started again, and no call of the client library fails."""
    with timernn.connect(supervisor.address) as client:
        client.create_model(f"m{supervisor.pid}", input_size=3, hidden_size=4)
        session = client.session(f"m{supervisor.pid}")
        session.forward(rng.standard_normal((1, 2, 3)))
        before = children(supervisor.pid)
        for worker in before:
            os.kill(worker, signal.SIGKILL)
            session.forward(rng.standard_normal((1, 2, 3)))
        assert session.chunk_seq == 3
    wait_until("both are back", lambda: len(set(children(supervisor.pid)) - set(before)) == 2)


def test_an_embedded_store_that_is_killed_is_started_again_under_workers() -> None:
    """The supervisor starts its store again, and the workers serve from it."""
    with ServiceProcess("", "--workers", "2") as server, timernn.connect(server.address) as client:
        client.create_model("kept", input_size=3, hidden_size=4)
        os.kill(int((server.dir / "data" / "store.pid").read_text()), signal.SIGKILL)
        server.wait_for_line(".*the embedded store ended: starting it again")
        assert client.get_model("kept").hidden_size == 4


def test_sigterm_drains_every_worker(supervisor: ServiceProcess) -> None:
    """The supervisor ends with exit code 0 and leaves no worker behind."""
    workers = children(supervisor.pid)
    assert supervisor.terminate() == 0
    assert not any(is_alive(worker) for worker in workers)


def test_a_second_signal_cuts_the_drain_of_the_workers_short(store_url: str) -> None:
    """As without workers: the exit code is 1, and nobody is left behind."""
    server = ServiceProcess(store_url, "--workers", "2", "--drain-notice-s", "90")
    with server:
        workers = children(server.pid)
        server.signal(signal.SIGTERM)
        for number in (1, 2):
            server.wait_for_line(f".*worker {number} .*draining")
        assert server.terminate() == 1
        assert not any(is_alive(worker) for worker in workers)


def test_workers_end_when_their_supervisor_is_killed(supervisor: ServiceProcess) -> None:
    """A supervisor that dies at once leaves no worker behind."""
    workers = children(supervisor.pid)
    supervisor.kill()
    wait_until("the workers have ended", lambda: not any(map(is_alive, workers)))


def test_a_port_in_use_is_one_line(store_url: str) -> None:
    """The supervisor says that it cannot listen."""
    with ServiceProcess(store_url) as other:
        late = ServiceProcess(store_url, "--workers", "2", "--listen", other.address)
        with pytest.raises(Exception, match="cannot listen"):
            late.start()
        late.close()
