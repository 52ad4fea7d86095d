"""Makes the redis-py client for the URL of a store; service.store.addresses lists the forms of URLs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from service.store.addresses import join_host, parse_store_url
from service.store.cluster import ClusterRouter
from service.store.credentials import PasswordFile
from service.store.failures import why
from service.store.links import WITHOUT_NOTICES, StoreClient, watch_links
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from service.settings import Settings
    from service.store.addresses import StoreAddress
    from service.telemetry import Observer

_SPARE_CONNECTIONS = 4


class OneMasterPool(SentinelConnectionPool):
    """Connections to the master that Sentinel named last, and to no other.

    After a failover the old master may resume and serve its old connections for a while. If some
    connections led to the old master and some to the new one, one call could read what the next misses.
    """

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Take a connection from the pool; reconnect one that leads to an earlier master."""
        base: Any = super()
        connection = await base.get_connection(*args, **options)
        if self.master_address not in (None, (connection.host, connection.port)):
            try:
                await connection.disconnect()
                await connection.connect()
            except BaseException:
                await self.release(connection)
                raise
        return connection

    async def disconnect(self, inuse_connections: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's
        """Close connections; if those in use are closed too (the client ends), also those to sentinels."""
        pool: Any = self
        base: Any = super()
        await base.disconnect(inuse_connections)
        if inuse_connections:
            await pool.sentinel_manager.aclose()

    async def follow(self) -> None:
        """Ask the sentinels for the master; if none answers, the one named last stays."""
        pool: Any = self
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await pool.get_master_address()


class Sentinels(Sentinel):
    """Sentinels whose error message, if none names the master, is readable; redis-py's shows its objects."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the master's host and port.

        Raises:
            MasterNotFoundError: If no sentinel names a master that is up; the message has each one's answer.
        """
        manager: Any = self
        failures = []
        for sentinel in tuple(manager.sentinels):
            options = sentinel.connection_pool.connection_kwargs
            place = join_host(options["host"], options["port"])
            try:
                masters = await sentinel.sentinel_masters()
            except (redis_errors.RedisError, OSError) as error:
                failures.append(f"the sentinel at {place} does not answer: {why(error)}")
                continue
            state = masters.get(service_name)
            if state and manager.check_master_state(state, service_name):
                manager.sentinels.remove(sentinel)
                manager.sentinels.insert(0, sentinel)  # the first to be asked next time
                return state["ip"], state["port"]
            failures.append(f"the sentinel at {place} names no master {service_name!r} that is up")
        raise MasterNotFoundError("; ".join(failures))


def connect(
    url: str, settings: Settings, observer: Observer = NULL_OBSERVER
) -> StoreClient | ClusterRouter:
    """Make the client for the URL of a store; nothing is sent yet.

    redis-py's own retries are off: a commit may be sent again only where its number makes it idempotent.

    Args:
        url: The store's URL.
        settings: Connections and timeouts.
        observer: Is called with each round trip.

    Raises:
        ValueError: If the URL is malformed, or has a password although a file has it.
        PasswordFileError: If the file of the password cannot be used.
    """
    address = parse_store_url(url)
    if settings.redis_password_file and address.password:
        raise ValueError("the URL has a password, and --redis-password-file is given too")
    if address.form.endswith("cluster"):
        return _connect_cluster(address, settings, observer)
    if address.form.endswith("sentinel"):
        client = _connect_sentinel(address, settings)
    elif address.form == "unix":
        client = _connect_one(address, settings, UnixDomainSocketConnection, path=address.path)
    else:
        client = _connect_host(address, settings, *address.hosts[0])
    client.observer = observer
    return client


def _connect_host(address: StoreAddress, settings: Settings, host: str, port: int) -> StoreClient:
    kind = SSLConnection if address.is_tls else Connection
    return _connect_one(address, settings, kind, host=host, port=port)


def _connect_one(
    address: StoreAddress, settings: Settings, kind: type[Any], **place: Any
) -> StoreClient:
    pool = BlockingConnectionPool(
        connection_class=kind,
        max_connections=settings.store_connections,
        maint_notifications_config=WITHOUT_NOTICES,
        **place,
        **_login(address, settings),
        **_pool_options(settings),
    )
    watch_links(pool)
    return cast("StoreClient", StoreClient.from_pool(pool))  # closing the client closes the pool


def _connect_sentinel(address: StoreAddress, settings: Settings) -> StoreClient:
    options = _pool_options(settings)
    del options["timeout"]
    make: Any = Sentinels
    sentinel = make(
        address.hosts,
        sentinel_kwargs={
            **_link_options(settings),
            **address.link_options,
            **address.sentinel_credentials,
            "ssl": address.is_tls,
            "retry": Retry(NoBackoff(), 0),  # another sentinel is asked instead
        },
        **options,
    )
    client: StoreClient = sentinel.master_for(
        address.name,
        redis_class=StoreClient,
        connection_pool_class=OneMasterPool,
        ssl=address.is_tls,
        **_login(address, settings),
        # This pool cannot block when it is exhausted: ScriptRunner bounds the calls, the spare
        # connections are for health checks.
        max_connections=settings.store_connections + _SPARE_CONNECTIONS,
    )
    watch_links(client.connection_pool)
    return client


def _connect_cluster(
    address: StoreAddress, settings: Settings, observer: Observer
) -> ClusterRouter:
    def make_client(host: str, port: int) -> StoreClient:
        client = _connect_host(address, settings, host, port)
        client.observer = observer
        return client

    return ClusterRouter(address.hosts, make_client)


def _login(address: StoreAddress, settings: Settings) -> dict[str, Any]:
    login: dict[str, Any] = {"username": address.username, "password": address.password}
    if settings.redis_password_file:
        file = PasswordFile(address.username, Path(settings.redis_password_file))
        login = {"credential_provider": file}
    return {"db": address.database, **login, **address.link_options}


def _link_options(settings: Settings) -> dict[str, Any]:
    timeout_s = settings.store_timeout_ms / 1000
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "protocol": 3,
    }


def _pool_options(settings: Settings) -> dict[str, Any]:
    timeout_s = settings.store_timeout_ms / 1000
    return {
        **_link_options(settings),
        "timeout": timeout_s,  # for a connection of the pool to become free
        "health_check_interval": 0,
        "retry": Retry(NoBackoff(), 0),
    }
