"""A cluster whose slots move: what is on its way is found, and nothing is written beside it."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from instruments.redis_servers import Cluster
from instruments.replicas import INPUTS, Client, draw, open_on, refusal, start_replica
from recorder import Recorder
from rnn_engine import SGD, TanhNetwork
from service.domain.limits_policy import TenantLimits
from service.domain.types import InitialWeights, ModelSpec, SessionKey
from service.settings import Limits, Settings
from service.store import keys
from service.store.cluster import ClusterRouter
from service.store.urls import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import numpy as np

    from instruments.redis_servers import ClusterNode


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of three masters."""
    with Cluster(with_replicas=False) as running:
        yield running


@pytest_asyncio.fixture
async def router(cluster: Cluster) -> AsyncIterator[ClusterRouter]:
    """A router of it that knows one node."""
    made = connect(f"redis+cluster://{cluster.nodes[0].address}", Settings())
    assert isinstance(made, ClusterRouter)
    yield made
    await made.aclose()


def other(cluster: Cluster, slot: int) -> ClusterNode:
    """Return a master that does not serve a slot."""
    return next(node for node in cluster.masters if node is not cluster.owner(slot))


async def test_commands_go_to_the_nodes_of_their_keys(router: ClusterRouter) -> None:
    """In the order given, whatever slots they are of."""
    names = [f"key-{k}" for k in range(50)]
    await router.send([("SET", name, name) for name in names])
    assert await router.send([("GET", name) for name in names]) == [n.encode() for n in names]


async def test_each_nodes_round_trip_is_reported(cluster: Cluster) -> None:
    """What goes to several nodes is a round trip to each, under the name that it was given."""
    recorder = Recorder()
    router = connect(f"redis+cluster://{cluster.nodes[0].address}", Settings(), recorder)
    assert isinstance(router, ClusterRouter)
    await router.send([("SET", f"key-{k}", "v") for k in range(50)], name="fill")
    trips = [trip for trip in recorder.seen["round_trip_ended"] if trip["name"] == "fill"]
    assert len(trips) == len(cluster.masters)
    assert sum(trip["commands"] for trip in trips) == 50
    await router.aclose()


async def test_keys_on_their_way_are_found_on_whichever_connection(
    cluster: Cluster, router: ClusterRouter
) -> None:
    """ASKING goes with its command, also when the node has many connections open."""
    names = [b"{move}%d" % k for k in range(4)]
    await asyncio.gather(*(router.send([("SET", name, name)]) for name in names * 10))
    slot = cluster.slot(names[0])
    for _state in cluster.move_slot(slot, other(cluster, slot)):
        answers = await asyncio.gather(*(router.send([("GET", name)]) for name in names * 10))
        assert answers == [[name] for name in names * 10]
    assert await router.send([("GET", names[0])]) == [names[0]]


async def test_a_dead_node_fails_its_own_commands_alone(
    cluster: Cluster, router: ClusterRouter
) -> None:
    """The others of the same call are carried out."""
    slots = [cluster.slot(f"key-{k}") for k in range(9)]
    lost = cluster.owner(slots[0])
    owners = [cluster.owner(slot) for slot in slots]
    await router.refresh()
    lost.pause()
    answers = await router.send([("SET", f"key-{k}", k) for k in range(9)])
    lost.resume()
    for owner, answer in zip(owners, answers, strict=True):
        assert isinstance(answer, Exception) == (owner is lost)


