"""A store that refuses: what it did not run was not done, what broke off in it may have been."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
import redis
from redis.asyncio import Redis

from instruments.replicas import Client, draw, open_on, refusal, start_replica
from rnn_engine import Adam, TanhNetwork
from service.domain.types import InitialWeights, ModelSpec, NewEpoch, OnExists, SessionKey
from service.settings import MIB, Limits
from service.store import keys
from service.store.embedded import EmbeddedStore
from service.store.scripts import load_script
from tests.store.test_runner import started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from instruments.replicas import Replica

RESET = NewEpoch("s", None, 0, None, "", 0)


@pytest_asyncio.fixture
async def own(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    """A server of the test's own, to be broken."""
    store = EmbeddedStore(tmp_path / "own", durable=False)
    await asyncio.to_thread(store.start)
    yield store
    await asyncio.to_thread(store.stop)


@pytest_asyncio.fixture
async def raw(own: EmbeddedStore) -> AsyncIterator[Redis]:
    """A plain connection to it."""
    async with Redis.from_url(own.url) as client:
        yield client


@pytest_asyncio.fixture
async def pair(own: EmbeddedStore) -> AsyncIterator[tuple[Replica, Replica, Client]]:
    """Two replicas with a model and a session, and a client that takes them in turn."""
    one, client = await started(own.url)
    two = await start_replica(own.url, Limits())
    client.replicas = [one, two]
    yield one, two, client
    await one.close()
    await two.close()


async def leave_room(raw: Redis, size: int) -> None:
    """Let the store be full after so many more bytes."""
    used = (await raw.info("memory"))["used_memory"]
    await raw.config_set("maxmemory", used + size)


@pytest.mark.parametrize("setting", ["maxmemory", "min-replicas-to-write"])
async def test_a_replica_with_an_older_state_replays_where_nothing_can_be_written(
    pair: tuple[Replica, Replica, Client], raw: Redis, rng: np.random.Generator, setting: str
) -> None:
    """A chunk that another replica applied is answered; what is late or skips a number is refused."""
    one, two, client = pair
    for _ in range(2):
        await client.forward(draw(rng))
    xs = draw(rng)
    behind = two if client.next_replica is one else one
    ahead = one if behind is two else two
    chunk = client.chunk(xs)
    first = await ahead.recurrence.forward("t", chunk)
    await raw.config_set(setting, 1)
    again = await behind.recurrence.forward("t", chunk)
    assert again.replayed
    np.testing.assert_array_equal(again.state, first.state)
    late = client.chunk(draw(rng))
    assert (await refusal(behind.recurrence.forward("t", late))).reason == "SEQ_REUSED"
    hole = client.chunk(xs, chunk_seq=5, previous_token=b"")
    assert (await refusal(behind.recurrence.forward("t", hole))).reason == "SEQ_GAP"
    after = client.chunk(draw(rng), chunk_seq=4, previous_token=first.token)
    refused = await refusal(behind.recurrence.forward("t", after))
    assert refused.reason == {"maxmemory": "STORE_FULL"}.get(setting, "STORE_DOWN")


async def test_another_layout_is_reported_where_nothing_can_be_written(
    pair: tuple[Replica, Replica, Client], raw: Redis, rng: np.random.Generator
) -> None:
    """That the store is full is not what keeps the chunk from being applied."""
    _, two, client = pair
    client.replicas = [two]
    await client.forward(draw(rng))
    await raw.setrange(keys.session_tag(SessionKey("t", "s")), 0, b"\x4d")
    await raw.config_set("maxmemory", 1)
    assert (await refusal(client.forward(draw(rng)))).reason == "UNSUPPORTED_LAYOUT"
    assert (await refusal(two.sessions.begin_epoch("t", RESET))).reason == "UNSUPPORTED_LAYOUT"


async def test_each_chunk_of_a_refused_call_gets_its_own_answer(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator
) -> None:
    """Committed together on a full store, one is a replay and one has no room."""
    one, client = await started(own.url)
    two = await start_replica(own.url, Limits(), head_max_age_ms=60_000)
    other = Client([two], "t", "other", (await open_on(two, "t", "other")).session.epoch)
    client.replicas = [two]
    for each in (client, other):
        await each.forward(draw(rng))
    applied = client.chunk(draw(rng))
    await one.recurrence.forward("t", applied)
    await raw.config_set("maxmemory", 1)
    replay, refused = await asyncio.gather(
        two.recurrence.forward("t", applied),
        two.recurrence.forward("t", other.chunk(draw(rng))),
        return_exceptions=True,
    )
    assert not isinstance(replay, BaseException)
    assert replay.replayed
    assert getattr(refused, "reason", "") == "STORE_FULL"
    await one.close()
    await two.close()


