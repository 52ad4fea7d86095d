from collections.abc import Iterator

import pytest
import redis
import redis.asyncio

from instruments.dialects import SCRIPT_CALLS, RespDialect
from instruments.processes import wait_until
from instruments.proxy import FaultProxy, Faults, Link
from instruments.redis_servers import Cluster, RedisServer, SentinelGroup


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server on its own."""
    with RedisServer() as running:
        yield running


def test_a_killed_server_keeps_its_file_and_may_lose_it(server: RedisServer) -> None:
    """Restarted it has its data; without its file it starts empty."""
    server.ask("SET", "k", "v")
    server.ask("WAITAOF", 1, 0, 5000)
    server.kill()
    server.start()
    assert server.ask("GET", "k") == b"v"
    server.kill()
    server.lose_data()
    server.start()
    assert server.ask("GET", "k") is None


def test_a_server_that_cannot_start_says_why() -> None:
    """A wrong setting is reported in the server's own words."""
    with pytest.raises(RuntimeError, match="no-such-option"):
        RedisServer("--no-such-option", "1").start()


def test_acknowledged_writes_are_lost_behind_a_stalled_link(server: RedisServer) -> None:
    """The recipe of a failover that loses writes: stall the link, write, kill, promote."""
    with FaultProxy(server.address) as link, RedisServer() as replica:
        replica.follow("127.0.0.1", link.port)
        server.ask("SET", "kept", 1)
        wait_until("the write", lambda: replica.ask("GET", "kept") == b"1")
        link.set(Faults(down=Link(stall=True)))
        server.ask("SET", "lost", 1)
        server.kill()
        replica.promote()
        assert (replica.ask("GET", "kept"), replica.ask("GET", "lost")) == (b"1", None)
        replica.ask("SET", "after", 1)


async def test_a_real_client_loses_the_reply_of_a_script_that_ran(server: RedisServer) -> None:
    """Through the proxy redis-py's set-up passes, the script commits, its answer is lost."""
    faults = Faults(drop_reply_p=1.0, only=SCRIPT_CALLS)
    with FaultProxy(server.address, dialect=RespDialect, faults=faults) as proxy:
        retry = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0)
        client = redis.asyncio.Redis(port=proxy.port, retry=retry)
        assert await client.set("k", 0)
        with pytest.raises(redis.ConnectionError):
            await client.eval("return redis.call('INCR', KEYS[1])", 1, "k")
        assert await client.get("k") == b"1"
        await client.aclose()
        assert proxy.counts["drop_reply"] == 1


def test_sentinels_fail_over_to_the_replica() -> None:
    """A killed master is replaced, the sentinels name the new one and its data is there."""
    with SentinelGroup(replicas=1) as group:
        old = group.master()
        old.ask("SET", "k", "v")
        old.ask("WAIT", 1, 5000)
        old.kill()
        new = group.wait_for_failover(old)
        assert new is not old
        assert new.ask("GET", "k") == b"v"
        new.ask("SET", "k", "w")


def test_a_cluster_moves_a_slot_and_survives_a_master() -> None:
    """A key is served through a slot's move; then its master dies and the replica has it."""
    with Cluster(masters=3) as cluster:
        slot = cluster.slot("k")
        source = cluster.owner(slot)
        source.ask("SET", "k", "v")
        target = next(node for node in cluster.masters if node is not source)
        steps = cluster.move_slot(slot, target)
        assert next(steps) == "open"
        with pytest.raises(redis.exceptions.MovedError):
            target.ask("GET", "k")
        assert list(steps) == ["key", "moved"]
        assert cluster.owner(slot) is target
        target.ask("WAIT", 1, 5000)
        target.kill()
        cluster.wait_for_failover(target, slot)
        assert cluster.owner(slot) is cluster.replica_of(target)
        wait_until("the key", lambda: cluster.owner(slot).ask("GET", "k") == b"v")
