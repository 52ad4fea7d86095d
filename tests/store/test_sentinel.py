"""A pool that follows a master: never some connections to one and some to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from instruments.redis_servers import RedisServer
from service.store.urls import OneMasterPool

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[RedisServer, RedisServer]


@pytest.fixture(scope="module")
def masters() -> Iterator[Pair]:
    """Two servers that both take themselves for the master."""
    with RedisServer(append_only=False) as one, RedisServer(append_only=False) as other:
        yield one, other


class Sentinels:
    """Stands for sentinels that name a given master."""

    def __init__(self, master: RedisServer) -> None:
        self.master = master

    async def discover_master(self, _name: str) -> tuple[str, int]:
        """Return the host and port of the master."""
        return "127.0.0.1", self.master.port

    async def aclose(self) -> None:
        """Hold no connection."""


def make_pool(sentinels: Sentinels) -> Any:
    """Make a pool that asks these."""
    make: Any = OneMasterPool
    return make("name", sentinels, max_connections=4)


async def test_a_connection_to_an_earlier_master_is_made_again(masters: Pair) -> None:
    """It was in use when the master changed, so nobody could close it then."""
    sentinels = Sentinels(masters[0])
    pool = make_pool(sentinels)
    early = await pool.get_connection()
    sentinels.master = masters[1]
    late = await pool.get_connection()
    assert (early.port, late.port) == (masters[0].port, masters[1].port)
    await pool.release(late)
    await pool.release(early)
    for connection in [await pool.get_connection() for _ in range(3)]:
        assert connection.port == masters[1].port
        await pool.release(connection)
    await pool.aclose()


async def test_idle_connections_leave_an_earlier_master_when_it_is_looked_for(
    masters: Pair,
) -> None:
    """A check each second moves a process that has no reason of its own to reconnect."""
    sentinels = Sentinels(masters[0])
    pool = make_pool(sentinels)
    await pool.release(await pool.get_connection())
    sentinels.master = masters[1]
    await pool.follow()
    connection = await pool.get_connection()
    assert connection.port == masters[1].port
    await pool.release(connection)
    await pool.aclose()
