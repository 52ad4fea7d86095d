"""Whether a store takes writes is found out by writing; a full store is not unfit."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from instruments.redis_servers import Cluster, RedisServer, SentinelGroup, snapshot_failing
from service.settings import Settings
from service.store.connect import UnfitStoreError, open_store
from service.store.permissions import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    Group = RedisServer | SentinelGroup | Cluster


@pytest.fixture(scope="module", params=["one server", "Sentinel", "Cluster"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    """A store of each kind."""
    if request.param == "one server":
        made: Group = RedisServer(append_only=False)
    else:
        made = SentinelGroup() if request.param == "Sentinel" else Cluster(with_replicas=False)
    with made:
        yield made


@pytest.fixture
def primary(group: Group) -> RedisServer:
    """A server that takes writes; of a cluster, one of several."""
    if isinstance(group, RedisServer):
        return group
    return group.master() if isinstance(group, SentinelGroup) else group.masters[-1]


@contextlib.contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """Let the server have no room for the block."""
    server.ask("CONFIG", "SET", "maxmemory", 1)
    try:
        yield
    finally:
        server.ask("CONFIG", "SET", "maxmemory", 0)


async def check(url: str) -> None:
    """Check a store once."""
    store = await open_store(url, Settings(store_timeout_ms=10_000))
    try:
        await store.check()
    finally:
        await store.close()


async def test_a_store_that_cannot_save_is_unfit_until_it_can(
    group: Group, primary: RedisServer
) -> None:
    """Its file is in order and it answers, but no write is taken."""
    with snapshot_failing(primary):
        with pytest.raises(UnfitStoreError, match="it refuses writes: MISCONF"):
            await check(group.url)
        with full(primary), pytest.raises(UnfitStoreError, match="it refuses writes: MISCONF"):
            await check(group.url)
    await check(group.url)


async def test_a_full_store_is_fit(group: Group, primary: RedisServer) -> None:
    """Reading, replaying and closing go on there."""
    with full(primary):
        await check(group.url)


async def test_what_is_written_goes_by_itself(group: Group, primary: RedisServer) -> None:
    """The key of a check expires; it is one, however often a store is checked."""
    for _ in range(3):
        await check(group.url)
    (key,) = primary.ask("KEYS", "t{check*")
    assert 0 < primary.ask("PTTL", key) <= 10_000


async def test_rights_that_are_missing_are_named(group: Group, primary: RedisServer) -> None:
    """Before a call needs them, commands and keys alike."""
    url = group.url.replace("://", "://app:s3cret@")
    allowed = [f"+{name}" for name in COMMANDS if name not in ("rename", "strlen")]
    servers = group.members if isinstance(group, (SentinelGroup, Cluster)) else [group]
    for server in servers:
        if isinstance(server, RedisServer):
            rights = (
                (*allowed, "+cluster|slots", "+asking") if isinstance(group, Cluster) else allowed
            )
            rules = ("on", ">s3cret", "-@all", "resetkeys", "~s{*", "~t{*", *rights)
            server.ask("ACL", "SETUSER", "app", *rules)
    with pytest.raises(UnfitStoreError, match=r"may not use m\{check\}, rename, strlen"):
        await check(url)
