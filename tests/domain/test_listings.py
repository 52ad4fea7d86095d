"""Entries of a tenant's lists: what is refused leaves none, what lives keeps its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from instruments.replicas import HIDDEN, INPUTS, ROWS, open_on, refusal
from rnn_engine import SGD, TanhNetwork
from service.domain.types import ForkSession, InitialWeights, ModelSpec, OnExists, SessionKey
from service.settings import DAY_MS, HOUR_MS, Limits
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from redis.asyncio import Redis

    from instruments.replicas import Replica
    from tests.domain.conftest import ModelMaker, ReplicaMaker

    Pair = tuple[Replica, Replica]

WEEK_MS = 7 * DAY_MS


async def listed_end(raw: Redis, tenant: str, session_id: str) -> float | None:
    """Return the end that the tenant's list gives a session, in ms."""
    end: float | None = await raw.zscore(keys.tenant_sessions_key(tenant), session_id)
    return end


async def fail(replica: Replica, tenant: str) -> None:
    """Open a live session with FAIL."""
    await open_on(replica, tenant, "live", ttl_ms=WEEK_MS)


async def resume_as_another(replica: Replica, tenant: str) -> None:
    """Resume a live session with another batch size."""
    options: dict[str, Any] = {"on_exists": OnExists.RESUME, "batch_size": ROWS + 1}
    await open_on(replica, tenant, "live", ttl_ms=WEEK_MS, **options)


async def reuse_a_request(replica: Replica, tenant: str) -> None:
    """Reset a live session under the request id that opened it with other content."""
    options: dict[str, Any] = {
        "on_exists": OnExists.RESET,
        "request_id": "r",
        "batch_size": ROWS + 1,
    }
    await open_on(replica, tenant, "live", ttl_ms=WEEK_MS, **options)


async def restore_the_past(replica: Replica, tenant: str) -> None:
    """Begin again an epoch from before the present one."""
    options: dict[str, Any] = {"on_exists": OnExists.RESET, "restored_epoch": 1}
    await open_on(replica, tenant, "live", ttl_ms=WEEK_MS, **options)


async def fork_onto_a_live_one(replica: Replica, tenant: str) -> None:
    """Fork under a name that is taken."""
    await replica.sessions.fork(tenant, ForkSession("source", "live", WEEK_MS, ""))


@pytest.mark.parametrize(
    "refused",
    [fail, resume_as_another, reuse_a_request, restore_the_past, fork_onto_a_live_one],
    ids=lambda one: one.__name__,
)
async def test_a_refused_open_leaves_a_live_session_its_own_entry(
    replicas: Pair,
    tenant: str,
    raw: Redis,
    make_model: ModelMaker,
    refused: Callable[[Replica, str], Awaitable[None]],
) -> None:
    """An hour's session asked for with a week is listed for an hour, whatever the refusal."""
    await make_model()
    for name in ("live", "source"):
        opened = await open_on(replicas[0], tenant, name, ttl_ms=HOUR_MS, request_id="r")
    await refusal(refused(replicas[1], tenant))
    end = await listed_end(raw, tenant, "live")
    assert end is not None
    assert abs(end - opened.session.expire_time_ms - HOUR_MS / 4) < HOUR_MS / 8


async def test_refused_opens_of_free_names_are_not_listed(
    make_replica: ReplicaMaker, replicas: Pair, tenant: str, raw: Redis, make_model: ModelMaker
) -> None:
    """Any number of epochs that cannot be restored leave the quota to who is let in."""
    await make_model()
    small = await make_replica(Limits(sessions_per_tenant=2))
    seconds, _ = await raw.time()
    for i in range(5):
        ahead = seconds * 1000 + 2 * DAY_MS
        opening = open_on(small, tenant, f"wild{i}", ttl_ms=WEEK_MS, restored_epoch=ahead)
        assert (await refusal(opening)).reason == "EPOCH_FENCED"
    for name in ("a", "b"):
        await open_on(small, tenant, name)
    assert (await refusal(open_on(small, tenant, "c"))).reason == "MAX_SESSIONS"


