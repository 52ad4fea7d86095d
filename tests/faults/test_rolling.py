"""Replicas that are restarted one after another, and connections that are asked to move."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from releases import ROOT, WHEELS, Release
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import Model, N, Wire, draw, is_close

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from instruments.processes import ServiceProcess
    from instruments.report import Proof

SESSIONS = 50
STEADY_S = 2.0
DRAIN_S = 10.0
EXIT_MARGIN_S = 1.0
AGE_MS = 500


@dataclass
class Crowd:
    """Sessions that stream until they are stopped, some by streams and some by single calls.

    Attributes:
        answers: How many chunks were answered and compared.
        is_over: Set to stop.
    """

    addresses: list[str]
    model: Model
    proof: Proof
    seed: int
    answers: int = 0
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    _answered: asyncio.Event = field(default_factory=asyncio.Event)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def stream(self, number: int, client: timernn.aio.Client) -> None:
        """Stream one session until the end; every answer is compared, no call may fail."""
        rng, local = np.random.default_rng((self.seed, number)), self.model.local()
        session = await client.session(self.model.model_id, batch_size=N)
        sent: list[Any] = []
        try:
            if number % 2:
                async for hs in session.stream(self._chunks(rng, sent)):
                    self._compare(hs, local.forward(sent.pop(0)))
            else:
                async for xs in self._chunks(rng, sent):
                    self._compare(await session.forward(xs), local.forward(xs))
            info = await session.get_info()
            self.proof.require(info.chunk_seq == session.chunk_seq, "a gap at the end")
        except timernn.Error as error:
            self.proof.violated(f"session {number}: a call failed: {error!r}")

    async def _chunks(self, rng: np.random.Generator, sent: list[Any]) -> AsyncIterator[Any]:
        while not self.is_over.is_set():
            xs = draw(rng)
            sent.append(xs)
            yield xs
            await asyncio.sleep(0.05)  # a device's pace

    def _compare(self, hs: Any, wanted: Any) -> None:
        self.answers += 1
        self._answered.set()
        self.proof.require(is_close(hs, wanted), "a streamed output is wrong")

    async def run(self, clients: int) -> list[asyncio.Task[None]]:
        """Start all sessions over so many clients and measure their steady traffic."""
        made = [
            await self._stack.enter_async_context(
                timernn.aio.connect(self.addresses[:: -1 if n % 2 else 1], timeout=60)
            )
            for n in range(clients)
        ]
        tasks = [
            asyncio.create_task(self.stream(number, made[number % clients]))
            for number in range(SESSIONS)
        ]
        await self.until(SESSIONS)
        started, before = time.monotonic(), self.answers
        await asyncio.sleep(STEADY_S)
        self.proof.steady(self.answers - before, time.monotonic() - started)
        return tasks

    async def until(self, answers: int) -> None:
        """Wait until so many chunks have been answered."""
        while self.answers < answers:
            self._answered.clear()
            await self._answered.wait()

    async def restart(self, replica: ServiceProcess) -> None:
        """Restart a replica while the sessions stream; it has to end in time and without an error."""
        proof, before, started = self.proof, self.answers, time.monotonic()
        code = await asyncio.to_thread(replica.terminate)
        took = time.monotonic() - started
        proof.hit("SIGTERM")
        proof.require(code == 0, f"exit code {code}")
        proof.require(took <= DRAIN_S + EXIT_MARGIN_S, f"it took {took:.1f} s to end")
        proof.figures["drain s"] = max(took, proof.figures.get("drain s", 0.0))
        await self.until(before + 2 * SESSIONS)  # the others carry the load
        await asyncio.to_thread(replica.start)
        await self.until(self.answers + 2 * SESSIONS)

    async def end(self, tasks: list[asyncio.Task[None]]) -> None:
        """Stop all sessions and let their last answers come."""
        self.is_over.set()
        await asyncio.gather(*tasks)
        await self._stack.aclose()


@pytest.mark.timeout(600)
@pytest.mark.promise("R12", "a rolling restart loses nothing")
@figure("rounds", 1, 10)
async def test_every_replica_is_restarted_under_streaming_sessions(
    proof: Proof, seed: int, rounds: int
) -> None:
    """SIGTERM to one replica after another: exit code 0 in time, and no client call fails."""
    with Fleet(2, "--drain-s", str(DRAIN_S)) as fleet:
        async with Wire(fleet.addresses[0]) as wire:
            model = await Model.create(wire, np.random.default_rng(seed), "rolling")
        crowd = Crowd(fleet.addresses, model, proof, seed)
        tasks = await crowd.run(clients=10)
        for replica in [*fleet.replicas] * rounds:
            await crowd.restart(replica)
        await crowd.end(tasks)


@pytest.mark.timeout(600)
@pytest.mark.promise("R12", "a rolling restart loses nothing")
@figure("rounds", 1, 5)
@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.stem)
async def test_a_fleet_is_upgraded_and_rolled_back_under_streaming_sessions(
    proof: Proof, seed: int, rounds: int, wheel: Path, tmp_path: Path
) -> None:
    """Replica after replica goes from an earlier release to this one and back: no client call fails."""
    old, new = Release.of_wheel(wheel, tmp_path), Release(ROOT)
    with Fleet(2, "--drain-s", str(DRAIN_S), envs=[old.env, old.env]) as fleet:
        async with Wire(fleet.addresses[0]) as wire:
            model = await Model.create(wire, np.random.default_rng(seed), "upgraded")
        crowd = Crowd(fleet.addresses, model, proof, seed)
        tasks = await crowd.run(clients=10)
        for release in (new, old) * rounds:
            for replica in fleet.replicas:
                replica.env = release.env
                await crowd.restart(replica)
        await crowd.end(tasks)


@pytest.mark.timeout(600)
@pytest.mark.promise("R13", "connections that are asked to move are invisible to callers")
@figure("seconds", 6, 120)
async def test_connections_of_half_a_second_are_not_noticed(
    proof: Proof, seed: int, seconds: int
) -> None:
    """Each connection and stream is ended after half a second: no call fails, nothing is wrong."""
    with Fleet(2, "--connection-age-ms", str(AGE_MS), faulty_clients=True) as fleet:
        async with Wire(fleet.replicas[0].address) as wire:
            model = await Model.create(wire, np.random.default_rng(seed), "moving")
        crowd = Crowd(fleet.addresses, model, proof, seed)
        tasks = await crowd.run(clients=4)
        before = connections(fleet)
        await asyncio.sleep(seconds)
        proof.hit("GOAWAY", connections(fleet) - before)
        await crowd.end(tasks)
    assert proof.faults["GOAWAY"] >= 4 * seconds


def connections(fleet: Fleet) -> int:
    """Return how many connections clients have made."""
    return sum(proxy.counts["connections"] for proxy in fleet.client_proxies)
