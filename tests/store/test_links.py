"""Connections that were cut are made again before a call is sent over them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from redis import exceptions as redis_errors

from instruments.proxy import FaultProxy
from instruments.redis_servers import RedisServer, wait_until
from service.domain.types import SessionKey
from service.settings import Settings
from service.store.connect import open_store
from service.store.links import BIG_BYTES, StoreClient, _packed, _pieces
from service.store.urls import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    Run = Callable[[Coroutine[Any, Any, None]], None]

CALLS = 8
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server on a port."""
    with RedisServer(append_only=False) as running:
        yield running


@LOOPS
@pytest.mark.parametrize("cut", [FaultProxy.reset_all, FaultProxy.close_all])
def test_no_call_fails_for_connections_that_were_cut_while_idle(
    server: RedisServer, cut: Callable[[FaultProxy], int], run: Run
) -> None:
    """Many at once after a failover: each would have met two dead connections, and been STORE_DOWN."""

    async def scene(proxy: FaultProxy) -> None:
        store = await open_store(f"redis://{proxy.address}", Settings())
        wanted = [SessionKey("t", f"s{number}") for number in range(CALLS)]
        await asyncio.gather(*(store.sessions.read_session(key) for key in wanted))
        assert await asyncio.to_thread(cut, proxy) == CALLS
        await asyncio.to_thread(wait_until, "the cuts", lambda: _clients(server) == 1)
        await store.check()
        await asyncio.gather(*(store.sessions.read_session(key) for key in wanted))
        await store.close()

    with FaultProxy(server.address) as proxy:
        run(scene(proxy))


@LOOPS
@pytest.mark.parametrize("size", [1, 8 * BIG_BYTES], ids=["small", "big"])
def test_an_answer_counts_though_the_loop_was_held_for_longer_than_the_store_may_take(
    server: RedisServer, size: int, run: Run
) -> None:
    """Large chunks are encoded in the loop; the store was not slow, nobody read what it said."""

    async def scene() -> None:
        client = connect(f"redis://{server.address}", Settings(store_timeout_ms=50))
        assert isinstance(client, StoreClient)
        value = bytes(size)
        assert await client.round_trip([("PING",)]) == [b"PONG"]  # the connection is there
        asking = asyncio.create_task(
            client.round_trip([("SET", "held", value), ("GET", "held")], answer_bytes=size)
        )
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 - holds the loop, which is the fault
        assert await asking == [b"OK", value]
        await client.aclose()

    run(scene())


@pytest.mark.parametrize("size", [BIG_BYTES, BIG_BYTES + 1])
@pytest.mark.parametrize("options", [(), ("PX", 60_000, "NX")])
def test_pieces_are_the_command(size: int, options: tuple[object, ...]) -> None:
    """A value that goes to the socket from where it lies reads as one that was copied."""
    value = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    packed = _packed(("SET", b"key", value, *options))
    assert b"".join(_pieces(("SET", b"key", memoryview(value), *options))) == packed


@LOOPS
def test_a_connection_closed_under_a_call_is_a_lost_one(server: RedisServer, run: Run) -> None:
    """It closes after it was handed out: to be sent again elsewhere, not a bug of ours."""

    async def scene() -> None:
        client: Any = connect(server.url, Settings())
        link = await client.connection_pool.get_connection()
        link._writer.transport.abort()
        await asyncio.sleep(0)
        with pytest.raises(redis_errors.ConnectionError):
            await link.send_command("PING")
        await client.connection_pool.release(link)
        assert await client.ping()
        await client.aclose()

    run(scene())


@LOOPS
def test_an_answer_that_came_too_late_is_nobodys(server: RedisServer, run: Run) -> None:
    """The link that it would come on is given up, so the next round trip reads its own answers."""

    async def scene() -> None:
        client: Any = connect(server.url, Settings(store_timeout_ms=50))
        await client.round_trip([("SET", "k", "value")])
        with pytest.raises(TimeoutError):
            await client.round_trip([("BLPOP", "nothing", 0.2)])
        assert await client.round_trip([("GET", "k"), ("STRLEN", "k")]) == [b"value", 5]
        await client.aclose()

    run(scene())


@LOOPS
def test_a_round_trip_that_carries_much_has_more_time(server: RedisServer, run: Run) -> None:
    """The time limit grows with the bytes of a trip, those sent and those asked for."""

    async def scene() -> None:
        client: Any = connect(server.url, Settings(store_timeout_ms=50))
        waits = ("BLPOP", "nothing", 0.2)
        assert await client.round_trip([waits], 1 << 23) == [None]
        answers = await client.round_trip([("SET", "big", bytes(1 << 23)), waits])
        assert answers == [b"OK", None]
        with pytest.raises(TimeoutError):
            await client.round_trip([("SET", "small", bytes(1 << 10)), waits])
        await client.aclose()

    run(scene())


@LOOPS
def test_an_error_stands_in_its_commands_place(server: RedisServer, run: Run) -> None:
    """Those after it in the round trip are answered as well, and the link stays in use."""

    async def scene() -> None:
        client: Any = connect(server.url, Settings())
        for _ in range(2):
            first, failed, last = await client.round_trip(
                [("ECHO", "a"), ("NO-SUCH-COMMAND",), ("ECHO", memoryview(b"b"))]
            )
            assert (first, last) == (b"a", b"b")
            assert isinstance(failed, redis_errors.ResponseError)
        assert len(client._kept) == 1
        await client.aclose()

    run(scene())


@LOOPS
def test_a_link_taken_meanwhile_is_not_given_up_with_the_others(
    server: RedisServer, run: Run
) -> None:
    """A failed round trip gives up all idle links; one that is in work again is not among them."""

    async def scene() -> None:
        client: Any = connect(server.url, Settings())
        pool = client.connection_pool
        await asyncio.gather(*(client.round_trip([("PING",)]) for _ in range(4)))
        release = pool.release

        async def release_late(link: Any) -> None:
            await asyncio.sleep(0.01)
            await release(link)

        pool.release = release_late
        client._kept[-1].round_trip = broken
        answers = await asyncio.gather(
            client.round_trip([("PING",)]),
            *(_later(client.round_trip, [("BLPOP", "nothing", 0.05)]) for _ in range(3)),
            return_exceptions=True,
        )
        assert isinstance(answers[0], redis_errors.ConnectionError)
        assert answers[1:] == [[None]] * 3
        assert set(client._kept) == set(pool._in_use_connections)
        await client.aclose()

    async def broken(_pieces: Any, _count: int) -> None:
        await asyncio.sleep(0)
        raise redis_errors.ConnectionError("the link broke")

    run(scene())


async def _later(call: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
    await asyncio.sleep(0.005)
    return await call(*arguments)


@pytest.mark.parametrize("connections", [1, 4])
def test_health_finds_a_connection_beside_kept_ones(server: RedisServer, connections: int) -> None:
    """Idle links are never all that the store may have."""

    async def scene() -> None:
        store = await open_store(server.url, Settings(store_connections=connections))
        checks = (
            store.sessions.read_session(SessionKey("t", f"s{number}")) for number in range(CALLS)
        )
        await asyncio.gather(*checks)
        await store.check()
        await store.close()

    asyncio.run(scene())


def _clients(server: RedisServer) -> int:
    return int(server.info("clients")["connected_clients"])
