"""Which store a URL names.

| URL | store |
| --- | --- |
| `redis://host:6379/0`, `rediss://…`, `unix:///path` | one Redis or Valkey server |
| `redis+sentinel://host:26379,host:26379/NAME/0` | the master that Sentinel knows by NAME |
| `redis+cluster://host:6379,host:6379` | a Redis Cluster |

A user and a password before the hosts are the store's. `rediss+sentinel` and `rediss+cluster` speak
TLS. What follows `?` in the first form is redis-py's; a Sentinel URL may have
`?sentinel_username=…&sentinel_password=…`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from service.store.cluster import ClusterRouter
from service.store.links import WITHOUT_NOTICES, StoreClient, watch_links

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from service.settings import Settings

_SENTINEL_PORT = 26379
_REDIS_PORT = 6379
_SPARE_CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Address:
    """A URL of several hosts, taken apart."""

    hosts: list[tuple[str, int]]
    name: str
    database: int
    username: str | None
    password: str | None
    is_tls: bool
    options: dict[str, str]


class OneMasterPool(SentinelConnectionPool):
    """Connections to the master that was named last, and to no other.

    After a failover the old master may wake up and serve for a while whoever is connected to it. Were
    some connections to the one and some to the other, one call would find what the next one misses.
    """

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Take a connection; one to an earlier master is made again."""
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

    async def follow(self) -> None:
        """Ask the sentinels who the master is; while they do not say, the one named last stays."""
        pool: Any = self
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await pool.get_master_address()


def connect(url: str, settings: Settings) -> StoreClient | ClusterRouter:
    """Make the client of the store that a URL names; nothing is sent yet.

    The client's own retries are off: a commit is sent again by its number, never blindly.

    Raises:
        ValueError: If the URL has another form.
    """
    kind = urlsplit(url).scheme.partition("+")[2]
    if kind == "sentinel":
        return _connect_sentinel(parse_address(url, _SENTINEL_PORT), settings)
    if kind == "cluster":
        return _connect_cluster(parse_address(url, _REDIS_PORT), settings)
    return _connect_one(url, settings)


def parse_address(url: str, default_port: int) -> Address:
    """Take a URL of several hosts apart.

    Raises:
        ValueError: If a host is missing or a port or database is not a number.
    """
    parts = urlsplit(url)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in ("redis", "rediss"):
        raise ValueError(
            "expected redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    name, database = _path(parts)
    return Address(
        hosts=[_host(host, default_port) for host in hosts.split(",")],
        name=name,
        database=database,
        username=unquote(username) or None,
        password=unquote(password) or None,
        is_tls=scheme == "rediss",
        options={key: values[-1] for key, values in parse_qs(parts.query).items()},
    )


def _connect_one(url: str, settings: Settings, **credentials: str | None) -> StoreClient:
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=settings.store_connections,
        maint_notifications_config=WITHOUT_NOTICES,
        **credentials,
        **_pool_options(settings),
    )
    watch_links(pool)
    return cast("StoreClient", StoreClient.from_pool(pool))  # which closes it with itself


def _connect_sentinel(address: Address, settings: Settings) -> StoreClient:
    if not address.name:
        raise ValueError("expected redis+sentinel://host:26379,…/NAME with the name of the master")
    options = _pool_options(settings)
    del options["timeout"]
    credentials = {
        key.removeprefix("sentinel_"): value
        for key, value in address.options.items()
        if key in ("sentinel_username", "sentinel_password")
    }
    sentinel = Sentinel(
        address.hosts,
        sentinel_kwargs={
            **_link_options(settings),
            **credentials,
            "ssl": address.is_tls,
            "retry": Retry(NoBackoff(), 0),  # another sentinel is asked instead
        },
        **options,
    )
    client: StoreClient = sentinel.master_for(
        address.name,
        redis_class=StoreClient,
        connection_pool_class=OneMasterPool,
        db=address.database,
        username=address.username,
        password=address.password,
        ssl=address.is_tls,
        # It has no pool that waits: ScriptRunner bounds the calls, the rest is for health.
        max_connections=settings.store_connections + _SPARE_CONNECTIONS,
    )
    watch_links(client.connection_pool)
    return client


def _connect_cluster(address: Address, settings: Settings) -> ClusterRouter:
    def make_client(host: str, port: int) -> StoreClient:
        scheme = "rediss" if address.is_tls else "redis"
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        return _connect_one(url, settings, username=address.username, password=address.password)

    return ClusterRouter(address.hosts, make_client)


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


def _path(parts: SplitResult) -> tuple[str, int]:
    name, _, database = parts.path.strip("/").partition("/")
    if database and not database.isdecimal():
        raise ValueError(f"expected the number of a database, got {database!r}")
    return name, int(database or 0)


def _host(text: str, default_port: int) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if text.rpartition(":")[2].isdecimal() else (text, "", "")
    if not host:
        raise ValueError("expected host:port,host:port,… after //")
    return host.strip("[]"), int(port or default_port)
