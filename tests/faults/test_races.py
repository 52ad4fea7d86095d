"""Many senders of one thing: it happens once, and every sender gets the same answer."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio

from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import H, Model, Wire, answer_of, draw, is_close, state_of, steady_traffic
from timernn._core.convert import tensor_from_proto
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from instruments.report import Proof

RACERS = 20


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Three replicas over one store."""
    with Fleet(3, "--store-timeout-ms", "5000") as running:
        yield running


@pytest_asyncio.fixture
async def wires(fleet: Fleet) -> AsyncIterator[list[Wire]]:
    """A connection for each racer, seven or six to a replica."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Wire(fleet.addresses[number % 3]))
            for number in range(RACERS)
        ]


@pytest.mark.timeout(300)
@pytest.mark.promise("R2", "concurrent duplicates commit once")
@figure("rounds", 200, 1000)
async def test_twenty_racers_with_one_chunk_commit_it_once(
    wires: list[Wire], proof: Proof, seed: int, rounds: int
) -> None:
    """One of the racers applies the chunk; all get the same state and token."""
    rng = np.random.default_rng(seed)
    model = await Model.create(wires[0], rng, f"race-{seed}-{rounds}")
    await steady_traffic(proof, wires, model, rng)
    writer = await model.open(wires[0])
    for number in range(1, rounds + 1):
        xs = draw(rng)
        request = writer.chunk(xs)
        answers = await asyncio.gather(*(wire.forward(request) for wire in wires))
        proof.hit("duplicate", RACERS - 1)
        first = sum(not answer.replayed for answer in answers)
        proof.require(first == 1, f"chunk {number} was applied {first} times")
        facts = {(a.h.data, a.state_token, a.chunk_seq, a.weights_version.digest) for a in answers}
        proof.require(len(facts) == 1, f"{len(facts)} different answers to chunk {number}")
        wanted = writer.local.forward(xs)
        for answer in answers:
            proof.require(is_close(tensor_from_proto(answer.hs), wanted), f"chunk {number} is off")
        writer.took(answers[0])
    session, h = await state_of(wires[1], writer.session.session_id)
    proof.require(session.chunk_seq == rounds, f"{session.chunk_seq} chunks, not {rounds}")
    proof.require(is_close(h, np.asarray(writer.local.h)), "the last state is wrong")


@pytest.mark.timeout(300)
@pytest.mark.promise("R2", "concurrent duplicates commit once")
@figure("rounds", 50, 300)
async def test_racing_backwards_and_updates_count_once(
    wires: list[Wire], proof: Proof, seed: int, rounds: int
) -> None:
    """Ten racers send one Backward, then ten one Update: one contribution, one step, same answers."""
    rng = np.random.default_rng(seed)
    model = await Model.create(wires[0], rng, f"train-{seed}-{rounds}")
    await steady_traffic(proof, wires, model, rng)
    writer = await model.open(wires[0])
    half = wires[: RACERS // 2]
    for number in range(rounds):
        answer = await wires[0].forward(writer.chunk(draw(rng), train=True))
        writer.took(answer)
        backward = writer.backward(draw(rng, size=H))
        gradients = await asyncio.gather(
            *(answer_of(wire.rnn.Backward(backward, timeout=60)) for wire in half)
        )
        update = rnn_pb.UpdateRequest(model_id=model.model_id, request_id=f"step {number}")
        steps = await asyncio.gather(
            *(answer_of(wire.rnn.Update(update, timeout=60)) for wire in half)
        )
        proof.hit("duplicate", 2 * len(half) - 2)
        for what, answers in (("Backward", gradients), ("Update", steps)):
            first = sum(not each.replayed for each in answers)
            proof.require(first == 1, f"{what} {number} counted {first} times")
        same = {(each.dxs.data, each.dh0.data, each.gradient_norm) for each in gradients}
        proof.require(len(same) == 1, f"{len(same)} different answers to Backward {number}")
        made = {(each.version.number, each.version.digest) for each in steps}
        proof.require(len(made) == 1, f"{len(made)} versions from Update {number}")
        proof.require(steps[0].version.number == number + 2, "the head went on by another step")
        proof.require(all(each.contribution_count == 1 for each in steps), "other contributions")
