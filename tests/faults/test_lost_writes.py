"""A store that loses what it had acknowledged: reported, never answered wrongly, and healed."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest

import timernn
from instruments.redis_servers import RedisServer
from scenes.figures import figure
from scenes.store_clients import (
    POINTS,
    Ending,
    Streamer,
    Traffic,
    Trainer,
    connect,
    create_model,
    draw,
    measure_steady,
)
from scenes.store_pair import StorePair, addresses_of, replicas_on
from scenes.store_slots import Slots
from scenes.wire import is_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from instruments.processes import ServiceProcess
    from instruments.report import Proof

LOST_CHUNKS = 50
TRAINERS = 6  # that one failover hits, two at each point


@pytest.fixture(scope="module")
def pair() -> Iterator[StorePair]:
    """A primary and its standby."""
    with StorePair() as running:
        yield running


@pytest.fixture(scope="module")
def replicas(pair: StorePair) -> Iterator[list[ServiceProcess]]:
    """Two replicas on the pair."""
    with replicas_on(pair.url) as running:
        yield running


@pytest.mark.timeout(600)
@pytest.mark.promise("R8", "acknowledged writes lost at a failover are reported and healed")
@figure("rounds", 20, 60)
def test_a_streamed_session_goes_on_after_a_failover_that_lost_fifty_chunks(
    pair: StorePair, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """With a log the outputs never differ; without one the loss is an error, never a number."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    addresses, model_id = addresses_of(replicas), f"lost-{seed}-{rounds}"
    with connect(addresses) as client:
        create_model(client, model_id)
    measure_steady(proof, addresses, model_id)
    for number in range(rounds):
        before = chance.randrange(1, 8)
        with (
            Streamer(addresses, model_id, f"{model_id}-{number}") as logged,
            Streamer(addresses, model_id, f"{model_id}-{number}-bare", log_limit=1) as bare,
        ):
            data = draw(rng, before + LOST_CHUNKS + 10)
            for xs in data[:before]:
                bare.forward(xs, proof)
            outputs = logged.session.stream(data, in_flight=chance.choice((1, 4)))
            for hs, xs in zip(outputs, data, strict=True):
                logged.check(hs, xs, proof)
                if logged.done == before:
                    pair.catch_up()
                    pair.partition()
                    for each in data[:3]:
                        bare.forward(each, proof)
                if logged.done == before + LOST_CHUNKS:
                    fail_over(pair)
            logged.finish(proof)
            _expect_refusal(bare, data[0], proof)
        pair.restore()
    proof.hit("failover with lost writes", rounds)
    proof.figures["chunks lost"] = rounds * LOST_CHUNKS


def _expect_refusal(bare: Streamer, xs: np.ndarray, proof: Proof) -> None:
    """Without a log: an error; then the client goes on from the last answer by its own choice."""
    try:
        bare.session.forward(xs)
    except timernn.FailedPrecondition as error:
        proof.require(isinstance(error, timernn.errors.HistoryLost), f"{error!r}")
    else:
        proof.violated(f"{bare.session.session_id} went on over a loss")
    bare.session.set_state(bare.session.h)
    bare.forward(xs, proof)


@pytest.mark.timeout(600)
@pytest.mark.promise("R8b", "a training run that lost writes ends with the right digest")
@figure("rounds", 10, 30)
def test_training_ends_with_the_digest_of_an_undisturbed_run_after_a_failover(
    pair: StorePair, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """Both slots are set back, under runs that stand between any two of their calls."""
    chance, addresses = random.Random(seed), addresses_of(replicas)
    data = draw(np.random.default_rng(seed), 8)
    model_id = f"train-{seed}-{rounds}"
    with connect(addresses) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, f"{model_id}-steady")
    measure_steady(proof, addresses, f"{model_id}-steady")
    for number in range(rounds):
        failover = _Failover(pair, TRAINERS)
        first = [chance.randrange(5) for _ in range(TRAINERS)]

        def train(
            who: int,
            number: int = number,
            first: list[int] = first,
            failover: _Failover = failover,
        ) -> None:
            with connect(addresses[who % 2 :] + addresses[: who % 2]) as client:
                trainer = Trainer(client, f"{model_id}-{number}-{who}")
                hit = failover.hits(first[who], chance_of(seed, number, who), POINTS[who % 3])
                trainer.check(trainer.run(data, hit), wanted, proof)

        with ThreadPoolExecutor(TRAINERS) as pool:
            list(pool.map(train, range(TRAINERS)))
        pair.restore()
        proof.hit("run set back in both slots", TRAINERS)