async def test_a_fenced_writer_is_refused_on_a_full_store(
    pair: tuple[Replica, Replica, Client], raw: Redis, rng: np.random.Generator
) -> None:
    """The replica that has its old state at hand says EPOCH_FENCED; after a close SESSION_CLOSED."""
    one, two, client = pair
    client.replicas = [two]
    await client.forward(draw(rng))
    await one.sessions.begin_epoch("t", RESET)
    await raw.config_set("maxmemory", 1)
    assert (await refusal(client.forward(draw(rng)))).reason == "EPOCH_FENCED"
    await one.sessions.close(SessionKey("t", "s"), 0)
    assert (await refusal(client.forward(draw(rng)))).reason == "SESSION_CLOSED"


async def test_a_tape_that_finds_no_room_is_refused_at_once(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator
) -> None:
    """The value is refused and the script after it finds nothing: STORE_FULL; with room it works."""
    replica = await start_replica(own.url, Limits())
    await replica.models.create(
        "t", ModelSpec("m", TanhNetwork(512, 4), "float32", Adam()), InitialWeights(), request_id=""
    )
    opened = await open_on(replica, "t")
    client = Client([replica], "t", "s", opened.session.epoch)
    await leave_room(raw, MIB)
    xs = draw(rng, steps=1024, size=512)
    assert (await refusal(client.forward(xs, train=True))).reason == "STORE_FULL"
    await raw.config_set("maxmemory", 0)
    assert (await client.forward(xs, train=True)).chunk_seq == 1
    await replica.close()


async def test_a_version_that_finds_no_room_is_refused_at_once(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator
) -> None:
    """The same of a step; with room the same call makes it."""
    replica = await start_replica(own.url, Limits())
    await replica.models.create(
        "t", ModelSpec("m", TanhNetwork(3, 400), "float32", Adam()), InitialWeights(), request_id=""
    )
    opened = await open_on(replica, "t")
    client = Client([replica], "t", "s", opened.session.epoch)
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=400))
    await leave_room(raw, MIB)
    refused = await refusal(client.update("m", "u"))
    assert (refused.reason, refused.message) == (
        "STORE_FULL",
        "the store is full; nothing was changed",
    )
    await raw.config_set("maxmemory", 0)
    done = await client.update("m", "u")
    assert (done.version.number, done.replayed) == (2, False)
    await replica.close()


async def test_an_error_inside_a_script_leaves_every_chunk_of_the_call_open(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator
) -> None:
    """Broken off after the first write, both chunks are UNKNOWN_OUTCOME; sent again they are done once."""
    replica, client = await started(own.url)
    replica.caches.models._max_age_s = 60.0
    other = Client([replica], "t", "other", (await open_on(replica, "t", "other")).session.epoch)
    for each in (client, other):
        await each.forward(draw(rng))
    chunks = [each.chunk(draw(rng)) for each in (client, other)]
    await raw.execute_command("ACL", "SETUSER", "default", "-pexpire")
    outcomes = await asyncio.gather(
        *(replica.recurrence.forward("t", chunk) for chunk in chunks), return_exceptions=True
    )
    assert [getattr(one, "reason", one) for one in outcomes] == ["UNKNOWN_OUTCOME"] * 2
    await raw.execute_command("ACL", "SETUSER", "default", "+pexpire")
    done = [await replica.recurrence.forward("t", chunk) for chunk in chunks]
    assert [one.replayed for one in done] == [True, False]
    await replica.close()


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (
            ("CONFIG", "SET", "min-replicas-to-write", 1),
            ("CONFIG", "SET", "min-replicas-to-write", 0),
        ),
        (("ACL", "SETUSER", "default", "-evalsha"), ("ACL", "SETUSER", "default", "+evalsha")),
        (("REPLICAOF", "127.0.0.1", 1), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["NOREPLICAS", "NOPERM", "READONLY"],
)
async def test_what_was_refused_before_it_ran_is_known_not_to_be_applied(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator, refuse: Any, allow: Any
) -> None:
    """STORE_DOWN, not UNKNOWN_OUTCOME; other content may take the number afterwards."""
    replica, client = await started(own.url)
    replica.caches.models._max_age_s = 60.0
    await client.forward(draw(rng))
    await raw.execute_command(*refuse)
    assert (await refusal(client.forward(draw(rng)))).reason == "STORE_DOWN"
    await raw.execute_command(*allow)
    done = await client.forward(draw(rng))
    assert (done.chunk_seq, done.replayed) == (2, False)
    await replica.close()


