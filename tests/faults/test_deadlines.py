"""Deadlines and cancelled calls: reported in time, and nothing is left behind by them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from redis.asyncio import Redis

from instruments.dialects import RespDialect
from instruments.processes import wait_until
from instruments.proxy import FaultProxy, Faults, Link
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import Model, Wire, draw, outcome, refusal, state_of, steady_traffic
from service.settings import Settings
from service.store.urls import connect
from timernn import errors
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from instruments.report import Proof
    from scenes.wire import Writer

IN_FLIGHT = 64  # operations that a replica takes at once
STORE_CONNECTIONS = 16
SLOW_S = 2.0
DEADLINE_S = 0.1
REPORTED_S = 0.15
DRIFT_BYTES = 20e6


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two replicas that take little at once, with proxies before the store."""
    options = (
        *("--limit-operations-in-flight", str(IN_FLIGHT)),
        *("--store-connections", str(STORE_CONNECTIONS)),
        *("--store-timeout-ms", "30000"),
    )
    with Fleet(2, *options, faulty_store=True) as running:
        yield running


@pytest.fixture(autouse=True)
def _healed(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.heal()


@pytest.mark.timeout(300)
@pytest.mark.promise("R14", "deadlines and cancels are honoured end to end")
@figure("rounds", 10, 100)
async def test_a_deadline_is_reported_in_time_and_the_same_chunk_then_succeeds(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """A chunk whose commit takes two seconds ends after 100 ms; sent again it is answered once."""
    rng = np.random.default_rng(seed)
    async with Wire(fleet.addresses[0]) as slow, Wire(fleet.addresses[1]) as other:
        model = await Model.create(slow, rng, f"deadline-{seed}-{rounds}")
        writers = await steady_traffic(proof, [slow, other], model, rng)
        for number in range(rounds):
            writer = writers[number % len(writers)]
            # Warm on the replica that is to be slow: what is late below is the commit.
            xs = draw(rng)
            writer.check(await slow.forward(writer.chunk(xs)), xs, proof)
            xs = draw(rng)
            request = writer.chunk(xs)
            fleet.store_proxies[0].set(Faults(up=Link(latency_s=SLOW_S if number < 2 else 0.4)))
            started = time.monotonic()
            late = await refusal(slow.forward(request, DEADLINE_S))
            took = time.monotonic() - started
            fleet.store_proxies[0].set(Faults())
            proof.hit("deadline over")
            proof.require(isinstance(late, errors.DeadlineExceeded), f"{late!r}")
            proof.figures["reported s"] = max(took, proof.figures.get("reported s", 0.0))
            proof.require(
                took <= REPORTED_S, f"the deadline of 100 ms was reported after {took:.3f} s"
            )
            # At once on the other replica or, behind the first attempt, on the same.
            again = await (other if number % 2 else slow).forward(request)
            writer.check(again, xs, proof)
            session, _ = await state_of(other, writer.session.session_id)
            proof.require(session.chunk_seq == writer.session.chunk_seq, "applied twice")


@pytest.mark.timeout(600)
@pytest.mark.promise("R14", "deadlines and cancels are honoured end to end")
@figure("cancels", 1200, 10_000)
async def test_random_cancels_leave_nothing_behind(
    fleet: Fleet, proof: Proof, seed: int, cancels: int
) -> None:
    """Calls and streams are cancelled at random moments: sessions go on, and all room is given back."""
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    async with Wire(fleet.addresses[0]) as wire, Wire(fleet.addresses[1]) as other:
        model = await Model.create(wire, rng, f"cancel-{seed}-{cancels}")
        writers = await steady_traffic(proof, [wire, other], model, rng)
        fleet.set_faults(store=Faults(down=Link(latency_s=0.004, jitter_s=0.004)))
        await cancel_at_random(wire, writers, rng, dice, proof, cancels // 5)  # warm
        before = [replica.rss_bytes() for replica in fleet.replicas]
        await cancel_at_random(wire, writers, rng, dice, proof, cancels - cancels // 5)
        fleet.heal()
        for replica, start in zip(fleet.replicas, before, strict=True):
            drift = replica.rss_bytes() - start
            proof.figures["drift MB"] = max(drift / 1e6, proof.figures.get("drift MB", 0.0))
            proof.require(drift < DRIFT_BYTES, f"memory grew by {drift / 1e6:.1f} MB")
        connections = int(fleet.store.info("clients")["connected_clients"])
        proof.figures["store connections"] = connections
        most = len(fleet.replicas) * STORE_CONNECTIONS + 1  # and the one that asks
        proof.require(connections <= most, f"{connections} connections to the store")
        await require_all_room(fleet, wire, model, rng, proof)
        for writer in writers:
            xs = draw(rng)
            writer.check(await other.forward(writer.chunk(xs)), xs, proof)
    assert proof.faults["call cancelled"] > cancels / 5
    assert proof.faults["stream cancelled"] > cancels / 10


async def cancel_at_random(
    wire: Wire,
    writers: list[Writer],
    rng: np.random.Generator,
    dice: random.Random,
    proof: Proof,
    count: int,
) -> None:
    """Start so many calls or streams, cancel each after a moment, then finish what it meant."""
    left = iter(range(count))

    async def disturb(writer: Writer) -> None:
        for _ in left:
            chunks = [draw(rng) for _ in range(3 if dice.random() < 0.5 else 1)]
            requests = chain(writer, chunks)
            if len(chunks) == 1:
                call: Any = asyncio.ensure_future(wire.forward(requests[0]))
            else:
                call = asyncio.ensure_future(stream(wire, requests))
            await asyncio.wait([call], timeout=dice.random() * 0.02)
            if call.cancel():
                proof.hit("call cancelled" if len(chunks) == 1 else "stream cancelled")
            with contextlib.suppress(asyncio.CancelledError, errors.Error):
                await call
            for xs, request in zip(chunks, requests, strict=True):
                request.previous_token = writer.session.state_token
                writer.check(await wire.forward(request), xs, proof)

    await asyncio.gather(*map(disturb, writers))


def chain(writer: Writer, chunks: list[Any]) -> list[rnn_pb.ForwardRequest]:
    """Lay out chunks that follow one another; on a stream the later ones need no token."""
    first, token = writer.session.chunk_seq + 1, writer.session.state_token
    return [
        writer.chunk(xs, first + k, previous_token=b"" if k else token)
        for k, xs in enumerate(chunks)
    ]


async def stream(wire: Wire, requests: list[rnn_pb.ForwardRequest]) -> None:
    """Send chunks in one message of a stream and read their answers."""
    call = wire.rnn.Stream(timeout=60)
    try:
        operations = [
            rnn_pb.Operation(tag=tag, forward=request) for tag, request in enumerate(requests)
        ]
        await call.write(rnn_pb.StreamRequest(operations=operations))
        answered = 0
        while answered < len(requests):
            answered += len((await call.read()).results)
        await call.done_writing()
        await call.read()
    finally:
        call.cancel()


async def require_all_room(
    fleet: Fleet, wire: Wire, model: Model, rng: np.random.Generator, proof: Proof
) -> None:
    """Fill the replica to its limit: had a cancelled call kept its place, one would be refused."""
    writers = [await model.open(wire) for _ in range(IN_FLIGHT + 1)]
    data = [draw(rng) for _ in writers]
    for writer, xs in zip(writers, data, strict=True):
        writer.check(await wire.forward(writer.chunk(xs)), xs, proof)  # warm: now only commits wait
    slow = fleet.store_proxies[0]
    slow.set(Faults(up=Link(stall=True)))
    stalled = slow.counts["stall"]
    held = [
        asyncio.create_task(outcome(wire.forward(writer.chunk(xs))))
        for writer, xs in zip(writers[:-1], data, strict=False)
    ]
    await asyncio.to_thread(wait_until, "a stall", lambda: slow.counts["stall"] > stalled)
    # Whatever is refused is refused at once; the one beyond the limit must be.
    beyond = await outcome(wire.forward(writers[-1].chunk(data[-1])))
    proof.require(isinstance(beyond, errors.Overloaded), f"beyond the limit: {beyond!r}")
    slow.set(Faults())
    for writer, xs, answer in zip(writers, data, await asyncio.gather(*held), strict=False):
        if isinstance(answer, errors.Error):
            proof.violated(f"a place was not given back: {answer!r}")
        else:
            writer.check(answer, xs, proof)


POOLS: dict[str, Callable[[str], Any]] = {
    "the service's own": lambda address: connect(f"redis://{address}", Settings()),
    "one connection": lambda address: Redis.from_url(
        f"redis://{address}", single_connection_client=True
    ),
    "RESP2": lambda address: Redis.from_url(f"redis://{address}", protocol=2),
    "RESP3": lambda address: Redis.from_url(f"redis://{address}", protocol=3),
}


@pytest.mark.timeout(300)
@pytest.mark.promise("R15", "a cancelled store command hands no reply to another caller")
@pytest.mark.parametrize("kind", POOLS)
@figure("reads", 4000, 25_000)
async def test_a_cancelled_command_gives_its_reply_to_nobody(
    fleet: Fleet, proof: Proof, seed: int, reads: int, kind: str
) -> None:
    """Under random cancels each key reads as its own value, alone and in transactions."""
    dice = random.Random(seed)
    wanted = {f"k{seed}:{k}": f"v{k}".encode() for k in range(100)}
    with FaultProxy(fleet.store.address, dialect=RespDialect, seed=seed) as proxy:
        client: Any = POOLS[kind](proxy.address)
        try:
            started = time.monotonic()
            for key, value in wanted.items():
                await client.set(key, value)
            proof.steady(len(wanted), time.monotonic() - started)
            proxy.set(Faults(down=Link(latency_s=0.005, jitter_s=0.004)))
            left = iter(range(reads))

            async def read() -> None:
                for _ in left:
                    await read_or_cancel(client, wanted, dice, proof)

            await asyncio.gather(*(read() for _ in range(20)))
        finally:
            await client.aclose()
    assert proof.faults["command cancelled"] > reads / 10


async def read_or_cancel(
    client: Any, wanted: dict[str, bytes], dice: random.Random, proof: Proof
) -> None:
    """Read a key or several at once, perhaps cancel it, and compare what comes."""
    keys = dice.sample(list(wanted), dice.choice((1, 1, 3)))
    if len(keys) == 1:
        call = asyncio.ensure_future(client.get(keys[0]))
    else:
        call = asyncio.ensure_future(transaction(client, keys))
    if dice.random() < 0.4:
        await asyncio.wait([call], timeout=dice.random() * 0.012)
        if call.cancel():
            proof.hit("command cancelled")
    with contextlib.suppress(asyncio.CancelledError):
        got = await call
        expected = [wanted[key] for key in keys]
        proof.require(got in (expected, expected[0]), f"{keys}: got {got!r}")


async def transaction(client: Any, keys: list[str]) -> Any:
    """Read keys in one MULTI."""
    async with client.pipeline(transaction=True) as pipeline:
        for key in keys:
            pipeline.get(key)
        return await pipeline.execute()
