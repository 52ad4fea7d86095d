"""Clients that come back after the store has forgotten, and trainers that meet another's step."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis

import timernn
from instruments.redis_servers import RedisServer
from scenes.figures import figure
from scenes.store_clients import Streamer, connect, create_model, draw, measure_steady
from scenes.store_pair import addresses_of, replicas_on
from service.domain.types import ModelKey, SessionKey
from service.store import keys
from timernn._core.contract import BACKWARD, FORWARD, OPEN_SESSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.processes import ServiceProcess
    from instruments.report import Proof

TTL_S, TAPE_TTL_S = 3600.0, 900.0
FATES = ("expired", "closed", "lost")


@pytest.fixture(scope="module")
def store() -> Iterator[RedisServer]:
    """A store whose records' times are shifted instead of waited for."""
    with RedisServer(append_only=False) as running:
        yield running


@pytest.fixture(scope="module")
def replicas(store: RedisServer) -> Iterator[list[ServiceProcess]]:
    """Two replicas on it."""
    with replicas_on(store.url) as running:
        yield running


def sleep(client: timernn.Client, seconds: float) -> None:
    """Let a client's clock run on, as it does while the machine is suspended."""
    now = client._core.context.ages.read
    client._core.context.ages.read = lambda: tuple(each + seconds for each in now())


def forget_session(raw: Any, session_id: str) -> None:
    """Let the times of a session and of its marker pass."""
    tag = keys.session_tag(SessionKey("default", session_id))
    for key in raw.scan_iter(tag.replace(b"[", b"\\[") + b"*"):
        raw.pexpire(key, 0)


def forget_recorded(raw: Any, model_id: str) -> None:
    """Let the time pass for which the names of recorded contributions are remembered."""
    tag = keys.model_tag(ModelKey("default", model_id))
    for name in raw.zrange(keys.expiry_key(tag), 0, -1):
        if raw.hget(keys.contributions_key(tag), name).startswith(b"C"):
            raw.hdel(keys.contributions_key(tag), name)
            raw.zrem(keys.expiry_key(tag), name)


@pytest.mark.timeout(600)
@pytest.mark.promise("R34", "what ended or was recorded is not taken for lost, however late")
@figure("rounds", 30, 200)
def test_who_comes_back_late_brings_nothing_back_and_counts_nothing_twice(
    store: RedisServer, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """Expired or closed is SessionExpired; lost within the time to live is healed, steps and all."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    addresses, model_id = addresses_of(replicas), f"age-{seed}-{rounds}"
    with connect(addresses) as other, redis.Redis.from_url(store.url) as raw:
        create_model(other, model_id)
        measure_steady(proof, addresses, model_id)
        for number in range(rounds):
            fate, name = FATES[number % len(FATES)], f"{model_id}-{number}"
            with Streamer(addresses, model_id, name, ttl_s=TTL_S) as streamer:
                trained = f"{name}-model"
                create_model(streamer.client, trained)
                trainer = streamer.client.session(trained, f"{name}-t", train=True, ttl=TTL_S)
                for xs in draw(rng, chance.randrange(1, 6)):
                    streamer.forward(xs, proof)
                    trainer.backward(trainer.forward(xs))
                    if chance.random() < 0.7:
                        trainer.update(clip_norm=1.0)
                other.update(trained) if waiting(other, trained) else None
                if fate == "closed":
                    other.close_session(name)
                    other.close_session(trainer.session_id)
                for session_id in (name, trainer.session_id):
                    forget_session(raw, session_id)
                forget_recorded(raw, trained)
                sleep(streamer.client, TAPE_TTL_S + 1 if fate == "lost" else TTL_S + 1)
                proof.hit(f"store forgot, session {fate}")
                head = other.get_model(trained).head
                (xs,) = draw(rng, 1)
                if fate == "lost":
                    streamer.forward(xs, proof)
                    trainer.forward(xs)
                else:
                    expect_expired(other, streamer.session, xs, proof)
                    expect_expired(other, trainer, xs, proof)
                proof.require(waiting(other, trained) == 0, f"{name}: a gradient counts twice")
                now = other.get_model(trained).head
                proof.require(now == head, f"{name}: the head went from {head} to {now}")


@pytest.mark.timeout(600)
@pytest.mark.promise(
    "R35", "another trainer's step is recognized by the head alone, nothing sent again"
)
@figure("rounds", 30, 200)
def test_a_conflict_sends_nothing_again(
    replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """By itself or inside a Backward: VersionConflict at once, and the next step goes on from there."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    addresses, model_id = addresses_of(replicas), f"conflict-{seed}-{rounds}"
    with connect(addresses) as mine, connect(addresses) as theirs:
        create_model(mine, model_id)
        measure_steady(proof, addresses, model_id)
        trainer = mine.session(model_id, f"{model_id}-mine", train=True)
        rival = theirs.session(model_id, f"{model_id}-theirs", train=True)
        for number in range(rounds):
            for xs in draw(rng, chance.randrange(1, 4)):
                trainer.backward(trainer.forward(xs))
            trainer.update(exclusive=False)
            hs = trainer.forward(draw(rng, 1)[0])
            for xs in draw(rng, chance.randrange(1, 3)):
                rival.backward(rival.forward(xs))
                rival.update(exclusive=False)
            proof.hit("a rival's step")
            is_inline = chance.random() < 0.5
            if not is_inline:
                trainer.backward(hs)
            with counted_calls(mine) as calls:
                try:
                    if is_inline:
                        trainer.backward(hs, update=timernn.Step())
                    else:
                        trainer.update()
                    proof.violated(f"step {number} ignored the rival's")
                except timernn.VersionConflict:
                    proof.checked()
            again = [rpc for rpc in calls if rpc in (FORWARD, OPEN_SESSION)]
            proof.require(not again, f"step {number}: {len(again)} operations were sent again")
            sent = sum(rpc is BACKWARD for rpc in calls)
            proof.require(sent == is_inline, f"step {number}: {sent} gradients were sent")
            made = trainer.update(exclusive=False)
            proof.require(waiting(mine, model_id) == 0, f"step {number} left gradients")
            proof.require(mine.get_model(model_id).head == made, f"step {number} is not the head")


def waiting(client: timernn.Client, model_id: str) -> int:
    """Return how many gradients wait for an update."""
    return client.get_model(model_id).waiting_contribution_count


def expect_expired(
    other: timernn.Client, session: timernn.Session, xs: np.ndarray, proof: Proof
) -> None:
    """Use a session whose time to live is over; check whether that brought it back."""
    try:
        session.forward(xs)
        proof.violated(f"{session.session_id} went on after its end")
    except timernn.SessionExpired:
        proof.checked()
    try:
        other.get_session(session.session_id)
        proof.violated(f"{session.session_id} was brought back")
    except timernn.SessionNotFound:
        proof.checked()


@contextmanager
def counted_calls(client: timernn.Client) -> Iterator[list[Any]]:
    """Give the methods that a client calls meanwhile."""
    caller, calls = client._core.context.caller, list[Any]()
    call = caller.call

    def counted(rpc: Any, *arguments: Any) -> Any:
        calls.append(rpc)
        return call(rpc, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caller, "call", counted)
        yield calls
