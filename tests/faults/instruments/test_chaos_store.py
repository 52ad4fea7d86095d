from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis

from instruments.chaos_store import Chaos, disturb_calls, disturb_client
from instruments.redis_servers import RedisServer
from service.settings import Settings
from service.store.urls import connect

INCREMENT = "return redis.call('INCR', KEYS[1])"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A real store server for these tests."""
    with RedisServer(append_only=False) as running:
        yield running


@pytest.fixture
async def client(server: RedisServer) -> AsyncIterator[Any]:
    """A client of an empty server."""
    server.ask("FLUSHALL")
    made = connect(server.url, Settings())
    yield made
    await made.aclose()


class Account:
    """A tiny store with one account, whose calls can fail."""

    def __init__(self) -> None:
        self.balance = 0

    async def deposit(self, amount: int) -> int:
        """Add an amount to the account."""
        self.balance += amount
        return self.balance

    async def close(self) -> None:
        """Do nothing."""


async def hit_count(chaos: Chaos, account: Account, calls: int) -> int:
    """Call so often; return how many failed."""
    failed = 0
    for _ in range(calls):
        try:
            await account.deposit(1)
        except ConnectionError:
            failed += 1
    return failed


async def test_failures_before_and_after_differ_in_the_effect_alone() -> None:
    """What failed before did not happen, what failed after did."""
    account, chaos = Account(), Chaos(seed=1, errors=[ConnectionError])
    failed = await hit_count(chaos, disturb_calls(account, chaos), 400)
    assert failed == chaos.fault_count
    assert account.balance == 400 - chaos.counts["before"]
    assert 60 < failed < 140
    assert min(chaos.counts["before"], chaos.counts["after"]) > 20


async def test_the_seed_decides() -> None:
    """The same seed hits the same calls."""
    runs = []
    for seed in (1, 1, 2):
        chaos = Chaos(seed=seed, errors=[ConnectionError])
        await hit_count(chaos, disturb_calls(Account(), chaos), 100)
        runs.append(chaos.counts)
    assert runs[0] == runs[1] != runs[2]


async def test_only_the_methods_named_are_hit() -> None:
    """Others, and plain attributes, pass untouched."""
    chaos = Chaos(seed=1, probability=1.0, errors=[ConnectionError])
    account = disturb_calls(Account(), chaos, "deposit")
    await account.close()
    with pytest.raises(ConnectionError):
        await account.deposit(1)
    assert account.balance in (0, 1)


async def test_a_real_client_fails_before_or_after_the_script(client: Any) -> None:
    """The number on the server is that of the calls that were not hit before."""
    chaos = Chaos(seed=5)
    disturb_client(client, chaos)
    script, failed = client.register_script(INCREMENT), 0
    for _ in range(100):
        try:
            await script(keys=["k"])
        except (redis.ConnectionError, redis.TimeoutError):
            failed += 1
    chaos.probability = 0.0
    assert failed > 10
    assert await client.get("k") == str(100 - chaos.counts["before"]).encode()


async def test_a_round_trip_is_hit_as_a_whole(client: Any) -> None:
    """Both of its commands happened, or neither."""
    chaos, failed = Chaos(seed=5), 0
    disturb_client(client, chaos)
    for _ in range(100):
        try:
            await client.round_trip([("INCR", "a"), ("EVAL", INCREMENT, 1, "b")])
        except (redis.ConnectionError, redis.TimeoutError):
            failed += 1
    chaos.probability = 0.0
    assert failed == chaos.fault_count > 10
    assert await client.mget("a", "b") == [str(100 - chaos.counts["before"]).encode()] * 2
