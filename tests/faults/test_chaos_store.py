"""Every call to the store fails with p = 0.25, before or after it took effect: a caller cannot know which."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest

from instruments.chaos_store import Chaos, disturb_client
from instruments.redis_servers import RedisServer
from instruments.replicas import (
    HIDDEN,
    Client,
    draw,
    local_rnn,
    open_on,
    present,
    start_replica,
    step,
)
from rnn_engine import Adam, TanhNetwork
from scenes.figures import figure
from scenes.wire import is_close
from service.domain.errors import Unavailable
from service.domain.types import InitialWeights, ModelSpec, Selector
from service.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from instruments.replicas import Replica
    from instruments.report import Proof
    from rnn_engine import Array
    from service.domain.types import Version

T = TypeVar("T")
SPEC = ModelSpec("m", TanhNetwork(3, HIDDEN), "float32", Adam(lr=0.01))
SESSIONS = 10


@pytest.fixture
def stores() -> Iterator[tuple[RedisServer, RedisServer]]:
    """Two stores: names, and so the order in which gradients are summed, are the same on both."""
    with RedisServer(append_only=False) as one, RedisServer(append_only=False) as other:
        yield one, other


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call until it is answered, as a client does: the same each time."""
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0)


@pytest.mark.timeout(240)
@pytest.mark.promise("R1b", "a store whose every call may fail, done or not, is never noticed")
@figure("chunks", 30, 300)
async def test_streams_and_steps_over_a_store_of_chance(
    stores: tuple[RedisServer, RedisServer], proof: Proof, seed: int, chunks: int
) -> None:
    """Ten sessions stream, train and step over two disturbed replicas; the calm one ends alike."""
    chaos = Chaos(seed=seed, probability=0.25)
    calm = await start_replica(stores[0].url, Limits())
    wild = [
        await start_replica(
            stores[1].url, Limits(), disturb=lambda link: disturb_client(link, chaos)
        )
        for _ in range(2)
    ]
    data = _draw_data(seed, chunks)
    try:
        started = time.monotonic()
        wanted = await _run([calm], data, proof)
        proof.steady(SESSIONS * chunks, time.monotonic() - started)
        got = await _run(wild, data, proof)
        proof.require(got == wanted, f"the head is {got}, not {wanted}")
    finally:
        for replica in (calm, *wild):
            await replica.close()
    proof.hit({f"failed {when} the call": chaos.counts[when] for when in ("before", "after")})
    assert min(proof.faults.values()) > 100


def _draw_data(seed: int, chunks: int) -> list[list[tuple[Array, Array]]]:
    rng = np.random.default_rng(seed)
    return [[(draw(rng), draw(rng, size=HIDDEN)) for _ in range(chunks)] for _ in range(SESSIONS)]


async def _run(
    replicas: Sequence[Replica], data: list[list[tuple[Array, Array]]], proof: Proof
) -> Version:
    """Stream over every session side by side, then train step by step; return the last version."""
    first, tenant = replicas[0], "t"
    await persist(
        lambda: first.models.create(tenant, SPEC, InitialWeights(seed=1), request_id="create")
    )
    clients = []
    for k in range(SESSIONS):
        opened = await persist(lambda k=k: open_on(first, tenant, f"s{k}", request_id=f"open{k}"))  # type: ignore[misc]
        clients.append(Client(replicas, tenant, f"s{k}", opened.session.epoch))
    half = len(data[0]) // 2
    await asyncio.gather(
        *(
            _stream(first, client, some[:half], proof)
            for client, some in zip(clients, data, strict=True)
        )
    )
    version = None
    for number in range(half, len(data[0])):
        pairs = [some[number] for some in data]
        await asyncio.gather(
            *(_contribute(client, *pair) for client, pair in zip(clients, pairs, strict=True))
        )
        named = [Selector(c.session_id, c.epoch, (c.chunk_seq,)) for c in clients]
        update = step("m", f"u{number}", *named, expected=version, clip_norm=1.0)
        made = await persist(
            lambda u=update: clients[0].next_replica.updates.update(tenant, u)  # type: ignore[misc]
        )
        proof.require(made.contribution_count == SESSIONS, f"{made.contribution_count} taken")
        version = made.version
        proof.checked(2 * SESSIONS)  # chunks and gradients, which the digest stands for
    return present(version)


async def _stream(
    reader: Replica, client: Client, some: list[tuple[Array, Array]], proof: Proof
) -> None:
    local = await persist(lambda: local_rnn(reader, client.tenant, SPEC))
    for xs, _ in some:
        request = client.chunk(xs)
        done = await persist(
            lambda r=request: client.next_replica.recurrence.forward(client.tenant, r)  # type: ignore[misc]
        )
        client.chunk_seq, client.token = done.chunk_seq, done.token
        right = is_close(present(done.outputs), local.forward(xs))
        proof.require(right, f"chunk {done.chunk_seq} of {client.session_id} is wrong")


async def _contribute(client: Client, xs: Array, dhs: Array) -> None:
    request = client.chunk(xs, train=True)
    done = await persist(lambda: client.next_replica.recurrence.forward(client.tenant, request))
    client.chunk_seq, client.token = done.chunk_seq, done.token
    client.tokens[done.chunk_seq] = done.token
    gradient = client.gradient(dhs)
    await persist(lambda: client.next_replica.backpropagation.backward(client.tenant, gradient))