@pytest.mark.parametrize("moment", ["begin_epoch", "read_session", "release_listing"])
async def test_a_refused_open_does_not_take_the_entry_of_one_that_came_meanwhile(
    replicas: Pair,
    tenant: str,
    raw: Redis,
    make_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """Another replica opens the name at any moment of the refusal: it stays listed, to its own end."""
    await make_model()
    seconds, _ = await raw.time()
    store: Any = replicas[0].store.sessions
    original = getattr(type(store), moment)

    async def overtaken(self: Any, *arguments: Any) -> Any:
        monkeypatch.undo()
        await open_on(replicas[1], tenant, "s", ttl_ms=HOUR_MS)
        return await original(self, *arguments)

    monkeypatch.setattr(type(store), moment, overtaken)
    ahead = seconds * 1000 + 2 * DAY_MS
    await refusal(open_on(replicas[0], tenant, "s", ttl_ms=WEEK_MS, restored_epoch=ahead))
    end = await listed_end(raw, tenant, "s")
    assert end is not None
    assert end < (seconds + 2 * 3600) * 1000


@pytest.mark.parametrize("moment", ["find_listing", "read_session", "release_listing"])
@pytest.mark.parametrize("ttl_ms", [HOUR_MS // 2, HOUR_MS, WEEK_MS])
async def test_a_close_does_not_take_the_entry_of_one_opened_meanwhile(
    replicas: Pair,
    tenant: str,
    raw: Redis,
    make_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    ttl_ms: int,
) -> None:
    """Another replica opens the name once it is closed, before the close has ended: it stays listed."""
    await make_model()
    await open_on(replicas[0], tenant, "s", ttl_ms=HOUR_MS)
    store: Any = replicas[0].store.sessions
    original = getattr(type(store), moment)

    async def overtaken(self: Any, *arguments: Any) -> Any:
        monkeypatch.undo()
        await open_on(replicas[1], tenant, "s", ttl_ms=ttl_ms)
        return await original(self, *arguments)

    monkeypatch.setattr(type(store), moment, overtaken)
    assert await replicas[0].sessions.close(SessionKey(tenant, "s"), 0)
    assert await listed_end(raw, tenant, "s") is not None


async def test_a_close_takes_its_session_off_the_list(
    replicas: Pair, tenant: str, raw: Redis, make_model: ModelMaker
) -> None:
    """Also on a replica that did not open it, and once more is no error."""
    await make_model()
    await open_on(replicas[0], tenant, "s", ttl_ms=HOUR_MS)
    assert await replicas[1].sessions.close(SessionKey(tenant, "s"), 0)
    assert await listed_end(raw, tenant, "s") is None
    assert not await replicas[1].sessions.close(SessionKey(tenant, "s"), 0)


async def test_an_entry_that_was_released_too_early_is_made_again(
    replicas: Pair,
    tenant: str,
    raw: Redis,
    make_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that reserved the name before a refusal, and begins after it, is listed all the same."""
    await make_model()
    seconds, _ = await raw.time()
    store: Any = replicas[0].store.sessions
    original = type(store).begin_epoch

    async def late(self: Any, *arguments: Any) -> Any:
        monkeypatch.undo()
        ahead = seconds * 1000 + 2 * DAY_MS
        await refusal(open_on(replicas[1], tenant, "s", ttl_ms=WEEK_MS, restored_epoch=ahead))
        assert await listed_end(raw, tenant, "s") is None
        return await original(self, *arguments)

    monkeypatch.setattr(type(store), "begin_epoch", late)
    await open_on(replicas[0], tenant, "s", ttl_ms=HOUR_MS)
    assert await listed_end(raw, tenant, "s") is not None


async def test_an_open_that_nobody_waits_for_releases_its_entry(
    replicas: Pair,
    tenant: str,
    raw: Redis,
    make_model: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A caller that goes away midway does not keep the refusal from being carried to its end."""
    await make_model()
    await open_on(replicas[0], tenant, "s", ttl_ms=HOUR_MS)
    before = await listed_end(raw, tenant, "s")
    store: Any = replicas[0].store.sessions
    original, reached, settled = type(store).begin_epoch, asyncio.Event(), asyncio.Event()

    async def slow(self: Any, *arguments: Any) -> Any:
        reached.set()
        return await original(self, *arguments)

    release = type(store).release_listing

    async def watched(self: Any, *arguments: Any) -> Any:
        await release(self, *arguments)
        settled.set()

    monkeypatch.setattr(type(store), "begin_epoch", slow)
    monkeypatch.setattr(type(store), "release_listing", watched)
    opening = asyncio.create_task(open_on(replicas[0], tenant, "s", ttl_ms=WEEK_MS))
    await reached.wait()
    opening.cancel()
    await asyncio.wait_for(settled.wait(), 10)
    after = await listed_end(raw, tenant, "s")
    assert before is not None
    assert after is not None
    assert abs(after - before) < HOUR_MS / 8


@pytest.fixture
async def full(raw: Redis) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Let the store have no room until the test ends."""

    async def fill() -> None:
        await raw.config_set("maxmemory", 1)

    yield fill
    await raw.config_set("maxmemory", 0)


async def test_a_model_whose_weights_found_no_room_is_not_listed(
    make_replica: ReplicaMaker,
    tenant: str,
    raw: Redis,
    monkeypatch: pytest.MonkeyPatch,
    full: Callable[[], Awaitable[None]],
) -> None:
    """The store is full when a creation writes its weights: STORE_FULL, and the name is free again."""
    replica = await make_replica()
    store: Any = replica.store.models
    original = type(store)._write_parts

    async def fills_up(self: Any, *arguments: Any) -> Any:
        await full()
        return await original(self, *arguments)

    monkeypatch.setattr(type(store), "_write_parts", fills_up)
    spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
    refused = await refusal(
        replica.models.create(tenant, spec, InitialWeights(seed=1), request_id="")
    )
    assert refused.reason == "STORE_FULL"
    assert await raw.zcard(keys.tenant_models_key(tenant)) == 0
