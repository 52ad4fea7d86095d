"""Opens the store that a URL names and checks that it can be relied on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.store.failures import as_domain_error
from service.store.models import RedisModelStore
from service.store.scripts import ScriptRunner
from service.store.sessions import RedisSessionStore

if TYPE_CHECKING:
    from service.settings import Settings


class UnfitStoreError(Exception):
    """The store answers but must not be used as it is set up."""


@dataclass(frozen=True, slots=True)
class Store:
    """An open store with its two ports."""

    sessions: RedisSessionStore
    models: RedisModelStore
    _client: Redis

    async def check(self) -> None:
        """Make sure that the store takes writes and evicts nothing.

        Raises:
            UnfitStoreError: If it may drop sessions by itself, or is a read-only replica.
            Unavailable: If it cannot be reached.
        """
        try:
            info = await self._client.info("memory")
            role = await self._client.info("replication")
        except (redis_errors.RedisError, OSError) as error:
            raise as_domain_error(error) from error
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            text = f"maxmemory-policy is {policy}: sessions would be lost silently; set noeviction"
            raise UnfitStoreError(text)
        if role.get("role") != "master":
            text = "the server is a read-only replica; name the master"
            raise UnfitStoreError(text)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()


async def open_store(url: str, settings: Settings) -> Store:
    """Open the store that `url` names: redis://, rediss:// or unix://.

    The client's own retries are off: a commit is sent again by its number, never blindly.

    Raises:
        ValueError: If the URL is none of these.
    """
    timeout_s = settings.store_timeout_ms / 1000
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=settings.store_connections,
        timeout=timeout_s,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=0,
        retry=Retry(NoBackoff(), 0),
        protocol=3,
    )
    client = Redis(connection_pool=pool)
    runner = ScriptRunner(client)
    return Store(
        RedisSessionStore(runner, settings.limits), RedisModelStore(runner, settings.limits), client
    )