async def test_a_training_chunk_is_refused_whole_by_half_a_slot(
    cluster: Cluster, rng: np.random.Generator
) -> None:
    """With the record moved and the tape index not, a second index would begin beside the first."""
    replica = await start_replica(cluster.url, Limits())
    await replica.models.create(
        "t",
        ModelSpec("m", TanhNetwork(INPUTS, 4), "float32", SGD(lr=0.1)),
        InitialWeights(),
        request_id="",
    )
    name = uuid.uuid4().hex
    opened = await open_on(replica, "t", name)
    client = Client([replica], "t", name, opened.session.epoch)
    await client.forward(draw(rng), train=True)
    tag = keys.session_tag(SessionKey("t", name))
    slot = cluster.slot(tag)
    source, target = cluster.owner(slot), other(cluster, slot)
    move = cluster.move_slot(slot, target)
    assert next(move) == "open"
    source.ask("MIGRATE", "127.0.0.1", target.port, keys.record_key(tag), 0, 5000)
    xs = draw(rng)
    assert (await refusal(client.forward(xs, train=True))).reason == "STORE_DOWN"
    # The tape may lie there, but only under its first name, and it will expire.
    assert keys.tape_index_key(tag) not in target.ask("CLUSTER", "GETKEYSINSLOT", slot, 10)
    assert list(itertools.islice(move, 9))[-1] == "moved"
    assert (await client.forward(xs, train=True)).chunk_seq == 2
    for chunk_seq in (1, 2):
        await client.backward(draw(rng, size=4), chunk_seq)
    await replica.close()


class Bounded:
    """Bounds what a tenant keeps in all."""

    def of(self, tenant: str) -> TenantLimits:  # noqa: ARG002 - the same for everyone
        """Return the quotas: two tapes, whose inputs alone need 72 bytes each, and one gradient."""
        return replace(
            TenantLimits.from_limits(Limits()),
            tape_bytes_per_tenant=400,
            contribution_bytes_per_tenant=200,
        )


async def test_a_tenants_bytes_are_counted_over_all_masters(
    cluster: Cluster, rng: np.random.Generator
) -> None:
    """Its sessions and models are in many slots, and its sums in one."""
    replica = await start_replica(cluster.url, Limits(), policy=Bounded())
    tenant = uuid.uuid4().hex
    clients = []
    for name in ("a", "b", "c"):
        spec = ModelSpec(name, TanhNetwork(INPUTS, 4), "float32", SGD(lr=0.1))
        await replica.models.create(tenant, spec, InitialWeights(), request_id="")
        opened = await open_on(replica, tenant, name, name)
        clients.append(Client([replica], tenant, name, opened.session.epoch))
    assert len({cluster.slot(keys.session_tag(SessionKey(tenant, name))) for name in "abc"}) == 3
    first, second, third = clients
    for client in (first, second):
        await client.forward(draw(rng), train=True)
    assert (await refusal(third.forward(draw(rng), train=True))).reason == "TAPE_QUOTA"
    await first.backward(draw(rng, size=4))
    assert (await refusal(second.backward(draw(rng, size=4)))).reason == "TAPE_QUOTA"
    await third.forward(draw(rng), train=True)
    await first.update("a", "r")
    await second.backward(draw(rng, size=4))
    await replica.close()


async def test_a_frozen_master_holds_up_none_of_the_others(
    cluster: Cluster, rng: np.random.Generator
) -> None:
    """Chunks of sessions elsewhere are answered while one of a frozen master still waits for it."""
    replica = await start_replica(cluster.url, Limits(), head_max_age_ms=600_000)
    tenant = uuid.uuid4().hex
    await replica.models.create(
        tenant,
        ModelSpec("m", TanhNetwork(INPUTS, 4), "float32", SGD()),
        InitialWeights(),
        request_id="",
    )
    clients: dict[str, list[Client]] = {}
    for k in range(24):
        opened = await open_on(replica, tenant, f"s{k}")
        client = Client([replica], tenant, f"s{k}", opened.session.epoch)
        await client.forward(draw(rng))
        owner = cluster.owner(cluster.slot(keys.session_tag(SessionKey(tenant, f"s{k}"))))
        clients.setdefault(owner.address, []).append(client)
    victim = cluster.masters[0]
    frozen = clients.pop(victim.address)
    healthy = [client for some in clients.values() for client in some]
    victim.pause()
    try:
        stuck = [asyncio.create_task(client.forward(draw(rng))) for client in frozen]
        for _ in range(3):
            await asyncio.gather(*(client.forward(draw(rng)) for client in healthy))
        assert not any(task.done() for task in stuck)
    finally:
        victim.resume()
    for done in await asyncio.gather(*stuck):
        assert done.chunk_seq == 2
    await replica.close()
