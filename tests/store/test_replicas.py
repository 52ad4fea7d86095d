"""Heartbeats in a real store: who is listed, for how long, and what replicas share."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.store import keys, layouts
from service.store.replicas import BEAT_TTL_MS

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from service.domain.ports import ReplicaBeat
    from service.store.connect import Store

FIGURES = {"version": "1", "counts": {"chunks": 3}}


@pytest.fixture
def name() -> str:
    """A replica's name that no other test uses."""
    return uuid4().hex[:16]


async def listed(store: Store, name: str) -> ReplicaBeat | None:
    """Return a replica's last beat."""
    return next(
        (one for one in await store.replicas.list_replicas() if one.replica_id == name), None
    )


async def test_a_replica_is_listed_with_its_figures(opened: Store, name: str) -> None:
    """As it said them, and how long ago."""
    await opened.replicas.beat(name, FIGURES, b"secret")
    found = await listed(opened, name)
    assert found is not None
    assert found.figures == FIGURES
    assert 0 <= found.age_ms < BEAT_TTL_MS


async def test_a_replica_lapses_ten_seconds_after_its_last_beat(
    opened: Store, raw: Redis, name: str
) -> None:
    """Its record by itself; its name is no longer listed from then on, and dropped at another's beat."""
    await opened.replicas.beat(name, FIGURES, b"secret")
    assert 0 < await raw.pttl(keys.replica_prefix() + name.encode()) <= 10_000
    # As if so much time had passed.
    await raw.zincrby(keys.replicas_key(), -10_001, name)
    assert await listed(opened, name) is None
    await opened.replicas.beat(uuid4().hex[:16], FIGURES, b"secret")
    assert await raw.zscore(keys.replicas_key(), name) is None


async def test_a_beat_of_another_layout_is_listed_without_figures(
    opened: Store, raw: Redis, name: str
) -> None:
    """A newer release runs beside this one, and its record is left alone."""
    await opened.replicas.beat(name, FIGURES, b"secret")
    await raw.set(keys.replica_prefix() + name.encode(), b"\x02whatever", px=BEAT_TTL_MS)
    found = await listed(opened, name)
    assert found is not None
    assert found.figures is None


def test_the_layout_is_the_first_byte() -> None:
    """Then JSON."""
    assert layouts.beat_to_bytes({"a": 1}) == b'\x01{"a":1}'
    assert layouts.beat_from_bytes(b"") is None


async def test_all_replicas_get_the_first_secret(opened: Store, raw: Redis, name: str) -> None:
    """And after a loss of the store, the one that a replica still has."""
    await raw.unlink(keys.page_secret_key())
    assert await opened.replicas.beat(name, FIGURES, b"first") == b"first"
    assert await opened.replicas.beat(name, FIGURES, b"second") == b"first"
    await raw.unlink(keys.page_secret_key())
    assert await opened.replicas.beat(name, FIGURES, b"second") == b"second"


async def test_the_logins_of_a_token_end_with_any_of_them(
    opened: Store, raw: Redis, name: str
) -> None:
    """The same end again changes nothing, one of a later login does; after a login's time it is forgotten."""
    replicas = opened.replicas
    found = [await replicas.count_ended_logins(name)]
    for ended_before in (0, 0, 1, 0):
        await replicas.end_logins(name, ended_before, ttl_ms=60_000)
        found.append(await replicas.count_ended_logins(name))
    assert found == [0, 1, 1, 2, 2]
    assert await replicas.count_ended_logins("of another") == 0
    assert 0 < await raw.pttl(keys.ended_logins_key(name)) <= 60_000
