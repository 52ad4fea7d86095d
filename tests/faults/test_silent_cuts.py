"""Connections cut without a word: a router that forgot them, a laptop that slept."""

from __future__ import annotations

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from instruments.proxy import FaultProxy
from scenes.calm import INPUTS, note_steady_traffic
from scenes.fleet import Fleet
from timernn import aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from instruments.report import Proof

XS = np.ones((1, 2, INPUTS), np.float32)
LIMIT_S = 20.0
NOTICED_S = 40.0  # the server's pings are 20 s apart and wait for 10 s
IDLE_S = 125.0
TABLES = ("/proc/net/tcp", "/proc/net/tcp6")  # an IPv6 socket takes IPv4 connections too
ESTABLISHED = "01"


class Line:
    """A server behind a router that can forget its connections; counts what is asked of it."""

    def __init__(self, proxy: FaultProxy, proof: Proof) -> None:
        self.proxy, self.proof = proxy, proof

    def cut(self) -> None:
        """Forget the connections of the moment."""
        self.proof.hit("connection cut without a word", self.proxy.vanish_all())

    @contextmanager
    def within_limit(self, name: str) -> Iterator[None]:
        """Require that what stands inside takes no longer than promised."""
        started = time.monotonic()
        yield
        took_s = time.monotonic() - started
        self.proof.require(took_s < LIMIT_S, f"{name}: {took_s:.1f} s")
        figures = self.proof.figures
        figures["longest s"] = max(figures.get("longest s", 0.0), took_s)


def forward(line: Line) -> None:
    """A call begun after the cut, and one that is under way."""
    with timernn.connect(line.proxy.address) as client, ThreadPoolExecutor(1) as pool:
        session = client.session("calm")
        session.forward(XS)
        line.cut()
        with line.within_limit("forward"):
            session.forward(XS)
        with line.within_limit("forward under way"):
            under_way = pool.submit(lambda: [session.forward(XS) for _ in range(50)])
            line.cut()
            under_way.result()
        line.proof.require(session.get_info().chunk_seq == 52, "forward: lost count")


def stream(line: Line) -> None:
    """A stream that idled."""
    with timernn.connect(line.proxy.address) as client:
        session = client.session("calm")
        outputs = session.stream(iter([XS] * 6), in_flight=1)
        next(outputs)
        line.cut()
        with line.within_limit("stream"):
            line.proof.require(len(list(outputs)) == 5, "stream: lost outputs")
        line.proof.require(session.get_info().chunk_seq == 6, "stream: lost count")


def frame(line: Line) -> None:
    """A stream of frames that idled."""
    with timernn.connect(line.proxy.address) as client:
        session = client.session("calm")
        client.frame([(session, XS)])
        line.cut()
        with line.within_limit("frame"):
            (hs,) = client.frame([(session, XS)])
        line.proof.require(not isinstance(hs, timernn.Error), f"frame: {hs!r}")
        line.proof.require(session.get_info().chunk_seq == 2, "frame: lost count")


def weights(line: Line) -> None:
    """A download and an upload."""
    with timernn.connect(line.proxy.address) as client:
        client.ping()
        line.cut()
        with line.within_limit("download"):
            held = client.get_weights("calm")
        line.cut()
        with line.within_limit("upload"):
            put = client.put_weights("calm", Wx=held.Wx, Wh=held.Wh, b=held.b)
        line.proof.require(put.number > held.version.number, "upload: no new version")


def asyncio_frontend(line: Line) -> None:
    """A call, a stream and a frame of the asyncio frontend."""

    async def several(times: int) -> AsyncIterator[Any]:
        for _ in range(times):
            yield XS

    async def program() -> None:
        async with aio.connect(line.proxy.address) as client:
            session = await client.session("calm")
            line.cut()
            with line.within_limit("asyncio forward"):
                await session.forward(XS)
            outputs = session.stream(several(3), in_flight=1)
            await anext(outputs)
            line.cut()
            with line.within_limit("asyncio stream"):
                line.proof.require(len([hs async for hs in outputs]) == 2, "asyncio: lost outputs")
            await client.frame([(session, XS)])
            line.cut()
            with line.within_limit("asyncio frame"):
                await client.frame([(session, XS)])
            line.proof.require((await session.get_info()).chunk_seq == 6, "asyncio: lost count")

    asyncio.run(program())


@pytest.mark.timeout(300)
@pytest.mark.promise("C3", "a connection cut without a word costs a call 20 s at most")
def test_calls_after_a_silent_cut_succeed_soon(proof: Proof) -> None:
    """Each kind of call on a connection that was cut, side by side."""
    kinds: tuple[Callable[[Line], None], ...] = (forward, stream, frame, weights, asyncio_frontend)
    with Fleet(1) as fleet, ThreadPoolExecutor(len(kinds)) as pool:
        address = fleet.addresses[0]
        note_steady_traffic(address, proof)

        def run(kind: Callable[[Line], None]) -> None:
            with FaultProxy(address) as proxy:
                kind(Line(proxy, proof))

        list(pool.map(run, kinds))


@pytest.mark.timeout(300)
@pytest.mark.promise("C3", "a connection cut without a word costs a call 20 s at most")
def test_the_server_notices_clients_that_vanished(proof: Proof) -> None:
    """It closes their connections, with a stream on them or without."""
    with Fleet(1) as fleet, FaultProxy(fleet.addresses[0]) as proxy:
        note_steady_traffic(fleet.addresses[0], proof)
        port = int(fleet.addresses[0].rpartition(":")[2])
        clients = [timernn.connect(proxy.address) for _ in range(4)]
        for client in clients:
            session = client.session("calm")
            client.frame([(session, XS)])
        proof.require(connections_of(port) >= len(clients), "no connection was made")
        proof.hit("client vanished", proxy.vanish_all())
        deadline = time.monotonic() + NOTICED_S
        while (left := connections_of(port)) and time.monotonic() < deadline:
            time.sleep(0.5)  # no event says what another process closes
        proof.require(not left, f"{left} connections are open after {NOTICED_S:.0f} s")
        for client in clients:
            client.close()


def connections_of(port: int) -> int:
    """Count the connections that a server on this machine holds open."""
    tables = [Path(table) for table in TABLES if Path(table).exists()]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == ESTABLISHED for row in rows)


@pytest.mark.timeout(300)
@pytest.mark.promise(
    "C3", "a connection cut without a word costs a call 20 s at most", control=True
)
def test_two_idle_minutes_keep_the_connection(proof: Proof) -> None:
    """The server does not take the library's pings for too many."""
    with Fleet(1) as fleet, FaultProxy(fleet.addresses[0]) as proxy:
        with timernn.connect(proxy.address) as client:
            client.ping()
            time.sleep(IDLE_S)
            client.ping()
        proof.require(proxy.counts["connections"] == 1, "the connection was cut")


def test_a_name_server_that_says_nothing_is_why_no_server_is_found() -> None:
    """The error names the host that cannot be resolved, not only that time is over."""
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        target = f"dns://127.0.0.1:{silent.getsockname()[1]}/nowhere.example"
        with timernn.connect(target) as client, pytest.raises(timernn.NoServer) as caught:
            client.ping()
    assert caught.value.metadata == {"host": "nowhere.example"}
