"""How scripts are sent: forgotten ones, lost replies, a store that is full or gone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import pytest_asyncio
import redis
from redis.asyncio import Redis

from instruments.replicas import Client, draw, open_on, refusal, start_replica
from recorder import Recorder
from rnn_engine import SGD, TanhNetwork
from service.domain.errors import Unavailable
from service.domain.types import InitialWeights, ModelKey, ModelSpec, SessionKey
from service.settings import Limits, Settings
from service.store.connect import UnfitStoreError, open_store
from service.store.embedded import EmbeddedStore
from service.store.scripts import ScriptCall, ScriptRunner, load_script
from service.store.urls import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from instruments.replicas import Replica

SPEC = ModelSpec("m", TanhNetwork(3, 4), "float32", SGD(lr=0.1))


@pytest_asyncio.fixture
async def own(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    """A server of the test's own, to be broken."""
    store = EmbeddedStore(tmp_path / "own", durable=False)
    await asyncio.to_thread(store.start)
    yield store
    await asyncio.to_thread(store.stop)


async def started(url: str) -> tuple[Replica, Client]:
    """Start a replica with a model and a session in a store."""
    replica = await start_replica(url, Limits())
    await replica.models.create("t", SPEC, InitialWeights(), request_id="")
    opened = await open_on(replica, "t")
    return replica, Client([replica], "t", "s", opened.session.epoch)


async def test_a_forgotten_script_is_sent_with_its_text(
    own: EmbeddedStore, rng: np.random.Generator
) -> None:
    """After SCRIPT FLUSH, between any two calls, no caller gets an error."""
    replica, client = await started(own.url)
    async with Redis.from_url(own.url) as raw:
        for k in range(1, 4):
            await raw.script_flush()
            await client.forward(draw(rng), train=True)
            await raw.script_flush()
            await client.backward(draw(rng, size=4))
            await raw.script_flush()
            await client.update("m", f"u{k}")
    await replica.close()


class LosesReplies:
    """Stands before a client: carries the first round trips out, then says that the link broke."""

    def __init__(self, client: Any, count: int) -> None:
        self.round_trip, self.left = client.round_trip, count

    async def __call__(self, *asked: object) -> Any:
        """Make a round trip whose answers may be lost."""
        answers = await self.round_trip(*asked)
        if self.left:
            self.left -= 1
            raise redis.ConnectionError("the reply was lost")
        return answers


async def test_a_lost_reply_is_asked_for_once_more(
    store_url: str, tenant: str, rng: np.random.Generator
) -> None:
    """One lost reply of a commit ends in its answer, two in UNKNOWN_OUTCOME; one chunk either way."""
    replica = await start_replica(store_url, Limits(), head_max_age_ms=60_000)
    await replica.models.create(tenant, SPEC, InitialWeights(), request_id="")
    opened = await open_on(replica, tenant)
    client = Client([replica], tenant, "s", opened.session.epoch)
    await client.forward(draw(rng))
    link: Any = replica.store._client
    for lost in (1, 2):
        xs = draw(rng)
        link.round_trip = LosesReplies(link, lost)
        if lost == 2:
            assert (await refusal(client.forward(xs))).reason == "UNKNOWN_OUTCOME"
        done = await client.forward(xs)
        assert (done.replayed, done.chunk_seq) == (True, lost + 1)
        del link.round_trip
    await replica.close()


async def test_a_store_that_is_gone_is_unavailable_at_once(
    own: EmbeddedStore, rng: np.random.Generator
) -> None:
    """Every call is refused with a time to try again; none hangs; when the store is back the same call works."""
    replica, client = await started(own.url)
    await client.forward(draw(rng))
    await asyncio.to_thread(own.stop)
    for call in (client.forward(draw(rng)), replica.sessions.get(SessionKey("t", "s"))):
        refused = await refusal(call)
        assert refused.reason in ("STORE_DOWN", "UNKNOWN_OUTCOME")
        assert refused.retry_after_s is not None
        assert "redis" not in refused.message.lower()
    await replica.close()


async def test_a_full_store_changes_nothing_and_still_answers(
    own: EmbeddedStore, rng: np.random.Generator
) -> None:
    """Writes are STORE_FULL as a whole; reads, replays and Close work; with room all goes on."""
    replica, client = await started(own.url)
    xs = draw(rng)
    first = await client.forward(xs, train=True)
    async with Redis.from_url(own.url) as raw:
        before = {key: await raw.dump(key) async for key in raw.scan_iter()}
        await raw.config_set("maxmemory", 1)
        for call in (
            client.forward(draw(rng)),
            client.forward(draw(rng), train=True),
            open_on(replica, "t", "other"),
            client.backward(draw(rng, size=4)),
            replica.models.create_checkpoint(ModelKey("t", "m"), "c", None),
        ):
            assert (await refusal(call)).reason == "STORE_FULL"
        again = await client.forward(xs, chunk_seq=1, previous_token=b"", train=True)
        np.testing.assert_array_equal(again.state, first.state)
        assert (await replica.sessions.get(SessionKey("t", "s"))).chunk_seq == 1
        assert {key: await raw.dump(key) async for key in raw.scan_iter()} == before
        assert await replica.sessions.close(SessionKey("t", "s"), 0)
        await raw.config_set("maxmemory", 0)
    await open_on(replica, "t", "other")
    await replica.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_an_evicting_store_is_refused(own: EmbeddedStore, policy: str) -> None:
    """A store that may drop sessions by itself is refused before it is used."""
    async with Redis.from_url(own.url) as raw:
        await raw.config_set("maxmemory-policy", policy)
    store = await open_store(own.url, Settings())
    with pytest.raises(UnfitStoreError, match="noeviction"):
        await store.check()
    await store.close()


