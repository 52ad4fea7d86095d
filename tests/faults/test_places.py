"""Opens that are refused, also on a replica that is killed midway: they fill no quota."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

import timernn
from instruments.redis_servers import RedisServer
from scenes.figures import figure
from scenes.store_clients import connect, create_model, measure_steady
from scenes.store_pair import addresses_of, replicas_on
from scenes.store_probe import Probe
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from instruments.report import Proof

LIMIT, WEEK = 30, Duration(seconds=7 * 86400)
DAYS_MS = 2 * 86_400_000


def refused_open(number: int, now_ms: int) -> session_pb.OpenSessionRequest:
    """Return an Open that is refused: of a live name, or of an epoch that never was."""
    if number % 2:
        return session_pb.OpenSessionRequest(model_id="m", session_id="live", ttl=WEEK)
    ahead = now_ms + DAYS_MS
    name = f"wild-{number}"
    return session_pb.OpenSessionRequest(
        model_id="m", session_id=name, ttl=WEEK, restored_epoch=ahead
    )


@pytest.mark.timeout(240)
@pytest.mark.promise(
    "R32", "refused Opens take nothing of the quota, live sessions keep their entries"
)
@figure("rounds", 4, 40)
def test_refused_opens_fill_no_quota(proof: Proof, seed: int, rounds: int) -> None:
    """A hundred a round from eight callers on two replicas beside Opens that are let in and closed."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        store = stack.enter_context(RedisServer())
        limit = ("--limit-sessions-per-tenant", str(LIMIT))
        replicas = stack.enter_context(replicas_on(store.url, 2, *limit))
        addresses = addresses_of(replicas)
        client = stack.enter_context(connect(addresses))
        create_model(client, "m")
        measure_steady(proof, addresses, "m")
        client.session("m", "live")
        probes = [stack.enter_context(Probe(address)) for address in addresses]
        pool = stack.enter_context(ThreadPoolExecutor(8))
        for number in range(rounds):
            now_ms = int(time.time() * 1000)

            def hammer(count: int, now_ms: int = now_ms) -> None:
                probe = chance.choice(probes)
                reply = probe.ask(probe.sessions.OpenSession, refused_open(count, now_ms))
                is_right = isinstance(reply.error, timernn.SessionExists | timernn.EpochFenced)
                proof.require(is_right, f"a bad Open ended in {reply.error!r}")

            work = pool.map(hammer, range(100))
            for count in range(10):
                with client.session("m", f"honest-{number}-{count}") as session:
                    session.close()
            list(work)
            proof.hit("refused Opens", 100)
            sessions = [client.session("m", f"full-{number}-{k}") for k in range(LIMIT - 1)]
            listed = {info.session_id for info in client.list_sessions("m")}
            wanted = {"live", *(session.session_id for session in sessions)}
            proof.require(listed == wanted, f"listed are {sorted(listed ^ wanted)} otherwise")
            reply = probes[0].ask(
                probes[0].sessions.OpenSession, session_pb.OpenSessionRequest(model_id="m")
            )
            proof.require(
                isinstance(reply.error, timernn.MaxSessions),
                f"one too many ended in {reply.error!r}",
            )
            for session in sessions:
                session.close()
