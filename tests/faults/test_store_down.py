"""A store that is gone, frozen, forgetful of scripts or of connections: reported fast, over without a restart."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

import timernn
from instruments.redis_servers import RedisServer
from scenes.figures import figure
from scenes.store_clients import (
    Ending,
    Streamer,
    Traffic,
    Trainer,
    connect,
    create_model,
    draw,
    measure_steady,
)
from scenes.store_pair import addresses_of, replicas_on
from scenes.store_probe import HealthWatch, Probe
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from instruments.processes import ServiceProcess
    from instruments.report import Proof
    from scenes.store_probe import Place, Reply

CALL_S = 1.5  # within which a call on a dead store is answered
HEALTH_S = 2.0  # within which health is right
DOWN_S = 5.0


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
def killed(store: RedisServer) -> Iterator[None]:
    """Let the store be dead for the block."""
    store.kill()
    try:
        yield
    finally:
        store.start()


@contextlib.contextmanager
def stopped(store: RedisServer) -> Iterator[None]:
    """Let the store hang for the block: connections stay open and nothing answers."""
    store.pause()
    try:
        yield
    finally:
        store.resume()


@contextlib.contextmanager
def busy(store: RedisServer) -> Iterator[None]:
    """Let a script of somebody else run for the block: every command is refused as BUSY."""
    store.ask("CONFIG", "SET", "busy-reply-threshold", 50)
    endless = "while true do end"

    def run() -> None:
        # It ends with the SCRIPT KILL below; until then the answer does not come in time.
        with contextlib.suppress(Exception):
            store.ask("EVAL", endless, 0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        store.ask("SCRIPT", "KILL")
        thread.join()


@pytest.mark.timeout(240)
@pytest.mark.promise(
    "R11", "a store that is down: reported fast, nothing wrong, over without restart"
)
@pytest.mark.parametrize("outage", [killed, stopped, busy])
@figure("rounds", 1, 10)
def test_a_store_that_is_away_is_reported_fast_and_its_return_is_noticed(
    store: RedisServer,
    replicas: list[ServiceProcess],
    proof: Proof,
    seed: int,
    outage: Callable[[RedisServer], contextlib.AbstractContextManager[None]],
    rounds: int,
) -> None:
    """Calls end in time as UNAVAILABLE with a time to retry; health and sessions come back."""
    addresses, rng = addresses_of(replicas), np.random.default_rng(seed)
    model_id = f"down-{outage.__name__}-{seed}-{rounds}"
    pids = [replica.pid for replica in replicas]
    with connect(addresses) as client, Probe(addresses[0]) as probe, Probe(addresses[0]) as other:
        create_model(client, model_id)
        measure_steady(proof, addresses, model_id)
        with Streamer(addresses, model_id, f"{model_id}-s") as streamer:
            for _ in range(rounds):
                for xs in draw(rng, 3):
                    streamer.forward(xs, proof)
                places = [probe.open(model_id, "") for _ in range(4)]
                with HealthWatch(other) as health:
                    health.wait_for(is_serving=True)
                    with outage(store):
                        gone = time.monotonic()
                        _check_calls(probe, places, gone + DOWN_S, proof)
                        noticed = health.wait_for(is_serving=False) - gone
                    back = time.monotonic()
                    recovered = health.wait_for(is_serving=True) - back
                proof.hit(f"store {outage.__name__}")
                _note(proof, "NOT_SERVING after s", noticed, HEALTH_S)
                _note(proof, "SERVING after s", recovered, HEALTH_S)
                proof.require(not health.liveness_lost, "liveness followed the store")
                for xs in draw(rng, 3):
                    streamer.forward(xs, proof)
                for place in places:
                    reply = probe.ask(probe.rnn.Forward, place.chunk(draw(rng, 1)[0]))
                    is_reported = reply.error is None or reply.error.reason == "SEQ_REUSED"
                    proof.require(is_reported, f"after its return: {reply.error!r}")
            streamer.finish(proof)
    proof.require(pids == [replica.pid for replica in replicas], "a replica was restarted")
    proof.require(all(replica.is_alive for replica in replicas), "a replica ended")


def _check_calls(probe: Probe, places: list[Place], until: float, proof: Proof) -> None:
    """Send calls side by side while the store is away; each ends in time and says when to retry."""
    rng = np.random.default_rng(1)

    def ask(place: Place) -> list[Reply]:
        answers = []
        while time.monotonic() < until:
            answers.append(probe.ask(probe.rnn.Forward, place.chunk(draw(rng, 1)[0])))
            read = session_pb.GetStateRequest(session_id=place.session.session_id)
            answers.append(probe.ask(probe.sessions.GetState, read))
            time.sleep(0.05)
        return answers

    with ThreadPoolExecutor(len(places)) as pool:
        reply = [one for some in pool.map(ask, places) for one in some]
    for one in reply:
        text = f"with the store away: {one.error!r} after {one.took_s:.2f} s"
        # A frozen or busy store may have answered what came in its last moment.
        is_first = one.error is None and one.at < until - DOWN_S + 0.5
        is_unavailable = isinstance(one.error, timernn.errors.Unavailable)
        is_advised = one.error is not None and one.error.retry_after_s is not None
        proof.require(is_first or (is_unavailable and is_advised), text)
    _note(proof, "slowest call s", max(one.took_s for one in reply), CALL_S)


def _note(proof: Proof, name: str, took_s: float, limit_s: float) -> None:
    proof.figures[name] = max(took_s, proof.figures.get(name, 0.0))
    proof.require(took_s <= limit_s, f"{name} {took_s:.2f}, the limit is {limit_s}")


@pytest.mark.timeout(240)
@pytest.mark.promise("R11b", "forgotten scripts and cut connections are never seen by a client")
@pytest.mark.parametrize(
    "command", [("SCRIPT", "FLUSH", "SYNC"), ("CLIENT", "KILL", "TYPE", "normal")]
)
@figure("seconds", 5, 60)
def test_a_store_that_forgets_scripts_or_connections_is_not_noticed(
    store: RedisServer,
    replicas: list[ServiceProcess],
    proof: Proof,
    seed: int,
    command: tuple[str, ...],
    seconds: int,
) -> None:
    """Streams go on without an error, and a training run ends with the right digest."""
    addresses, model_id = addresses_of(replicas), f"forget-{command[0]}-{seed}-{seconds}"
    data = draw(np.random.default_rng(seed), 60)
    with connect(addresses) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, model_id)
        with (
            Traffic(addresses, model_id, proof, pace_s=0.005) as traffic,
            Probe(addresses[0]) as probe,
        ):
            traffic.note_steady(1.5)
            place = probe.open(model_id, "")
            failed = 0
            with _repeating(store, command, proof):
                trainer = Trainer(client, f"{model_id}-hit")
                version = trainer.run(data, lambda _number, _comes: None)
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    (xs,) = draw(np.random.default_rng(seed), 1)
                    reply = probe.ask(probe.rnn.Forward, place.chunk(xs))
                    proof.checked()
                    if reply.error is None:
                        place.took(reply.answer)
                    elif isinstance(reply.error, timernn.errors.Unavailable):
                        failed += 1
                    else:
                        proof.violated(f"{reply.error!r}")
            trainer.check(version, wanted, proof)
    proof.figures[f"bare calls UNAVAILABLE under {command[0]}"] = failed
    if command[0] == "SCRIPT":
        proof.require(not failed, f"{failed} calls failed for a forgotten script")


@contextlib.contextmanager
def _repeating(store: RedisServer, command: tuple[str, ...], proof: Proof) -> Iterator[None]:
    """Send a command every 50 ms for the block."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.05):
            store.ask(*command)
            proof.hit(" ".join(command[:2]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
