"""A replica that is stopped in the middle of its work and wakes up after others went on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.processes import wait_until
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.training import Trainer
from scenes.wire import (
    Model,
    Wire,
    draw,
    is_close,
    outcome,
    state_of,
    steady_traffic,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from instruments.processes import ServiceProcess
    from instruments.report import Proof
    from scenes.wire import Writer

MORE_CHUNKS = 3  # that the others apply before the stopped replica wakes up
POINTS = ("before_commit", "before_count", "before_update")
# Long enough to stop the process within it.
SLOW = {"TIMERNN_FAILPOINTS": ";".join(f"{point}=sleep(0.15)@*" for point in POINTS)}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two replicas; the first takes a rest between its work and telling the store."""
    with Fleet(2, "--testing", "--store-timeout-ms", "30000", envs=[SLOW]) as running:
        yield running


async def stop_at(
    replica: ServiceProcess, point: str, call: Coroutine[Any, Any, Any]
) -> asyncio.Task[Any]:
    """Make a call and stop the replica once it has computed and not yet sent the result to the store."""
    mark = f"failpoint {point}"
    passed = replica.log.count(mark)
    task = asyncio.create_task(call)
    await asyncio.to_thread(wait_until, mark, lambda: replica.log.count(mark) > passed, 30)
    replica.pause()
    return task


@pytest.mark.timeout(300)
@pytest.mark.promise("R6", "a replica that wakes up late overwrites nothing")
@figure("rounds", 50, 300)
async def test_a_chunk_computed_before_the_pause_is_not_applied_after_it(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """While it is stopped, the other applies this chunk, or a different one, and three more."""
    rng, zombie = np.random.default_rng(seed), fleet.replicas[0]
    async with Wire(fleet.addresses[0]) as paused, Wire(fleet.addresses[1]) as other:
        model = await Model.create(other, rng, f"zombie-{seed}-{rounds}")
        writers = await steady_traffic(proof, [other], model, rng, sessions=8)
        for number in range(rounds):
            writer = writers[number % len(writers)]
            xs = draw(rng)
            request = writer.chunk(xs)
            late = await stop_at(zombie, "before_commit", paused.forward(request))
            try:
                before, _ = await state_of(other, writer.session.session_id)
                is_rival = bool(number % 2)
                await go_on(other, writer, draw(rng) if is_rival else xs, rng, proof)
            finally:
                zombie.resume()
            answer = await outcome(late)
            if before.chunk_seq == request.chunk_seq:
                continue  # stopped too late: the commit had left
            proof.hit("stopped between compute and commit")
            if is_rival:
                proof.require(
                    getattr(answer, "reason", "") == "SEQ_REUSED", f"{answer!r}, not SEQ_REUSED"
                )
            else:
                proof.require(getattr(answer, "replayed", False), f"{answer!r} is no replay")
            session, h = await state_of(paused, writer.session.session_id)
            proof.require(session.chunk_seq == writer.session.chunk_seq, "the session moved")
            proof.require(session.state_token == writer.session.state_token, "another history")
            proof.require(is_close(h, np.asarray(writer.local.h)), "the state is not the other's")
        assert proof.faults.total() >= rounds * 4 // 5


async def go_on(
    wire: Wire, writer: Writer, xs: Any, rng: np.random.Generator, proof: Proof
) -> None:
    """Apply a chunk and three more on a replica that is awake."""
    for chunk in (xs, *(draw(rng) for _ in range(MORE_CHUNKS))):
        writer.check(await wire.forward(writer.chunk(chunk)), chunk, proof)


@pytest.mark.timeout(300)
@pytest.mark.promise("R6", "a replica that wakes up late overwrites nothing")
@figure("rounds", 20, 200)
async def test_a_gradient_computed_before_the_pause_is_not_recorded_after_its_step(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """While it is stopped before recording, the other records the same, consumes it and goes on."""
    rng, zombie = np.random.default_rng(seed), fleet.replicas[0]
    async with Wire(fleet.addresses[0]) as paused, Wire(fleet.addresses[1]) as other:
        model = await Model.create(other, rng, f"zombie-backward-{seed}-{rounds}")
        await steady_traffic(proof, [other], model, rng, sessions=8)
        trainer = await Trainer.start(model, other, rng)
        for number in range(rounds):
            gradient = await trainer.taped(other)
            late = await stop_at(zombie, "before_count", trainer.record(paused, gradient))
            try:
                recorded = await trainer.record(other, gradient)
                taken = await trainer.step(other, trainer.update(f"{number}"))
                await trainer.whole_step(other, f"{number} more")
                head = await trainer.head(other)
            finally:
                zombie.resume()
            answer = await outcome(late)
            if recorded.replayed:
                continue  # stopped too late: it had been recorded
            proof.hit("stopped before counting")
            proof.require(getattr(answer, "replayed", False), f"{answer!r} is no replay")
            proof.require(answer.dxs == recorded.dxs, "the late answer has another dxs")
            proof.require(taken.contribution_count == 1, "more than one contribution was taken")
            none = await outcome(trainer.step(paused, trainer.update(f"{number} none")))
            proof.require(
                getattr(none, "reason", "") == "NO_GRADIENTS", f"{none!r}: recorded again"
            )
            proof.require(await trainer.head(paused) == head, "the head moved")


@pytest.mark.timeout(300)
@pytest.mark.promise("R6", "a replica that wakes up late overwrites nothing")
@figure("rounds", 20, 200)
async def test_a_step_computed_before_the_pause_is_not_made_after_it(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """While it is stopped before its step, the other makes the same one, or a rival, and one more."""
    rng, zombie = np.random.default_rng(seed), fleet.replicas[0]
    async with Wire(fleet.addresses[0]) as paused, Wire(fleet.addresses[1]) as other:
        model = await Model.create(other, rng, f"zombie-update-{seed}-{rounds}")
        await steady_traffic(proof, [other], model, rng, sessions=8)
        trainer = await Trainer.start(model, other, rng)
        for number in range(rounds):
            await trainer.record(other, await trainer.taped(other))
            base, is_rival = await trainer.head(other), bool(number % 2)
            request = trainer.update(f"{number}", base)
            late = await stop_at(zombie, "before_update", trainer.step(paused, request))
            try:
                rival = trainer.update(f"rival {number}", base) if is_rival else request
                first = await trainer.step(other, rival)
                await trainer.whole_step(other, f"{number} more")
                head = await trainer.head(other)
            finally:
                zombie.resume()
            answer = await outcome(late)
            if first.replayed:
                continue  # stopped too late: the step had been made
            proof.hit("stopped before the step")
            proof.require(first.contribution_count == 1, "more than one contribution was taken")
            if is_rival:
                proof.require(
                    getattr(answer, "reason", "") == "VERSION_CONFLICT",
                    f"{answer!r} in place of VERSION_CONFLICT",
                )
            else:
                proof.require(getattr(answer, "replayed", False), f"{answer!r} is no replay")
                proof.require(answer.version == first.version, "another version was answered")
            proof.require(await trainer.head(paused) == head, "the head moved")
