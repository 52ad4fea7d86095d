"""Redis Sentinel: a real failover under load, a switchover, and a master that wakes up again."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from instruments.redis_servers import SentinelGroup, wait_until
from scenes.figures import figure
from scenes.store_clients import Ending, H, Traffic, Trainer, connect, create_model, draw, note_wait
from scenes.store_pair import addresses_of, replicas_on
from scenes.store_probe import WriteWatch, note_gap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from instruments.processes import ServiceProcess
    from instruments.redis_servers import RedisServer
    from instruments.report import Proof

DOWN_AFTER_S = 1.0
MOST_S = DOWN_AFTER_S + 2.0
AFTER_S = 1.0


@pytest.fixture(scope="module")
def group() -> Iterator[SentinelGroup]:
    """A master, a replica and three sentinels."""
    with SentinelGroup(down_after_ms=int(1000 * DOWN_AFTER_S)) as running:
        yield running


@pytest.fixture(scope="module")
def replicas(group: SentinelGroup) -> Iterator[list[ServiceProcess]]:
    """Two replicas that ask the sentinels."""
    with replicas_on(group.url) as running:
        yield running


def kill(group: SentinelGroup, master: RedisServer) -> float:
    """Kill the master; it comes back later, and is made a replica."""
    master.kill()
    took_s = _wait_for_another(group, master)
    master.start()
    return took_s


def freeze(group: SentinelGroup, master: RedisServer) -> float:
    """Stop the master until another one serves; when it wakes up it still takes itself for one."""
    master.pause()
    took_s = _wait_for_another(group, master)
    master.resume()
    return took_s


def switch(group: SentinelGroup, master: RedisServer) -> float:
    """Ask for a switchover: the old master lives on as a replica."""
    group.sentinels[0].ask("FAILOVER", group.name)
    return _wait_for_another(group, master)


def _wait_for_another(group: SentinelGroup, master: RedisServer) -> float:
    """Wait until another master is named and accepts writes; return the seconds it took."""
    began = time.monotonic()
    group.wait_for_failover(master)
    return time.monotonic() - began


@pytest.mark.timeout(240)
@pytest.mark.promise("R26", "Sentinel: no wrong answer, unavailable for down-after + 2 s at most")
@pytest.mark.parametrize("fault", [kill, freeze, switch])
@figure("rounds", 1, 10)
def test_a_failover_under_load_is_ridden_out(
    group: SentinelGroup,
    replicas: list[ServiceProcess],
    proof: Proof,
    seed: int,
    fault: Callable[[SentinelGroup, RedisServer], float],
    rounds: int,
) -> None:
    """Streams and a training run go on over it, what it lost is healed, no server restarts."""
    addresses, data = addresses_of(replicas), draw(np.random.default_rng(seed), 60)
    model_id = f"{fault.__name__}-{seed}-{rounds}"
    with connect(addresses, log_limit=512) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, model_id)
        with (
            Traffic(addresses, model_id, proof, log_limit=512) as traffic,
            WriteWatch(addresses[0], model_id, f"{model_id}-watched", H) as watch,
            ThreadPoolExecutor(1) as pool,
        ):
            traffic.note_steady(2.0)
            for number in range(rounds):
                trainer = Trainer(client, f"{model_id}-{number}")
                training = pool.submit(trainer.run, data, lambda _number, _comes: time.sleep(0.02))
                traffic.run_for(0.5)
                master, began = group.master(), time.monotonic()
                # Where the sentinels themselves are slow, the service has a second after them.
                limit_s = max(MOST_S, fault(group, master) + AFTER_S)
                proof.hit(f"master: {fault.__name__}")
                traffic.wait_for_answers(200)
                trainer.check(training.result(120), wanted, proof)
                note_gap(watch, began, limit_s, proof)
                note_wait(traffic, began, proof)
                _wait_settled(group)
    proof.require(all(replica.is_alive for replica in replicas), "a replica ended")


def _wait_settled(group: SentinelGroup) -> None:
    """Wait until every other server follows the master, as a next failover needs."""

    def is_settled() -> bool:
        master = group.master()
        others = [server for server in group.servers if server is not master]
        return all(
            server.info("replication").get("master_link_status") == "up" for server in others
        )

    with contextlib.suppress(TimeoutError):
        wait_until("the group to settle", is_settled, 30)


@pytest.mark.timeout(240)
@pytest.mark.promise("R26", "Sentinel: no wrong answer, unavailable for down-after + 2 s at most")
@figure("sessions", 96, 256)
def test_more_calls_at_once_than_connections_wait_for_one(
    group: SentinelGroup, replicas: list[ServiceProcess], proof: Proof, seed: int, sessions: int
) -> None:
    """A burst of training calls beyond the pool's size is served, before and after a failover."""
    addresses = addresses_of(replicas)
    data, model_id = draw(np.random.default_rng(seed), 4), f"burst-{seed}-{sessions}"
    with connect(addresses[:1]) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, model_id)
        with Traffic(addresses, model_id, proof) as traffic:
            traffic.note_steady(2.0)
            kill(group, group.master())
            proof.hit("master: kill")
            traffic.wait_for_answers(100)
        _wait_settled(group)

        def train(number: int) -> None:
            trainer = Trainer(client, f"{model_id}-{number}")
            trainer.check(trainer.run(data, lambda _number, _comes: None), wanted, proof)

        with ThreadPoolExecutor(sessions) as pool:
            list(pool.map(train, range(sessions)))
    for replica in replicas:
        starved = replica.log.count("Too many connections") + replica.log.count("MaxConnections")
        proof.require(not starved, f"{starved} calls found no connection")
