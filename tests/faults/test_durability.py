"""`--durability replica`: what was answered survives the primary, and nothing else is answered."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from scenes.figures import figure
from scenes.store_clients import Streamer, connect, create_model, draw, measure_steady
from scenes.store_pair import StorePair, addresses_of, replicas_on
from scenes.store_probe import Probe
from service.domain.types import SessionKey
from service.store import keys, layouts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.processes import ServiceProcess
    from instruments.report import Proof
    from scenes.store_probe import Place, Reply
    from timernn.v1 import time_rnn_service_pb2 as rnn_pb

SESSIONS = 4
TRIES = 20


@pytest.fixture(scope="module")
def pair() -> Iterator[StorePair]:
    """A primary and its standby."""
    with StorePair() as running:
        yield running


@pytest.fixture(scope="module")
def replicas(pair: StorePair) -> Iterator[list[ServiceProcess]]:
    """Two replicas whose answers wait for the standby.

    They read no head in a test: that would wait for the standby as well, and a chunk whose head cannot be
    read is refused before anything is written.
    """
    options = ("--durability", "replica", "--limit-head-max-age-ms", "600000")
    with replicas_on(pair.url, 2, *options) as running:
        yield running


@pytest.mark.timeout(600)
@pytest.mark.promise("R9", "with --durability replica no acknowledged chunk is lost at a failover")
@figure("rounds", 20, 60)
def test_nothing_acknowledged_is_lost_and_nothing_unacknowledged_is_answered(
    pair: StorePair, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """The standby hears nothing: first tries and retries stay UNKNOWN_OUTCOME until it does again."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    addresses, model_id = addresses_of(replicas), f"durable-{seed}-{rounds}"
    with connect(addresses) as client:
        create_model(client, model_id)
    measure_steady(proof, addresses, model_id)
    with Probe(addresses[0]) as one, Probe(addresses[1]) as two:
        for _ in range(rounds):
            places = [one.open(model_id, "") for _ in range(SESSIONS)]
            last: list[Any] = [None] * SESSIONS
            for k, place in enumerate(places):
                for xs in draw(rng, chance.randrange(1, 5)):
                    last[k] = _applied(chance.choice((one, two)), place.chunk(xs)).answer
                    place.took(last[k])
            pair.partition()
            pending = [place.chunk(draw(rng, 1)[0]) for place in places]
            _check_unknown([one, two], pending, proof)
            pair.fail_over()
            pair.restore()
            for place, answer, request in zip(places, last, pending, strict=True):
                _check_kept(one, place, answer, request, proof)
    proof.hit("failover with silent standby", rounds)
    assert pair.lost_bytes > 0


def _applied(probe: Probe, request: rnn_pb.ForwardRequest) -> Reply:
    """Send a chunk until its outcome is known: also a standby that is well may take its time."""
    for _ in range(TRIES):
        reply = probe.ask(probe.rnn.Forward, request)
        if not isinstance(reply.error, timernn.errors.UnknownOutcome):
            break
    return reply


def _check_unknown(probes: list[Probe], pending: list[rnn_pb.ForwardRequest], proof: Proof) -> None:
    """Send each chunk three times, to either replica: the store has it, and it must not be acknowledged."""

    def send(request: rnn_pb.ForwardRequest) -> list[Reply]:
        return [probe.ask(probe.rnn.Forward, request) for probe in (*probes, probes[0])]

    with ThreadPoolExecutor(len(pending)) as pool:
        for reply in pool.map(send, pending):
            for one in reply:
                _require_unknown(one, proof)


def _require_unknown(reply: Reply, proof: Proof) -> None:
    is_unknown = isinstance(reply.error, timernn.errors.UnknownOutcome)
    proof.require(is_unknown, f"with the standby silent: {reply.error!r}")
    is_advised = reply.error is not None and reply.error.retry_after_s is not None
    proof.require(is_advised, "no time to retry")
    proof.figures["slowest refusal s"] = max(
        reply.took_s, proof.figures.get("slowest refusal s", 0.0)
    )


def _check_kept(
    probe: Probe, place: Place, answer: Any, pending: rnn_pb.ForwardRequest, proof: Proof
) -> None:
    """What was answered stands; what was not is applied by the same call, once."""
    name = place.session.session_id
    first = probe.ask(probe.rnn.Forward, pending)
    done = _applied(probe, pending) if first.error else first
    proof.require(done.error is None, f"{name}: an acknowledged chunk was lost: {done.error!r}")
    if first.error is None:
        proof.require(not first.answer.replayed, f"{name}: an unacknowledged chunk was kept")
    if done.error is None:
        place.took(done.answer)
    assert answer is not None


def _is_written(pair: StorePair, request: rnn_pb.ForwardRequest) -> bool:
    """Return whether the primary has a chunk, answered or not."""
    record = keys.record_key(keys.session_tag(SessionKey("default", request.session_id)))
    head = pair.primary.ask("GETRANGE", record, 0, -1)
    return layouts.head_from_bytes(head).chunk_seq == request.chunk_seq


@pytest.mark.timeout(300)
@pytest.mark.promise("R9", "with --durability replica no acknowledged chunk is lost at a failover")
@figure("rounds", 5, 30)
def test_a_silent_standby_holds_answers_back_until_it_hears_again(
    pair: StorePair, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """Nothing fails over; the library's call waits out the silence and ends right."""
    rng, addresses = np.random.default_rng(seed), addresses_of(replicas)
    model_id = f"silent-{seed}-{rounds}"
    with connect(addresses) as client:
        create_model(client, model_id)
    measure_steady(proof, addresses, model_id)
    with Streamer(addresses, model_id, f"{model_id}-s") as streamer, Probe(addresses[0]) as probe:
        for _ in range(rounds):
            for xs in draw(rng, 3):
                streamer.forward(xs, proof)
            place = probe.open(model_id, "")
            pair.partition()
            proof.hit("standby silent")
            pending = place.chunk(draw(rng, 1)[0])
            for _ in range(2):
                _require_unknown(probe.ask(probe.rnn.Forward, pending), proof)
            proof.require(_is_written(pair, pending), "the store has not got the chunk")
            pair.reconnect()
            for xs in draw(rng, 3):
                streamer.forward(xs, proof)
            done = _applied(probe, pending)
            is_replay = done.error is None and done.answer.replayed
            proof.require(is_replay, f"the same call, heard at last: {done.error!r}")
        streamer.finish(proof)
