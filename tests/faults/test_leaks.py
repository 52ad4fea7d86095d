"""Tens of thousands of calls of all kinds: neither the server nor the client library grows."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import statistics
import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from instruments.processes import wait_until
from instruments.proxy import Faults, Link
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import D, H, Model, N, T, Wire, draw, steady_traffic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from instruments.proxy import FaultProxy
    from instruments.report import Proof

GROWTH_BYTES = 10e6
CALLERS = 16
SAMPLES = 40  # a run
LEAK_BYTES = 20_000  # a call, in the control


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two replicas with proxies on both sides."""
    options = ("--store-timeout-ms", "30000")
    with Fleet(2, *options, faulty_store=True, faulty_clients=True) as running:
        yield running


@pytest.fixture(autouse=True)
def _healed(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.heal()


def own_rss_bytes() -> int:
    """Return the memory of this process, in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Growth:
    """Samples of memory over a run, judged from its middle: until then caches fill."""

    def __init__(self, meters: dict[str, Callable[[], int]]) -> None:
        """Take what to measure, by name."""
        self._meters = meters
        self._samples: dict[str, list[int]] = {name: [] for name in meters}

    def sample(self) -> None:
        """Take one sample of each meter."""
        for name, meter in self._meters.items():
            self._samples[name].append(meter())

    def since_the_middle(self) -> dict[str, float]:
        """Return how much each has grown from the middle to the end, in bytes."""
        return {
            name: statistics.median(values[-4:])
            - statistics.median(values[len(values) // 2 - 2 : len(values) // 2 + 2])
            for name, values in self._samples.items()
        }


class Caller:
    """Makes one kind of call after another on sessions of its own."""

    def __init__(self, client: timernn.aio.Client, model_id: str, seed: int, proof: Proof) -> None:
        """Take the client that all callers share."""
        self._client, self._model_id, self._proof = client, model_id, proof
        self._dice, self._rng = random.Random(seed), np.random.default_rng(seed)
        self._name = f"{model_id}-{seed}"
        self._session: Any = None
        self._trainer: Any = None

    async def open(self) -> None:
        """Open a session to stream with and one to train with."""
        self._session = await self._client.session(self._model_id, self._name, batch_size=N)
        self._trainer = await self._client.session(
            self._model_id, f"{self._name}-train", batch_size=N, train=True
        )

    async def call(self) -> None:
        """Make a call of some kind: in ten, one is refused and two are cancelled."""
        chance = self._dice.random()
        if chance < 0.1:
            await self._be_refused()
        elif chance < 0.3:
            await self._be_cancelled()
        else:
            await self._dice.choice((self._forward, self._stream, self._train, self._live))()
        self._proof.checked()

    async def _forward(self) -> None:
        hs = await self._session.forward(draw(self._rng))
        assert hs.shape == (N, T, H)

    async def _stream(self) -> None:
        async for _ in self._session.stream([draw(self._rng) for _ in range(2)]):
            pass

    async def _train(self) -> None:
        hs = await self._trainer.forward(draw(self._rng))
        await self._trainer.backward(hs)
        await self._trainer.update(exclusive=False)

    async def _live(self) -> None:
        await self._session.reset_state()
        await self._session.state
        async with await self._session.fork() as twin:
            await twin.close()

    async def _be_refused(self) -> None:
        bad = np.full((N, T, D), np.nan)
        with pytest.raises(timernn.errors.NonFinite):
            await self._session.forward(bad)
        self._proof.hit("refused")

    async def _be_cancelled(self) -> None:
        call: asyncio.Task[Any] = asyncio.create_task(self._session.forward(draw(self._rng)))
        await asyncio.wait([call], timeout=self._dice.random() * 0.006)
        if call.cancel():
            self._proof.hit("cancelled")
        await asyncio.wait([call])


async def make_calls(
    calls: int, call_of: list[Callable[[], Awaitable[None]]], growth: Growth
) -> None:
    """Share so many calls between callers and sample memory on the way."""
    left = iter(range(calls))

    async def run(call: Callable[[], Awaitable[None]]) -> None:
        for number in left:
            if number % (calls // SAMPLES) == 0:
                growth.sample()
            await call()

    await asyncio.gather(*map(run, call_of))


@pytest.mark.timeout(900)
@pytest.mark.promise("R18", "no leak, in the server or the client library")
@figure("calls", 20_000, 200_000, soak=2_000_000)
async def test_mixed_calls_leak_nothing(fleet: Fleet, proof: Proof, seed: int, calls: int) -> None:
    """A fifth is cancelled and a tenth refused; from the middle on, nobody's memory grows."""
    rng, model_id = np.random.default_rng(seed), f"leaks-{seed}-{calls}"
    async with Wire(fleet.replicas[0].address) as wire, Wire(fleet.replicas[1].address) as other:
        model = await Model.create(wire, rng, model_id)
        await steady_traffic(proof, [wire, other], model, rng)
    meters: dict[str, Callable[[], int]] = {"client": own_rss_bytes}
    meters |= {f"server {n}": each.rss_bytes for n, each in enumerate(fleet.replicas)}
    growth = Growth(meters)
    addresses = [each.address for each in fleet.replicas]
    async with (
        timernn.aio.connect(addresses, timeout=60) as one,
        timernn.aio.connect(addresses[::-1], timeout=60) as two,
    ):
        callers = [Caller((one, two)[k % 2], model_id, seed + k, proof) for k in range(CALLERS)]
        await asyncio.gather(*(caller.open() for caller in callers))
        await make_calls(calls, [caller.call for caller in callers], growth)
    for name, grown in growth.since_the_middle().items():
        proof.figures[f"{name} grown MB"] = grown / 1e6
        proof.require(grown <= GROWTH_BYTES, f"the {name} grew by {grown / 1e6:.1f} MB")


@pytest.mark.promise("R18", "no leak, in the server or the client library", control=True)
async def test_a_leak_on_purpose_is_seen(fleet: Fleet, proof: Proof, seed: int) -> None:
    """The same measurement shows when each call leaves some kilobytes behind."""
    rng, kept = np.random.default_rng(seed), list[bytes]()
    growth = Growth({"client": own_rss_bytes})
    async with Wire(fleet.replicas[0].address) as wire:
        model = await Model.create(wire, rng, f"control-{seed}")
        writer = await model.open(wire)

        async def leak() -> None:
            xs = draw(rng)
            writer.check(await wire.forward(writer.chunk(xs)), xs, proof)
            kept.append(os.urandom(LEAK_BYTES))

        await make_calls(2000, [leak], growth)
    proof.require(growth.since_the_middle()["client"] > GROWTH_BYTES, "the leak was not seen")


@pytest.mark.timeout(300)
@pytest.mark.promise("R18", "no leak, in the server or the client library")
async def test_every_call_ends_with_its_client(fleet: Fleet, proof: Proof, seed: int) -> None:
    """A client that is closed with calls and streams under way leaves none of them waiting."""
    rng, address = np.random.default_rng(seed), fleet.replicas[0].address
    async with Wire(address) as wire, Wire(fleet.replicas[1].address) as other:
        model = await Model.create(wire, rng, f"exit-{seed}")
        await steady_traffic(proof, [wire, other], model, rng)
    proxy = fleet.store_proxies[0]
    for _ in range(5):
        async with timernn.aio.connect(address, timeout=60) as client:
            sessions = [await client.session(model.model_id, batch_size=N) for _ in range(20)]
            await asyncio.gather(*(session.forward(draw(rng)) for session in sessions))
            stalls = proxy.counts["stall"]
            proxy.set(Faults(up=Link(stall=True)))
            calls: list[asyncio.Task[Any]] = [
                asyncio.create_task(drain(each, draw(rng)) if k % 2 else each.forward(draw(rng)))
                for k, each in enumerate(sessions)
            ]
            await asyncio.to_thread(wait_for_stall, proxy, stalls)
        done, pending = await asyncio.wait(calls, timeout=10)
        proof.hit("client closed with calls under way")
        proof.require(not pending, f"{len(pending)} calls outlived their client")
        for call in done:
            proof.require(call.cancelled() or call.exception(), "a call succeeded without a client")
        proxy.set(Faults())


@pytest.mark.timeout(300)
@pytest.mark.promise("R18", "no leak, in the server or the client library")
async def test_every_call_ends_with_its_blocking_client(
    fleet: Fleet, proof: Proof, seed: int
) -> None:
    """The same of threads that call and stream over one blocking client."""
    rng, address = np.random.default_rng(seed), fleet.replicas[0].address
    async with Wire(address) as wire, Wire(fleet.replicas[1].address) as other:
        model = await Model.create(wire, rng, f"blocking-{seed}")
        await steady_traffic(proof, [wire, other], model, rng)
    proxy = fleet.store_proxies[0]
    with ThreadPoolExecutor(20) as pool:
        for _ in range(5):
            with timernn.connect(address, timeout=60) as client:
                sessions = [client.session(model.model_id, batch_size=N) for _ in range(20)]
                for session in sessions:
                    session.forward(draw(rng))
                stalls = proxy.counts["stall"]
                proxy.set(Faults(up=Link(stall=True)))
                calls = [
                    pool.submit(drain_blocking if k % 2 else timernn.Session.forward, each, xs)
                    for k, (each, xs) in enumerate((each, draw(rng)) for each in sessions)
                ]
                wait_for_stall(proxy, stalls)
            done, pending = futures.wait(calls, timeout=10)
            proof.hit("blocking client closed with calls under way")
            proof.require(not pending, f"{len(pending)} calls outlived their client")
            for call in done:
                proof.require(call.exception(), "a call succeeded without a client")
            proxy.set(Faults())


def drain_blocking(session: Any, xs: Any) -> None:
    """Stream a chunk again and again until something stops it."""
    for _ in session.stream(itertools.repeat(xs)):
        pass


async def drain(session: Any, xs: Any) -> None:
    """Stream a chunk again and again until something stops it."""
    async for _ in session.stream(itertools.repeat(xs)):
        pass


def wait_for_stall(proxy: FaultProxy, before: int) -> None:
    """Wait until the proxy keeps something back that it did not before."""
    wait_until("a stall", lambda: proxy.counts["stall"] > before)


@pytest.mark.timeout(300)
@pytest.mark.promise("C1", "retries keep to their budget, and one failure poisons no client")
async def test_retries_keep_to_their_budget_and_one_failure_poisons_nothing(
    fleet: Fleet, proof: Proof, seed: int
) -> None:
    """Against servers that answer nobody, twenty callers together send few retries; then all goes on."""
    rng, callers, budget, per_s = np.random.default_rng(seed), 20, 20.0, 10.0
    policy = timernn.RetryPolicy(initial_backoff_s=0.01, budget=budget, budget_per_s=per_s)
    async with Wire(fleet.replicas[0].address) as wire, Wire(fleet.replicas[1].address) as other:
        model = await Model.create(wire, rng, f"budget-{seed}")
        await steady_traffic(proof, [wire, other], model, rng)
    async with timernn.aio.connect(fleet.addresses, timeout=3, retry=policy) as client:
        sessions = [await client.session(model.model_id, batch_size=N) for _ in range(callers)]
        data = [draw(rng) for _ in sessions]
        before = attempts(fleet)
        fleet.set_faults(clients=Faults(reset_p=1.0))
        started = time.monotonic()
        failed = await asyncio.gather(
            *(session.forward(xs) for session, xs in zip(sessions, data, strict=True)),
            return_exceptions=True,
        )
        took = time.monotonic() - started
        fleet.heal()
        sent = attempts(fleet) - before
        proof.hit("request reset", sent)
        for error in failed:
            proof.require(isinstance(error, timernn.Error), f"{error!r} in place of a typed error")
        allowed = callers + budget + per_s * took
        proof.figures["attempts of the budget"] = sent / allowed
        proof.require(sent <= allowed + 1, f"{sent} attempts, {allowed:.0f} were allowed")
        # The same call again is the same chunk; the client is as good as new.
        for session, xs in zip(sessions, data, strict=True):
            wanted = model.local().forward(xs)
            proof.require(np.allclose(await session.forward(xs), wanted, atol=1e-5), "poisoned")
            proof.require(session.chunk_seq == 1, "another chunk")


def attempts(fleet: Fleet) -> int:
    """Return how many requests the proxies have reset."""
    return sum(proxy.counts["reset"] for proxy in fleet.client_proxies)
