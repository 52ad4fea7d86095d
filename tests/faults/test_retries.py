"""Lost answers and lost requests: what is sent again is applied once, what is missing is reported."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from instruments.dialects import SCRIPT_CALLS
from instruments.proxy import Faults
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import (
    ROUNDING,
    Model,
    Wire,
    answer_of,
    draw,
    head_of,
    is_close,
    refusal,
    state_of,
    steady_traffic,
)
from timernn._core.session_state import SessionState
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.report import Proof
    from rnn_engine import TimeRNN
    from timernn._core.session_state import Forwarded

D, H = 4, 8
FIRST_CHUNKS = 4  # of each session, before the first fault
PATIENT = timernn.RetryPolicy(initial_backoff_s=0.01, budget=10_000, budget_per_s=1_000)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two replicas with a proxy on both sides of each."""
    options = ("--store-timeout-ms", "5000")
    with Fleet(2, *options, seed=1, faulty_store=True, faulty_clients=True) as running:
        yield running


@pytest.fixture(autouse=True)
def _healed(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.heal()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How many answers that the client library took were replayed, and how many not."""
    taken, advance = Counter[bool](), SessionState.advance

    def count(self: SessionState, answer: Forwarded) -> None:
        taken[answer.message.replayed] += 1
        advance(self, answer)

    monkeypatch.setattr(SessionState, "advance", count)
    return taken


class Stream:
    """One session of a client of its own, beside the layer that it must equal."""

    def __init__(self, addresses: list[str], model_id: str, local: TimeRNN, xs: Any) -> None:
        self._client = timernn.aio.connect(addresses, timeout=90, connect_timeout=60, retry=PATIENT)
        self._model_id, self._local, self._xs = model_id, local, xs
        self._session: Any = None
        self._done = 0

    async def run(self, proof: Proof, chunks: int) -> None:
        """Apply so many chunks and compare each answer."""
        if self._session is None:
            self._session = await self._client.session(self._model_id, batch_size=2)
        for xs in self._xs[self._done : self._done + chunks]:
            hs = await self._session.forward(xs)
            self._done += 1
            proof.require(is_close(hs, self._local.forward(xs)), f"chunk {self._done} is wrong")

    async def close(self, proof: Proof, chunks: int) -> None:
        """Compare where the session stands, and disconnect."""
        info = await self._session.get_info()
        proof.require(info.chunk_seq == chunks, f"{info.chunk_seq} chunks, not {chunks}")
        proof.require(
            np.allclose(await self._session.get_state(), np.asarray(self._local.h), atol=ROUNDING),
            "the last state is wrong",
        )
        await self._client.close()


@pytest.mark.timeout(300)
@pytest.mark.promise("R1", "a chunk is applied once, in order, whatever is retried")
@figure("sessions", 50, 200)
async def test_each_chunk_is_applied_once_however_many_answers_are_lost(
    fleet: Fleet, proof: Proof, seed: int, sessions: int, replays: Counter[bool]
) -> None:
    """Sessions stream 40 chunks while a fifth of all answers is lost on both sides of the server."""
    chunks, rng = 40, np.random.default_rng(seed)
    async with Wire(fleet.replicas[0].address) as wire:
        model = await Model.create(wire, rng, f"once-{seed}-{sessions}")
    streams = [
        Stream(
            fleet.addresses[:: 1 if number % 2 else -1],
            model.model_id,
            model.local(),
            [draw(rng) for _ in range(chunks)],
        )
        for number in range(sessions)
    ]
    started = time.monotonic()
    await asyncio.gather(*(stream.run(proof, FIRST_CHUNKS) for stream in streams))
    proof.steady(sessions * FIRST_CHUNKS, time.monotonic() - started)
    before = faults_of(fleet)
    fleet.set_faults(
        clients=Faults(drop_reply_p=0.2, reset_p=0.05),
        store=Faults(drop_reply_p=0.2, reset_p=0.05, only=SCRIPT_CALLS),
    )
    await asyncio.gather(*(stream.run(proof, chunks - FIRST_CHUNKS) for stream in streams))
    fleet.heal()
    await asyncio.gather(*(stream.close(proof, chunks) for stream in streams))
    for name, count in faults_of(fleet).items():
        proof.hit(name, count - before.get(name, 0))
    proof.figures["replayed"] = replays[True]
    assert replays.total() == sessions * chunks
    assert replays[True] > sessions
    assert proof.faults["client drop_reply"] > sessions
    assert proof.faults["store drop_reply"] > sessions / 5


def faults_of(fleet: Fleet) -> dict[str, int]:
    """Return how often answers and requests were lost, by side."""
    sides = {"client": fleet.client_proxies, "store": fleet.store_proxies}
    return {
        f"{side} {fault}": sum(proxy.counts[fault] for proxy in proxies)
        for side, proxies in sides.items()
        for fault in ("drop_reply", "reset")
    }


@pytest.mark.timeout(300)
@pytest.mark.promise("R3", "an Update retried is one step, a Backward retried one contribution")
@figure("steps", 100, 400)
async def test_training_under_lost_answers_ends_with_the_weights_of_an_undisturbed_run(
    fleet: Fleet, proof: Proof, seed: int, steps: int
) -> None:
    """Every Backward and every Update loses its first answer; weights and moments stay equal."""
    rng = np.random.default_rng(seed)
    data = [(draw(rng), draw(rng, size=H)) for _ in range(steps)]
    name, lost_before = f"train-{seed}-{steps}", faults_of(fleet)["client drop_reply"]
    async with timernn.aio.connect(fleet.addresses, timeout=90, retry=PATIENT) as client:
        ends = []
        for model_id, is_disturbed in ((f"{name}-calm", False), (f"{name}-lossy", True)):
            await client.create_model(
                model_id, input_size=D, hidden_size=H, seed=3, optimizer=timernn.Adam(lr=1e-2)
            )
            session = await client.session(model_id, model_id, batch_size=2, train=True)
            started = time.monotonic()
            for xs, dhs in data:
                await session.forward(xs)
                if is_disturbed:
                    lose_next_answers(fleet)
                await session.backward(dhs)
                if is_disturbed:
                    lose_next_answers(fleet)
                await session.update(clip_norm=1.0)
            if not is_disturbed:
                proof.steady(3 * steps, time.monotonic() - started)
            ends.append(await client.get_weights(model_id, include_moments=True))
    calm, lossy = ends
    proof.require(calm.version == lossy.version, f"versions {calm.version} and {lossy.version}")
    for part in ("Wx", "Wh", "b"):
        proof.require(np.array_equal(getattr(calm, part), getattr(lossy, part)), f"{part} differs")
    proof.require(calm.moments.keys() == lossy.moments.keys(), "other moments")
    for key, moment in calm.moments.items():
        proof.require(np.array_equal(moment, lossy.moments[key]), f"moment {key} differs")
    proof.checked(2 * steps)  # each is in the digest of the last version
    proof.hit("answer lost", faults_of(fleet)["client drop_reply"] - lost_before)
    assert proof.faults["answer lost"] >= 2 * steps


def lose_next_answers(fleet: Fleet) -> None:
    """Lose the answer to the next call, and that to its retry on the other replica."""
    for proxy in fleet.client_proxies:
        proxy.drop_reply_after(0, count=1)


@pytest.mark.timeout(300)
@pytest.mark.promise("R3", "an Update retried is one step, a Backward retried one contribution")
@figure("rounds", 40, 200)
async def test_a_backward_sent_again_after_its_update_counts_nothing(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """A Backward whose answer was lost is answered alike after an Update has consumed it."""
    rng = np.random.default_rng(seed)
    lossy, direct = fleet.client_proxies[0], fleet.replicas
    async with (
        Wire(lossy.address) as losing,
        Wire(direct[0].address) as one,
        Wire(direct[1].address) as other,
    ):
        model = await Model.create(one, rng, f"late-{seed}-{rounds}")
        await steady_traffic(proof, [one, other], model, rng)
        writer = await model.open(one)
        for number in range(rounds):
            xs, dhs = draw(rng), draw(rng, size=H)
            writer.took(await one.forward(writer.chunk(xs, train=True)))
            request = writer.backward(dhs)
            lossy.drop_reply_after(0, count=1)
            lost = await refusal(losing.rnn.Backward(request, timeout=30))
            assert isinstance(lost, timernn.errors.Unavailable), repr(lost)
            proof.hit("Backward answer lost")
            update = rnn_pb.UpdateRequest(model_id=model.model_id, request_id=f"{number}")
            stepped = await answer_of(other.rnn.Update(update, timeout=30))
            proof.require(stepped.contribution_count == 1, f"{stepped.contribution_count} taken")
            request.resent = True
            again = [
                await answer_of(wire.rnn.Backward(request, timeout=30)) for wire in (one, other)
            ]
            proof.require(all(each.replayed for each in again), "counted again")
            proof.require(again[0].dxs == again[1].dxs, "other dxs on the other replica")
            repeated = await answer_of(one.rnn.Update(update, timeout=30))
            proof.require(
                repeated.replayed and repeated.version == stepped.version, "a second step was made"
            )
            none = await refusal(
                one.rnn.Update(
                    rnn_pb.UpdateRequest(model_id=model.model_id, request_id=f"n{number}")
                )
            )
            proof.require(none.reason == "NO_GRADIENTS", f"{none!r} in place of NO_GRADIENTS")
            proof.require(
                (await head_of(other, model.model_id))[0] == number + 2, "the head went on"
            )


@pytest.mark.timeout(300)
@pytest.mark.promise("R4", "a lost chunk is reported, never skipped")
@figure("rounds", 100, 500)
async def test_a_chunk_after_a_lost_one_is_refused(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """Chunk k+1 is lost on its way; k+2 is SEQ_GAP on either replica, and both then go in order."""
    rng = np.random.default_rng(seed)
    proxy = fleet.client_proxies[0]
    async with (
        Wire(proxy.address) as losing,
        Wire(fleet.replicas[0].address) as one,
        Wire(fleet.replicas[1].address) as other,
    ):
        model = await Model.create(one, rng, f"gap-{seed}-{rounds}")
        writers = await steady_traffic(proof, [one, other], model, rng)
        for number in range(rounds):
            writer = writers[number % len(writers)]
            session_id, last = writer.session.session_id, writer.session.chunk_seq
            first, second = draw(rng), draw(rng)
            before = await state_of(one, session_id)
            proxy.set(Faults(reset_p=1.0))
            lost = await refusal(losing.rnn.Forward(writer.chunk(first), timeout=30))
            assert isinstance(lost, timernn.errors.Unavailable), repr(lost)
            proxy.set(Faults())
            proof.hit("chunk lost")
            early = writer.chunk(second, last + 2, previous_token=b"")
            for wire in (one, other):
                gap = await refusal(wire.rnn.Forward(early, timeout=30))
                proof.require(
                    gap.reason == "SEQ_GAP" and gap.metadata["expected_seq"] == str(last + 1),
                    f"{gap!r} in place of SEQ_GAP",
                )
            after = await state_of(other, session_id)
            proof.require(np.array_equal(before[1], after[1]), "a refused chunk moved h")
            proof.require(after[0].chunk_seq == last, "a refused chunk moved the session")
            for xs in (first, second):
                writer.check(await other.forward(writer.chunk(xs)), xs, proof)