async def test_a_script_that_fails_does_not_take_its_neighbours(
    store_url: str, tenant: str
) -> None:
    """Scripts of one round trip fail one by one; an error midway leaves open what was done."""
    async with Redis.from_url(store_url, protocol=3) as raw:
        await raw.set(tenant, "text")
        client = connect(store_url, Settings())
        runner = ScriptRunner(client)
        script = load_script("reserve_model")
        good, bad = (
            ScriptCall(script, (key,), ("m", 10))
            for key in (f"{tenant}x".encode(), tenant.encode())
        )
        first, failed, last = [ran.answer for ran in await runner.run_many([good, bad, good])]
        assert (first, last) == (b"OK", b"OK")
        assert failed.reason == "UNKNOWN_OUTCOME"
        await client.aclose()


async def test_each_round_trip_is_reported_with_its_name_and_bytes(
    store_url: str, tenant: str
) -> None:
    """By its script, else by its first command; the bytes are those on the wire and of the values."""
    recorder = Recorder()
    client = connect(store_url, Settings(), recorder)
    runner = ScriptRunner(client)
    await runner.run(ScriptCall(load_script("reserve_model"), (tenant.encode(),), ("m", 10)))
    await runner.run_commands([("SET", f"{tenant}k", b"v" * 100_000), ("GET", f"{tenant}k")])
    last = recorder.seen["round_trip_ended"][-1]
    assert (last["name"], last["commands"], last["is_lost"]) == ("SET", 2, False)
    assert 100_000 < last["sent_bytes"] < 101_000
    assert last["received_bytes"] == 100_000 + len(b"OK")
    assert recorder.seen["round_trip_ended"][0]["name"] == "reserve_model"
    await client.aclose()


async def test_a_round_trip_without_an_answer_is_reported_as_lost(own: EmbeddedStore) -> None:
    """Each try is reported: the first, and the one over another connection."""
    recorder = Recorder()
    client = connect(own.url, Settings(), recorder)
    await asyncio.to_thread(own.stop)
    with pytest.raises(Unavailable):
        await ScriptRunner(client).run_commands([("GET", "k")])
    lost = [(trip["name"], trip["is_lost"]) for trip in recorder.seen["round_trip_ended"]]
    assert set(lost) == {("GET", True)}
    await client.aclose()


async def test_a_script_that_was_carried_out_is_reported_as_such(
    store_url: str, tenant: str
) -> None:
    """Also when what was sent right before it failed: it may have applied others' chunks."""
    client: Any = connect(store_url, Settings())
    key, refused = f"{tenant}z".encode(), ("NO-SUCH-COMMAND",)
    call = ScriptCall(load_script("reserve_model"), (key,), ("m", 10), [refused])
    assert await ScriptRunner(client).run(call) == b"OK"
    await client.aclose()


async def test_a_silent_store_is_asked_once() -> None:
    """A call is refused because the store hangs after one timeout, not after one more each resend."""
    tries = 0

    class Silent:
        async def round_trip(self, *_asked: object) -> list[Any]:
            nonlocal tries
            tries += 1
            raise redis.TimeoutError("nothing came in time")

    runner = ScriptRunner(cast("Any", Silent()))
    (ran,) = await runner.run_many([ScriptCall(load_script("read_session"), [b"k", b"e"], [0])])
    assert isinstance(ran.answer, Unavailable)
    with pytest.raises(Unavailable):
        await runner.run_commands([("GET", "k")])
    assert tries == 2


async def test_a_store_that_misses_its_replicas_is_refused(own: EmbeddedStore) -> None:
    """It is the primary and has room, yet it would refuse every write: health has to say so."""
    store = await open_store(own.url, Settings())
    await store.check()
    async with Redis.from_url(own.url) as raw:
        await raw.config_set("min-replicas-to-write", 1)
    with pytest.raises(UnfitStoreError, match="min-replicas-to-write"):
        await store.check()
    await store.close()


async def test_a_durability_that_cannot_be_had_is_refused(own: EmbeddedStore) -> None:
    """Without any replica each answer would be UNKNOWN_OUTCOME."""
    store = await open_store(own.url, Settings(durability="replica"))
    with pytest.raises(UnfitStoreError, match="no replica"):
        await store.check()
    await store.close()