def fail_over(pair: StorePair) -> None:
    """Fail over and make sure that it lost something."""
    before = pair.lost_bytes
    pair.fail_over()
    assert pair.lost_bytes > before, "the failover lost nothing"


def chance_of(seed: int, *place: int) -> int:
    """Draw after how many calls beyond the partition the failover comes."""
    return random.Random(f"{seed}:{place}").randrange(1, 8)


class _Failover:
    """Brings some runs to their points, fails over, lets them go on."""

    def __init__(self, pair: StorePair, count: int) -> None:
        self._pair = pair
        self._partition = threading.Barrier(count, self._cut)
        self._promotion = threading.Barrier(count, lambda: fail_over(pair))

    def _cut(self) -> None:
        self._pair.catch_up()
        self._pair.partition()

    def hits(self, first: int, lost_calls: int, point: str) -> Callable[[int, str], None]:
        """Return what a run calls between its calls; it is hit before a call `point`."""
        calls, state = 0, "calm"

        def between(number: int, comes: str) -> None:
            nonlocal calls, state
            calls += 1
            if state == "calm" and number >= first and comes == "backward":
                state, calls = "cut", 0
                self._partition.wait(120)
            is_late = calls >= lost_calls or number == 7
            if state == "cut" and calls and is_late and comes == point:
                state = "lost"
                self._promotion.wait(120)

        return between


@pytest.mark.timeout(600)
@pytest.mark.promise("R8b", "a training run that lost writes ends with the right digest")
@pytest.mark.parametrize("lost", ["session", "model"])
@figure("rounds", 20, 100)
def test_training_ends_with_the_digest_of_an_undisturbed_run_when_one_slot_is_set_back(
    pair: StorePair,
    replicas: list[ServiceProcess],
    proof: Proof,
    seed: int,
    lost: str,
    rounds: int,
) -> None:
    """One slot goes back to an older time and the other does not, at each point of a step."""
    addresses, data = addresses_of(replicas), draw(np.random.default_rng(seed), 8)
    model_id = f"slot-{lost}-{seed}-{rounds}"
    with connect(addresses) as client:
        wanted = Ending(client, f"{model_id}-calm", data)
        create_model(client, f"{model_id}-steady")
    measure_steady(proof, addresses, f"{model_id}-steady")

    def train(number: int) -> None:
        chance, point = random.Random(f"{seed}:{number}"), POINTS[number % 3]
        kept_at, lost_at = chance.randrange(4), 5 + chance.randrange(2)
        with connect(addresses) as client, Slots(pair.url) as slots:
            trainer = Trainer(client, f"{model_id}-{number}")
            slot = (
                slots.of_session(trainer.session.session_id)
                if lost == "session"
                else slots.of_model(trainer.model_id)
            )

            def between(step: int, comes: str) -> None:
                if step == kept_at and comes == chance_point:
                    slot.keep()
                if step == lost_at and comes == point:
                    proof.hit(f"slot of the {lost} set back", slot.lose())

            chance_point = chance.choice(POINTS)
            trainer.check(trainer.run(data, between), wanted, proof)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(3 * rounds)))
    assert proof.faults.total() == 3 * rounds


@pytest.mark.timeout(600)
@pytest.mark.promise("R8c", "another writer in the gap is reported, two histories are never mixed")
@figure("rounds", 4, 20)
def test_two_writers_of_one_gap_are_never_mixed(
    pair: StorePair, replicas: list[ServiceProcess], proof: Proof, seed: int, rounds: int
) -> None:
    """A rival without a log writes what the failover left free; the later writer gets an error."""
    sessions, addresses = 25, addresses_of(replicas)
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    model_id = f"gap-{seed}-{rounds}"
    with connect(addresses) as client:
        create_model(client, model_id)
    measure_steady(proof, addresses, model_id)
    for number in range(rounds):
        with ExitStack() as stack:
            writers = [
                stack.enter_context(Streamer(addresses, model_id, f"{model_id}-{number}-{k}"))
                for k in range(sessions)
            ]
            lost = [chance.randrange(1, 7) for _ in writers]
            kept = [chance.randrange(1, 4) for _ in writers]
            for writer, count in zip(writers, kept, strict=True):
                for xs in draw(rng, count):
                    writer.forward(xs, proof)
            pair.catch_up()
            states = [writer.h for writer in writers]
            pair.partition()
            for writer, count in zip(writers, lost, strict=True):
                for xs in draw(rng, count):
                    writer.forward(xs, proof)
            fail_over(pair)
            for writer, state, count in zip(writers, states, lost, strict=True):
                _rival(addresses, writer, state, draw(rng, chance.randrange(1, count + 3)), proof)
        pair.restore()
        proof.hit("gap used by another", sessions)