async def test_what_was_lost_once_is_not_made_known_by_a_refusal(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator
) -> None:
    """The first answer is lost, the second try finds the store full: the step may have been made."""
    replica, client = await started(own.url)
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=4))
    link: Any = replica.store._client
    round_trip = link.round_trip

    async def lose_a_publication(commands: Any, *options: Any) -> Any:
        answers = await round_trip(commands, *options)
        if any(answer == [b"PUBLISHED"] for answer in answers):
            await raw.config_set("maxmemory", 1)
            raise redis.ConnectionError("the reply was lost")
        return answers

    link.round_trip = lose_a_publication
    assert (await refusal(client.update("m", "u"))).reason == "UNKNOWN_OUTCOME"
    assert (await client.update("m", "u")).replayed
    await replica.close()


def refuse_the_list(replica: Replica, raw: Redis) -> None:
    """Let the store be full whenever a replica updates a tenant's list of sessions."""
    link: Any = replica.store._client
    round_trip, sha = link.round_trip, load_script("reserve_session").sha

    async def refuse(commands: Any, *options: Any) -> Any:
        is_list = any(sha in command for command in commands)
        await raw.config_set("maxmemory", int(is_list))
        try:
            return await round_trip(commands, *options)
        finally:
            await raw.config_set("maxmemory", 0)

    link.round_trip = refuse


async def listed(replica: Replica) -> list[str]:
    """Name the sessions on the tenant's list."""
    await replica.recurrence.drain()
    views, _ = await replica.sessions.list_page("t", 10, "", model_id="")
    return sorted(view.session_id for view in views)


async def test_an_epoch_that_began_is_reported_though_the_list_could_not_be_updated(
    own: EmbeddedStore, raw: Redis, rng: np.random.Generator
) -> None:
    """set_state is answered; the next chunk brings the list up to date, above the quota too."""
    replica = await start_replica(own.url, Limits(sessions_per_tenant=1))
    await replica.models.create(
        "t", ModelSpec("m", TanhNetwork(3, 4), "float32", Adam()), InitialWeights(), request_id=""
    )
    await open_on(replica, "t")
    await raw.delete(keys.tenant_sessions_key("t"))
    refuse_the_list(replica, raw)
    view, _ = await replica.sessions.begin_epoch("t", RESET)
    assert await listed(replica) == []
    link: Any = replica.store._client
    del link.round_trip
    await open_on(replica, "t", "other")
    client = Client([replica], "t", "s", view.epoch)
    assert (await client.forward(draw(rng))).chunk_seq == 1
    assert await listed(replica) == ["other", "s"]
    await replica.close()


async def test_a_longer_ttl_is_written_to_the_list_by_any_replicas_next_chunk(
    pair: tuple[Replica, Replica, Client], raw: Redis, rng: np.random.Generator
) -> None:
    """Opened with RESET and another ttl where the list takes nothing; another replica's chunk updates the list."""
    one, two, _ = pair
    refuse_the_list(one, raw)
    opened = await open_on(one, "t", on_exists=OnExists.RESET, ttl_ms=7_200_000)
    before = await raw.zscore(keys.tenant_sessions_key("t"), "s")
    await Client([two], "t", "s", opened.session.epoch).forward(draw(rng))
    await two.recurrence.drain()
    after = await raw.zscore(keys.tenant_sessions_key("t"), "s")
    assert before is not None
    assert after is not None
    assert after - before > 3_600_000


async def test_a_live_session_is_resumed_and_a_lost_answer_asked_for_on_a_full_store(
    pair: tuple[Replica, Replica, Client], raw: Redis
) -> None:
    """Open with RESUME, and one that is sent again, need no room; a new session has none."""
    one, two, _ = pair
    again = {"session_id": "again", "request_id": "r"}
    first = await open_on(one, "t", **again)
    await raw.config_set("maxmemory", 1)
    resumed = await open_on(two, "t", on_exists=OnExists.RESUME)
    assert resumed.resumed
    replayed = await open_on(two, "t", **again)
    assert (replayed.replayed, replayed.session.epoch) == (True, first.session.epoch)
    assert (await refusal(open_on(two, "t", "fresh"))).reason == "STORE_FULL"
    assert (await refusal(open_on(two, "t"))).reason == "SESSION_EXISTS"
