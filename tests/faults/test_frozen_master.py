"""One master of a cluster hangs: sessions on the others do not notice, those on it get an error soon."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest

import timernn
from instruments.redis_servers import Cluster
from scenes.figures import figure
from scenes.store_clients import connect, create_model, draw, measure_steady
from scenes.store_pair import addresses_of, replicas_on
from scenes.store_probe import Probe
from service.domain.types import ModelKey, SessionKey
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from instruments.report import Proof
    from scenes.store_probe import Place, Reply

SESSIONS = 60
NOTICED_S = 1.5


def p99_s(reply: Sequence[Reply]) -> float:
    """Return the time within which 99 of 100 were answered."""
    return float(np.percentile([each.took_s for each in reply], 99))


@pytest.mark.timeout(240)
@pytest.mark.promise("R33", "Cluster: a frozen master slows no session of the others")
@figure("rounds", 3, 20)
def test_a_frozen_master_is_felt_by_its_own_sessions_alone(
    proof: Proof, seed: int, rounds: int
) -> None:
    """Ten callers over all sessions: those elsewhere go on, those on it are UNAVAILABLE in 1.5 s."""
    rng = np.random.default_rng(seed)
    options = ("--cluster-require-full-coverage", "no")
    with ExitStack() as stack:
        cluster = stack.enter_context(
            Cluster(with_replicas=False, node_timeout_ms=15_000, options=options)
        )
        replicas = stack.enter_context(replicas_on(cluster.url))
        addresses = addresses_of(replicas)
        client = stack.enter_context(connect(addresses))
        create_model(client, "m")
        measure_steady(proof, addresses, "m")
        probe = stack.enter_context(Probe(addresses[0]))
        pool = stack.enter_context(ThreadPoolExecutor(10))
        tags = (keys.model_tag(ModelKey("default", "m")), keys.tenant_tag("default"))
        needed = {cluster.owner(cluster.slot(tag)).port for tag in tags}
        victim = next(node for node in cluster.masters if node.port not in needed)
        places = {True: [], False: []}  # type: dict[bool, list[Place]]
        for number in range(SESSIONS):
            name = f"s{number}"
            slot = cluster.slot(keys.session_tag(SessionKey("default", name)))
            places[cluster.owner(slot) is victim].append(probe.open("m", name))

        def chunk(place: Place) -> Reply:
            reply = probe.ask(probe.rnn.Forward, place.chunk(draw(rng, 1)[0]))
            if reply.error is None:
                place.took(reply.answer)
            return reply

        calm = [reply for _ in range(10) for reply in pool.map(chunk, places[False])]
        proof.figures["healthy p99 s, undisturbed"] = p99_s(calm)
        for _ in range(rounds):
            victim.pause()
            proof.hit("frozen master")
            frozen = [pool.submit(chunk, place) for place in places[True]]
            reply = [done for _ in range(10) for done in pool.map(chunk, places[False])]
            lost = [future.result() for future in frozen]
            victim.resume()
            time.sleep(0.5)  # what was sent to it arrives now
            worst = max(each.took_s for each in lost)
            for name, value in (("healthy p99 s, frozen", p99_s(reply)), ("reply after s", worst)):
                proof.figures[name] = max(value, proof.figures.get(name, 0.0))
            for each in reply:
                proof.require(each.error is None, f"elsewhere: {each.error!r}")
            for each in lost:
                is_right = isinstance(each.error, timernn.errors.Unavailable)
                proof.require(
                    is_right and each.took_s <= NOTICED_S, f"{each.took_s}: {each.error!r}"
                )
            for place in places[True]:  # the chunk may have been applied when it woke up
                session = client.session("m", place.session.session_id)
                place.session.chunk_seq = session.chunk_seq
                place.session.state_token = b""
