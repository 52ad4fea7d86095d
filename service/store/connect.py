"""Opens the store that a URL names and checks that it can be relied on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors

from service.store.cluster import ClusterRouter
from service.store.failures import as_domain_error
from service.store.links import StoreClient
from service.store.models import RedisModelStore
from service.store.scripts import ScriptRunner
from service.store.sessions import RedisSessionStore
from service.store.urls import OneMasterPool, connect

if TYPE_CHECKING:
    from service.settings import Settings


class UnfitStoreError(Exception):
    """The store answers but must not be used as it is set up."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open store with its two ports."""

    sessions: RedisSessionStore
    models: RedisModelStore
    _client: StoreClient | ClusterRouter
    _needs_replica: bool = False

    async def check(self) -> None:
        """Make sure that every primary takes writes and evicts nothing.

        Raises:
            UnfitStoreError: If it may drop sessions by itself, or refuses to write.
            Unavailable: If it cannot be reached.
        """
        try:
            infos = await self._primaries()
        except (redis_errors.RedisError, OSError) as error:
            raise as_domain_error(error) from error
        for info in infos:
            _check_primary(info)
            if self._needs_replica and not info.get("connected_slaves"):
                raise UnfitStoreError("durability is 'replica' and no replica is connected")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _primaries(self) -> list[dict[str, Any]]:
        """Read what each primary tells of its memory, its role and its file."""
        client = self._client
        sections = ("memory", "replication", "persistence")
        if isinstance(client, StoreClient) and isinstance(client.connection_pool, OneMasterPool):
            await client.connection_pool.follow()
        nodes = await client.primaries() if isinstance(client, ClusterRouter) else [client]
        return [await node.info(*sections) for node in nodes]


async def open_store(url: str, settings: Settings) -> Store:
    """Open the store that a URL names, as service.store.addresses tells; nothing is sent yet.

    Raises:
        ValueError: If the URL has another form, or the durability cannot be had with it.
    """
    client = connect(url, settings)
    if settings.durability == "replica" and isinstance(client, ClusterRouter):
        raise ValueError("durability 'replica' needs one server or Sentinel, not a cluster")
    runner = ScriptRunner(
        client,
        connections=settings.store_connections,
        patience_s=settings.store_timeout_ms / 1000,
        wait_replicas=int(settings.durability == "replica"),
        wait_ms=settings.durability_timeout_ms,
    )
    return Store(
        RedisSessionStore(runner, settings.limits),
        RedisModelStore(runner, settings.limits),
        client,
        settings.durability == "replica",
    )


def _check_primary(info: dict[str, Any]) -> None:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        text = f"maxmemory-policy is {policy}: sessions would be lost silently; set noeviction"
        raise UnfitStoreError(text)
    if info.get("role") != "master":
        raise UnfitStoreError("the server is a read-only replica; name the master")
    # Told only where min-replicas-to-write asks for some.
    if info.get("min_slaves_good_slaves", 1) == 0:
        raise UnfitStoreError("min-replicas-to-write asks for a replica and none keeps up")
    if info.get("aof_last_write_status", "ok") != "ok":
        raise UnfitStoreError("its append-only file cannot be written: look at its disk")
