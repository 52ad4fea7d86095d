"""A store that is full, evicts, is demoted or has too few replicas: nothing half done, everything reported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from instruments.processes import free_port
from instruments.redis_servers import RedisServer, snapshot_failing
from scenes.figures import figure
from scenes.store_clients import Streamer, connect, create_model, draw, measure_steady
from scenes.store_pair import addresses_of, replicas_on
from scenes.store_probe import HealthWatch, Probe
from scenes.store_slots import Slots
from timernn._core.convert import tensor_to_proto
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from instruments.processes import ServiceProcess
    from instruments.report import Proof
    from scenes.store_probe import Place

HEALTH_S = 2.0


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    """A store with a file."""
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def replicas(store: RedisServer) -> Iterator[list[ServiceProcess]]:
    """Two replicas over one store."""
    with replicas_on(store.url) as running:
        yield running


@contextlib.contextmanager
def full(store: RedisServer) -> Iterator[None]:
    """Let the store have no room for the block."""
    store.ask("CONFIG", "SET", "maxmemory", 1)
    try:
        yield
    finally:
        store.ask("CONFIG", "SET", "maxmemory", 0)


@pytest.mark.timeout(240)
@pytest.mark.promise("R24", "a full store refuses whole writes; reading, replaying, closing go on")
@figure("rounds", 10, 100)
def test_a_full_store_refuses_whole_and_answers_what_needs_no_room(
    store: RedisServer, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """Every write is STORE_FULL and leaves each key as it was, on a replica that knows or not."""
    addresses, model_id = addresses_of(replicas), f"full-{seed}-{rounds}"
    rng = np.random.default_rng(seed)
    with connect(addresses) as client:
        create_model(client, model_id)
    measure_steady(proof, addresses, model_id)
    for number in range(rounds):
        with Probe(addresses[number % 2]) as probe, Slots(store.url) as slots:
            place = probe.open(model_id, f"{model_id}-{number}")
            doomed = probe.open(model_id, f"{model_id}-{number}-doomed")
            (xs,) = draw(rng, 1)
            applied = place.chunk(xs, train=True)
            first = probe.ask(probe.rnn.Forward, applied).answer
            place.took(first)
            kept = [slots.of_session(place.session.session_id), slots.of_model(model_id)]
            before = [slot.contents() for slot in kept]
            with full(store), Probe(addresses[(number + number // 2) % 2]) as any_probe:
                _check_refused(any_probe, _writes(any_probe, place, model_id, first.hs), proof)
                _check_answered(any_probe, place, doomed, applied, first, proof)
            proof.hit("store full")
            proof.require([slot.contents() for slot in kept] == before, "a key was changed")
            after = probe.ask(probe.rnn.Forward, place.chunk(draw(rng, 1)[0]))
            proof.require(after.error is None, f"with room again: {after.error!r}")


def _writes(probe: Probe, place: Place, model_id: str, dhs: Any) -> Iterator[tuple[Any, Any]]:
    """Give calls that need room."""
    rng, session = np.random.default_rng(0), place.session
    for is_train in (False, True):
        yield probe.rnn.Forward, place.chunk(draw(rng, 1)[0], train=is_train)
    yield (
        probe.rnn.Backward,
        rnn_pb.BackwardRequest(
            session_id=session.session_id,
            epoch=session.epoch,
            chunk_seq=session.chunk_seq,
            state_token=session.state_token,
            dhs=dhs,
        ),
    )
    yield (
        probe.sessions.SetState,
        session_pb.SetStateRequest(
            session_id=session.session_id,
            state=tensor_to_proto(np.ones((1, 4), np.float32)),
            request_id="full",
        ),
    )
    yield probe.sessions.OpenSession, session_pb.OpenSessionRequest(model_id=model_id, batch_size=1)


def _check_refused(probe: Probe, writes: Iterator[tuple[Any, Any]], proof: Proof) -> None:
    for method, request in writes:
        reply = probe.ask(method, request)
        name = type(request).__name__
        is_full = isinstance(reply.error, timernn.errors.StoreFull)
        proof.require(is_full, f"{name} on a full store: {reply.error!r}")
        is_advised = reply.error is not None and reply.error.retry_after_s is not None
        proof.require(is_advised, f"{name}: no time to retry")


def _check_answered(
    probe: Probe,
    place: Place,
    doomed: Place,
    applied: rnn_pb.ForwardRequest,
    first: rnn_pb.ForwardResponse,
    proof: Proof,
) -> None:
    session_id = place.session.session_id
    state = probe.ask(probe.sessions.GetState, session_pb.GetStateRequest(session_id=session_id))
    proof.require(state.error is None and state.answer.state == first.h, f"read: {state.error!r}")
    again = probe.ask(probe.rnn.Forward, applied)
    is_replay = again.error is None and again.answer.replayed and again.answer.h == first.h
    proof.require(is_replay, f"replay: {again.error!r}")
    close = session_pb.CloseSessionRequest(session_id=doomed.session.session_id)
    closed = probe.ask(probe.sessions.CloseSession, close)
    proof.require(closed.error is None and closed.answer.closed, f"close: {closed.error!r}")
    models = ModelServiceStub(probe.channel)
    model = probe.ask(models.GetModel, model_pb.GetModelRequest(model_id=place.session.model_id))
    proof.require(model.error is None, f"model: {model.error!r}")
    proof.require(probe.is_serving(), "a full store can still be read, but health says NOT_SERVING")


@contextlib.contextmanager
def evicting(store: RedisServer) -> Iterator[None]:
    """Let the store drop keys by itself for the block."""
    store.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        yield
    finally:
        store.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


@contextlib.contextmanager
def demoted(store: RedisServer) -> Iterator[None]:
    """Let the store be a read-only replica for the block, of a master that is not there."""
    store.follow("127.0.0.1", free_port(), wait=False)
    try:
        yield
    finally:
        store.promote()


@contextlib.contextmanager
def alone(store: RedisServer) -> Iterator[None]:
    """Let the store ask for a replica that it does not have, for the block."""
    store.ask("CONFIG", "SET", "min-replicas-to-write", 1)
    try:
        yield
    finally:
        store.ask("CONFIG", "SET", "min-replicas-to-write", 0)


@pytest.mark.timeout(240)
@pytest.mark.promise("R25", "a store unfit for writes: NOT_SERVING in 2 s, UNAVAILABLE, over alone")
@pytest.mark.parametrize("unfit", [evicting, demoted, alone, snapshot_failing])
@figure("rounds", 3, 30)
def test_an_unfit_store_is_reported_by_health_and_by_every_write(
    store: RedisServer,
    replicas: list[ServiceProcess],
    proof: Proof,
    seed: int,
    unfit: Callable[[RedisServer], contextlib.AbstractContextManager[None]],
    rounds: int,
) -> None:
    """NOT_SERVING while it lasts; a write is refused as UNAVAILABLE or is in order; then all is well."""
    addresses, model_id = addresses_of(replicas), f"unfit-{unfit.__name__}-{seed}-{rounds}"
    rng = np.random.default_rng(seed)
    with connect(addresses) as client:
        create_model(client, model_id)
    measure_steady(proof, addresses, model_id)
    with (
        Streamer(addresses, model_id, f"{model_id}-s") as streamer,
        Probe(addresses[0]) as probe,
        Probe(addresses[0]) as other,
    ):
        place = probe.open(model_id, "")
        for number in range(rounds):
            with HealthWatch(other) as health:
                health.wait_for(is_serving=True)
                with unfit(store):
                    began = time.monotonic()
                    _check_writes(probe, place, proof, is_refused=unfit is not evicting)
                    noticed = health.wait_for(is_serving=False) - began
                    if not number:
                        _check_start_refused(store, proof)
                ended = time.monotonic()
                recovered = health.wait_for(is_serving=True) - ended
            proof.hit(f"store {unfit.__name__}")
            for name, took_s in (("NOT_SERVING", noticed), ("SERVING", recovered)):
                proof.figures[f"{name} after s"] = max(took_s, proof.figures.get(name, 0))
                proof.require(took_s <= HEALTH_S, f"{name} after {took_s:.2f} s")
            for xs in draw(rng, 3):
                streamer.forward(xs, proof)
        streamer.finish(proof)


def _check_writes(probe: Probe, place: Place, proof: Proof, *, is_refused: bool) -> None:
    for xs in draw(np.random.default_rng(1), 10):
        reply = probe.ask(probe.rnn.Forward, place.chunk(xs))
        if reply.error is None:
            proof.require(not is_refused, "a write was answered")
            place.took(reply.answer)
            continue
        is_reported = isinstance(reply.error, timernn.errors.Unavailable)
        proof.require(is_reported and reply.error.retry_after_s is not None, f"{reply.error!r}")


def _check_start_refused(store: RedisServer, proof: Proof) -> None:
    """A server that starts now says why not in one line, and ends."""
    program = Path(sys.executable).with_name("timernn")
    command = [str(program), "serve", "--listen", "127.0.0.1:0", "--redis-url", store.url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    reply = ended.stderr.strip().splitlines()
    proof.require(ended.returncode not in (0, -9), f"it started: {ended.stdout}")
    proof.require(any("cannot be used" in line for line in reply), f"it says {reply[-3:]}")
    proof.require("Traceback" not in ended.stderr, "it ends with a traceback")