def _rival(
    addresses: list[str],
    writer: Streamer,
    state: np.ndarray,
    data: list[np.ndarray],
    proof: Proof,
) -> None:
    """Write into the gap as a client that resumes, then let the first one come back."""
    session_id = writer.session.session_id
    with Streamer(addresses, writer.session.model_id, session_id) as rival:
        rival.local.set_state(state)
        for xs in data:
            rival.forward(xs, proof)
        try:
            writer.session.forward(data[0] + 1)
        except (timernn.errors.HistoryForked, timernn.errors.SeqReused):
            proof.checked()
        except timernn.Error as error:
            proof.violated(f"{session_id}: {error!r} in place of a fork")
        else:
            proof.violated(f"{session_id}: two histories were mixed")
        rival.forward(data[-1], proof)
        rival_h = rival.session.state
        proof.require(is_close(rival_h, rival.h), f"{session_id}: rival's h")


@pytest.mark.timeout(300)
@pytest.mark.promise("R23", "a store killed under load comes back with its file and is healed")
@figure("rounds", 3, 20)
def test_a_store_whose_file_lost_its_end_is_healed(proof: Proof, seed: int, rounds: int) -> None:
    """Killed with the last second not on disk, started again: no answer is wrong."""
    chance = random.Random(seed)
    with RedisServer() as store, replicas_on(store.url) as replicas:
        addresses = addresses_of(replicas)
        with connect(addresses) as client:
            create_model(client, "m")
        with Traffic(addresses, "m", proof, log_limit=256) as traffic:
            traffic.note_steady(2.0)
            for _ in range(rounds):
                synced = _file_bytes(store)
                traffic.run_for(0.3 + 0.7 * chance.random())
                store.kill()
                lost = _cut_file(store, synced + chance.randrange(64))
                proof.hit("kill of the store", 1)
                proof.hit("write not on disk", lost > 0)
                store.start()
                traffic.wait_for_answers(40)
        proof.require(all(replica.is_alive for replica in replicas), "a replica ended")
    assert proof.faults["write not on disk"] == rounds


@pytest.mark.timeout(300)
@pytest.mark.promise("R23", "a store killed under load comes back with its file and is healed")
def test_a_store_that_comes_back_empty_is_reported(proof: Proof, seed: int) -> None:
    """Without its file nothing of the lost data is answered, and new data needs no restart."""
    rng = np.random.default_rng(seed)
    with RedisServer() as store, replicas_on(store.url) as replicas:
        addresses = addresses_of(replicas)
        with connect(addresses) as client:
            create_model(client, "m")
            measure_steady(proof, addresses, "m")
            writers = [Streamer(addresses, "m", f"s{k}") for k in range(10)]
            trainer = client.session("m", "trainer", train=True)
            hs = trainer.forward(draw(rng, 1)[0])
            for writer in writers:
                writer.forward(draw(rng, 1)[0], proof)
            store.kill()
            store.lose_data()
            store.start()
            proof.hit("kill of the store, file lost")
            for writer in writers:
                _expect_absent(lambda s=writer: s.session.forward(draw(rng, 1)[0]), proof)  # type: ignore[misc]
                _expect_absent(lambda s=writer: s.session.get_state(), proof)  # type: ignore[misc]
                writer.close()
            _expect_absent(lambda: trainer.backward(hs), proof)
            _expect_absent(lambda: client.get_weights("m"), proof)
            _expect_absent(lambda: client.forward("m", draw(rng, 1)[0]), proof)
            create_model(client, "m", seed=2)
            with Streamer(addresses, "m", "new") as fresh:
                for xs in draw(rng, 5):
                    fresh.forward(xs, proof)


def _expect_absent(call: Callable[[], object], proof: Proof) -> None:
    try:
        call()
    except (timernn.errors.NotFound, timernn.errors.WeightsForked):
        proof.checked()
    except timernn.Error as error:
        proof.violated(f"{error!r} of a store that came back empty")
    else:
        proof.violated("a store that came back empty answered from its lost data")


def _file_bytes(store: RedisServer) -> int:
    return sum(path.stat().st_size for path in _increments(store))


def _cut_file(store: RedisServer, size: int) -> int:
    """Cut the append-only file as a power loss does; return how many bytes went."""
    (path,) = _increments(store)
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(min(size, whole))
    return max(0, whole - size)


def _increments(store: RedisServer) -> list[Path]:
    return sorted((store.dir / "appendonlydir").glob("*.incr.aof"))
