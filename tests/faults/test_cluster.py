"""Redis Cluster: slots that move under load, a master killed, one master that loses writes."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

import timernn
from instruments.redis_servers import Cluster, wait_until
from scenes.figures import figure
from scenes.store_clients import (
    POINTS,
    Ending,
    H,
    Traffic,
    Trainer,
    connect,
    create_model,
    draw,
    note_wait,
)
from scenes.store_pair import addresses_of, replicas_on
from scenes.store_probe import Probe, WriteWatch, note_gap
from service.domain.types import ModelKey, SessionKey
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.processes import ServiceProcess
    from instruments.redis_servers import ClusterNode
    from instruments.report import Proof

NODE_TIMEOUT_S = 1.0
MOST_S = NODE_TIMEOUT_S + 2.0
SETTLE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    options = ("--cluster-replica-validity-factor", "0")
    timeout_ms = int(1000 * NODE_TIMEOUT_S)
    with Cluster(node_timeout_ms=timeout_ms, options=options) as running:
        yield running


@pytest.fixture(scope="module")
def replicas(cluster: Cluster) -> Iterator[list[ServiceProcess]]:
    """Two replicas of the service on it."""
    with replicas_on(cluster.url) as running:
        yield running


def slot_of_session(cluster: Cluster, session_id: str) -> int:
    """Return the slot of a session."""
    return cluster.slot(keys.session_tag(SessionKey("default", session_id)))


def slot_of_model(cluster: Cluster, model_id: str) -> int:
    """Return the slot of a model."""
    return cluster.slot(keys.model_tag(ModelKey("default", model_id)))


@pytest.mark.timeout(300)
@pytest.mark.promise("R27", "Cluster: slots move under load and nobody notices")
@figure("moves", 12, 100)
def test_slots_move_under_streams_and_training(
    cluster: Cluster, replicas: list[ServiceProcess], proof: Proof, seed: int, moves: int
) -> None:
    """Key by key, with calls in every state; no call of the library fails, no answer differs."""
    chance, addresses = random.Random(seed), addresses_of(replicas)
    data = draw(np.random.default_rng(seed), 8 * moves)
    model_id = f"move-{seed}-{moves}"
    cluster.wait_content(timeout_s=SETTLE_S)
    with connect(addresses) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, model_id)
        trainer = Trainer(client, f"{model_id}-hit")
        with Traffic(addresses, model_id, proof) as traffic, ThreadPoolExecutor(1) as pool:
            traffic.note_steady(2.0)
            slots = [
                slot_of_session(cluster, trainer.session.session_id),
                slot_of_model(cluster, trainer.model_id),
                slot_of_model(cluster, model_id),
                *(
                    slot_of_session(cluster, f"{model_id}-{seed_name}")
                    for seed_name in _names(proof)
                ),
            ]
            training = pool.submit(trainer.run, data, lambda _number, _comes: time.sleep(0.005))
            for slot in itertools.islice(itertools.cycle(slots), moves):
                target = chance.choice(
                    [n for n in _masters(cluster) if n is not cluster.owner(slot)]
                )
                for state in cluster.move_slot(slot, target):
                    proof.hit(f"slot {state}")
                    traffic.run_for(0.02 + 0.03 * chance.random())
                _tell_all(cluster, slot, target)
            trainer.check(training.result(120), wanted, proof)
            traffic.wait_for_answers(50)
    proof.require(all(replica.is_alive for replica in replicas), "a replica ended")


def _names(proof: Proof) -> list[str]:
    return [f"{proof.seed}-{k}" for k in range(3)]


def _masters(cluster: Cluster) -> list[ClusterNode]:
    return [n for n in cluster.nodes if n.is_alive and n.info("replication")["role"] == "master"]


def _tell_all(cluster: Cluster, slot: int, target: ClusterNode) -> None:
    """Let every master know who serves a slot, as tools do at the end of a move."""
    for node in _masters(cluster):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.id)


@pytest.mark.timeout(300)
@pytest.mark.promise("R27", "Cluster: slots move under load and nobody notices")
@figure("rounds", 6, 60)
def test_a_call_in_every_state_of_a_move_is_right(
    cluster: Cluster, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """Bare calls between any two keys: a warm INFER is right, a TRAIN that or UNAVAILABLE; once."""
    chance, addresses = random.Random(seed), addresses_of(replicas)
    rng, model_id = np.random.default_rng(seed), f"state-{seed}-{rounds}"
    cluster.wait_content(timeout_s=SETTLE_S)
    refused = 0
    with connect(addresses) as client, Probe(addresses[0]) as one, Probe(addresses[1]) as two:
        create_model(client, model_id)
        with Traffic(addresses, model_id, proof) as traffic:
            traffic.note_steady(2.0)
        for number in range(rounds):
            place, is_train = one.open(model_id, f"{model_id}-{number}"), bool(number % 2)
            for xs in draw(rng, 3):
                place.took(one.ask(one.rnn.Forward, place.chunk(xs, train=is_train)).answer)
            slot = slot_of_session(cluster, place.session.session_id)
            target = chance.choice([n for n in _masters(cluster) if n is not cluster.owner(slot)])
            pending = None
            for state in cluster.move_slot(slot, target):
                proof.hit(f"slot {state}")
                # Only a replica that has the state cached needs one key alone.
                probe = chance.choice((one, two)) if is_train else one
                pending = pending or place.chunk(draw(rng, 1)[0], train=is_train)
                reply = probe.ask(probe.rnn.Forward, pending)
                proof.checked()
                if reply.error is None:
                    place.took(reply.answer)
                    pending = None
                elif is_train and isinstance(reply.error, timernn.errors.Unavailable):
                    refused += 1  # it writes several keys, of which one may have gone ahead
                else:
                    proof.violated(f"{state}, train={is_train}: {reply.error!r}")
            _tell_all(cluster, slot, target)
            if pending is not None:
                reply = two.ask(two.rnn.Forward, pending)
                proof.require(reply.error is None, f"after the move: {reply.error!r}")
                place.took(reply.answer)
            session = client.session(model_id, place.session.session_id, train=True)
            proof.require(
                session.chunk_seq == place.session.chunk_seq, "chunks were lost or doubled"
            )
    proof.figures["bare calls UNAVAILABLE in a move"] = refused


@pytest.mark.timeout(300)
@pytest.mark.promise("R28", "Cluster: a killed master's replica takes over, nothing is wrong")
@figure("rounds", 2, 20)
def test_a_master_killed_under_load_is_ridden_out(
    cluster: Cluster, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """Streams over all masters and a training run go on once the replica has taken over."""
    addresses, data = addresses_of(replicas), draw(np.random.default_rng(seed), 50)
    model_id = f"kill-{seed}-{rounds}"
    cluster.wait_content(timeout_s=SETTLE_S)
    with connect(addresses) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, model_id)
        with (
            Traffic(addresses, model_id, proof, log_limit=512) as traffic,
            ThreadPoolExecutor(1) as pool,
        ):
            traffic.note_steady(2.0)
            for number in range(rounds):
                trainer = Trainer(client, f"{model_id}-{number}")
                # The model's master one time, the session's the other.
                slot = (
                    slot_of_session(cluster, trainer.session.session_id)
                    if number % 2
                    else slot_of_model(cluster, trainer.model_id)
                )
                master = cluster.owner(slot)
                watched = _session_on(cluster, master, f"{model_id}-{number}-watched")
                with WriteWatch(addresses[0], model_id, watched, H) as watch:
                    training = pool.submit(
                        trainer.run, data, lambda _number, _comes: time.sleep(0.02)
                    )
                    traffic.run_for(0.5)
                    began = time.monotonic()
                    master.kill()
                    proof.hit("master killed")
                    cluster.wait_for_failover(master, slot, SETTLE_S)
                    traffic.wait_for_answers(200)
                    trainer.check(training.result(120), wanted, proof)
                    note_gap(watch, began, MOST_S, proof)
                    note_wait(traffic, began, proof)
                master.start()
                cluster.wait_content(timeout_s=SETTLE_S)
    proof.require(all(replica.is_alive for replica in replicas), "a replica ended")


@pytest.mark.timeout(300)
@pytest.mark.promise("R8b", "a training run that lost writes ends with the right digest")
@figure("rounds", 1, 7)
def test_a_master_that_lost_writes_is_healed_in_its_slots_alone(
    cluster: Cluster, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """The session's master loses writes and the model's does not, the other way round, or both."""
    addresses, data = addresses_of(replicas), draw(np.random.default_rng(seed), 10)
    chance, model_id = random.Random(seed), f"alone-{seed}-{rounds}"
    cluster.wait_content(timeout_s=SETTLE_S)
    with connect(addresses, timeout=120) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, model_id)
        with Traffic(addresses, model_id, proof) as traffic:
            traffic.note_steady(2.0)
        cases = [(lost, point) for lost in ("session", "model", "both") for point in POINTS]
        for number, (lost, point) in enumerate(rounds * cases if rounds > 1 else cases[::4]):
            trainer = _trainer_on_two_masters(cluster, client, f"{model_id}-{number}")
            owners = {
                "session": cluster.owner(slot_of_session(cluster, trainer.session.session_id)),
                "model": cluster.owner(slot_of_model(cluster, trainer.model_id)),
            }
            losing = [node for name, node in owners.items() if lost in (name, "both")]
            loss = _Loss(cluster, losing)
            cut_at = chance.randrange(4)

            def between(
                step: int, comes: str, cut_at: int = cut_at, loss: _Loss = loss, point: str = point
            ) -> None:
                if (step, comes) == (cut_at, "backward"):
                    loss.cut()
                if (step, comes) == (cut_at + 2, point):
                    loss.take_over()

            trainer.check(trainer.run(data, between), wanted, proof)
            proof.hit(f"master of the {lost} lost writes", len(losing))
            loss.restore()


def _session_on(cluster: Cluster, master: ClusterNode, name: str) -> str:
    """Return the name of a session that lies on a master."""
    names = (f"{name}-{k}" for k in itertools.count())
    return next(one for one in names if cluster.owner(slot_of_session(cluster, one)) is master)


def _trainer_on_two_masters(cluster: Cluster, client: timernn.Client, name: str) -> Trainer:
    """Make a trainer whose session and model lie on different masters."""
    for k in itertools.count():
        model_id = f"{name}-{k}"
        session = cluster.owner(slot_of_session(cluster, f"{model_id}-s"))
        if session is not cluster.owner(slot_of_model(cluster, model_id)):
            return Trainer(client, model_id)
    raise AssertionError


class _Loss:
    """Masters whose replicas stop hearing, and then take over."""

    def __init__(self, cluster: Cluster, masters: list[ClusterNode]) -> None:
        self._cluster, self._masters = cluster, masters
        self._replicas = [_replica_of(cluster, master) for master in masters]
        self._lock = threading.Lock()

    def cut(self) -> None:
        """Freeze the replicas and break their links: what is written now never reaches them."""
        for replica, master in zip(self._replicas, self._masters, strict=True):
            replica.pause()
            master.ask("CLIENT", "KILL", "TYPE", "replica")

    def take_over(self) -> None:
        """Kill the masters and let the replicas take their slots."""
        for replica, master in zip(self._replicas, self._masters, strict=True):
            master.kill()
            replica.resume()
        for replica in self._replicas:
            wait_until("a replica to wake up", lambda r=replica: r.ask("PING"))  # type: ignore[misc]
            replica.ask("CLUSTER", "FAILOVER", "TAKEOVER")

    def restore(self) -> None:
        """Start the masters again, as replicas."""
        for master in self._masters:
            master.start()
        self._cluster.wait_content(timeout_s=SETTLE_S)
        for master in self._masters:
            wait_until("a replica to sync", master._is_linked, SETTLE_S)


def _replica_of(cluster: Cluster, master: ClusterNode) -> ClusterNode:
    """Return the node that replicates a master now."""
    name = master.id.encode()
    lines = master.ask("CLUSTER", "NODES").splitlines()
    (found,) = [line.split() for line in lines if line.split()[3] == name]
    port = int(found[1].split(b"@")[0].rpartition(b":")[2])
    return next(node for node in cluster.nodes if node.port == port)
