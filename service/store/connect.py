"""Opens the store that a URL names and checks that it can be relied on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors

from service.domain.limits_policy import SameLimits
from service.store import keys
from service.store.addresses import parse_store_url
from service.store.cluster import ClusterRouter
from service.store.facts import facts_of
from service.store.failures import as_domain_error
from service.store.models import RedisModelStore
from service.store.permissions import commands_for, keys_for
from service.store.replicas import RedisReplicaStore
from service.store.scripts import ScriptRunner, load_script
from service.store.sessions import RedisSessionStore
from service.store.urls import OneMasterPool, connect
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from service.domain.limits_policy import LimitsPolicy
    from service.settings import Settings
    from service.store.addresses import StoreAddress
    from service.store.facts import StoreFacts
    from service.store.links import StoreClient
    from service.telemetry import Observer


CHECK_KEY_MS = 10_000
_MISSING_RIGHTS = load_script("missing_rights")


class UnfitStoreError(Exception):
    """The store answers, but its configuration makes it unusable."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open store with its three ports."""

    sessions: RedisSessionStore
    models: RedisModelStore
    replicas: RedisReplicaStore
    address: StoreAddress
    _client: StoreClient | ClusterRouter
    _needs_replica: bool = False
    _beats: bool = False

    @property
    def _key_patterns(self) -> tuple[str, ...]:
        return keys_for(waits=self._needs_replica, beats=self._beats)

    async def check(self) -> None:
        """Check that every primary accepts writes and never evicts; a full one passes.

        Each primary gets a small write, since no list of the reasons to refuse writes would be complete.

        Raises:
            UnfitStoreError: If it may evict sessions, or refuses to write.
            Unavailable: If it cannot be reached.
        """
        try:
            client = self._client
            if isinstance(client, ClusterRouter):
                nodes = await client.primaries(keys.check_key)
            else:
                nodes = [(client, keys.check_key(0))]
                if isinstance(client.connection_pool, OneMasterPool):
                    await client.connection_pool.follow()
            for node, key in nodes:
                await self._check_primary(node, key)
        except (redis_errors.RedisError, OSError) as error:
            raise as_domain_error(error) from error

    async def facts(self) -> list[StoreFacts]:
        """Return how each primary is configured and what it holds.

        Raises:
            Unavailable: If one cannot be reached.
        """
        try:
            client = self._client
            nodes = (
                [node for node, _ in await client.primaries(keys.check_key)]
                if isinstance(client, ClusterRouter)
                else [client]
            )
            return [await facts_of(node) for node in nodes]
        except (redis_errors.RedisError, OSError) as error:
            raise as_domain_error(error) from error

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _check_primary(self, node: StoreClient, key: bytes) -> None:
        """Check one primary: its configuration, the rights of its user, and a small write."""
        patterns = [pattern.replace("*", "check}") for pattern in self._key_patterns]
        commands = commands_for(self.address, waits=self._needs_replica)
        trip: Any = node.pipeline(transaction=False)
        trip.eval(_MISSING_RIGHTS.text, 0, len(patterns), *patterns, *commands)
        trip.info("memory", "replication", "persistence")
        trip.set(key, b"", px=CHECK_KEY_MS)
        trip.pexpire(key, CHECK_KEY_MS)  # needs no memory, so it is allowed on a full store as well
        missing, info, *written = await trip.execute(raise_on_error=False)
        _check_rights(missing)
        if isinstance(info, Exception):
            raise info
        _check_facts(info)
        _check_written(written)
        if self._needs_replica and not info.get("connected_slaves"):
            raise UnfitStoreError("durability is 'replica' and no replica is connected")


async def open_store(
    url: str,
    settings: Settings,
    observer: Observer = NULL_OBSERVER,
    *,
    policy: LimitsPolicy | None = None,
) -> Store:
    """Open the store of a URL (see service.store.addresses); nothing is sent yet.

    Args:
        url: The store's URL.
        settings: Connections, timeouts, durability, limits.
        observer: Is called with each round trip.
        policy: The quotas of each tenant; None for those of the settings.

    Raises:
        ValueError: If the URL is malformed, or the durability is not available with it.
    """
    client = connect(url, settings, observer)
    if settings.durability == "replica" and isinstance(client, ClusterRouter):
        raise ValueError("durability 'replica' needs one server or Sentinel, not a cluster")
    runner = ScriptRunner(
        client,
        connections=settings.store_connections,
        patience_s=settings.store_timeout_ms / 1000,
        wait_replicas=int(settings.durability == "replica"),
        wait_ms=settings.durability_timeout_ms,
    )
    policy = policy or SameLimits(settings.limits)
    return Store(
        RedisSessionStore(runner, settings.limits, policy),
        RedisModelStore(runner, settings.limits, policy),
        RedisReplicaStore(runner),
        parse_store_url(url),
        client,
        settings.durability == "replica",
        bool(settings.metrics_listen),
    )


def _check_rights(missing: list[bytes] | Exception) -> None:
    """Refuse a store whose user lacks rights; the message names the missing ones."""
    if isinstance(missing, redis_errors.NoPermissionError):
        names = "eval"
    elif isinstance(missing, Exception):
        raise missing
    else:
        names = ", ".join(name.decode() for name in missing)
    if names:
        text = f"its user may not use {names}: see what a user needs in docs/operations.md"
        raise UnfitStoreError(text)


def _check_written(answers: list[object]) -> None:
    """Take a write that was refused for want of memory for none: a full store still reads and closes."""
    for answer in answers:
        is_full = isinstance(answer, redis_errors.OutOfMemoryError)
        # The slot is being moved to another node, which is checked as well.
        is_moving = isinstance(answer, (redis_errors.AskError, redis_errors.TryAgainError))
        if isinstance(answer, redis_errors.ResponseError) and not (is_full or is_moving):
            raise UnfitStoreError(f"it refuses writes: {answer}")
        if isinstance(answer, Exception) and not (is_full or is_moving):
            raise answer


def _check_facts(info: dict[str, Any]) -> None:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        text = f"maxmemory-policy is {policy}: sessions would be lost silently; set noeviction"
        raise UnfitStoreError(text)
    if info.get("role") != "master":
        raise UnfitStoreError("the server is a read-only replica; name the master")
    # Present only where min-replicas-to-write is set.
    if info.get("min_slaves_good_slaves", 1) == 0:
        raise UnfitStoreError("min-replicas-to-write asks for a replica and none keeps up")
    if info.get("aof_last_write_status", "ok") != "ok":
        raise UnfitStoreError("its append-only file cannot be written: check its disk")
