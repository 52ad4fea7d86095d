"""Writers of an older epoch: whatever they have under way, it does not reach the new epoch."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.processes import wait_until
from instruments.proxy import Faults, Link
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import (
    H,
    Model,
    N,
    Wire,
    answer_of,
    draw,
    is_close,
    outcome,
    refusal,
    state_of,
    steady_traffic,
)
from timernn._core.convert import tensor_to_proto
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.proxy import FaultProxy
    from instruments.report import Proof
    from scenes.wire import Writer

KINDS = ("reset", "set state", "close and open")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two replicas, each with a proxy before the store."""
    with Fleet(2, "--store-timeout-ms", "30000", faulty_store=True) as running:
        yield running


async def begin_epoch(kind: str, wire: Wire, writer: Writer, state: Any) -> session_pb.Session:
    """End the session's epoch in one of three ways; return the session in its new one."""
    session_id = writer.session.session_id
    if kind == "reset":
        reset = session_pb.ResetStateRequest(session_id=session_id)
        answer = await answer_of(wire.sessions.ResetState(reset, timeout=60))
    elif kind == "set state":
        given = session_pb.SetStateRequest(session_id=session_id, state=tensor_to_proto(state))
        answer = await answer_of(wire.sessions.SetState(given, timeout=60))
    else:
        close = session_pb.CloseSessionRequest(session_id=session_id)
        await answer_of(wire.sessions.CloseSession(close, timeout=60))
        opening = session_pb.OpenSessionRequest(
            model_id=writer.session.model_id, session_id=session_id, batch_size=N
        )
        answer = await answer_of(wire.sessions.OpenSession(opening, timeout=60))
    session: session_pb.Session = answer.session
    return session


@pytest.mark.timeout(300)
@pytest.mark.promise("R7", "reset, set_state and a session begun again fence old writers")
@figure("rounds", 102, 600)
async def test_a_commit_on_its_way_when_the_epoch_ends_is_fenced(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """A computed chunk waits on one replica's way to the store while the other ends its epoch."""
    rng = np.random.default_rng(seed)
    slow = fleet.store_proxies[0]
    async with Wire(fleet.addresses[0]) as old, Wire(fleet.addresses[1]) as new:
        model = await Model.create(old, rng, f"fence-{seed}-{rounds}")
        writers = await steady_traffic(proof, [old, new], model, rng)
        for number in range(rounds):
            kind, writer = KINDS[number % 3], writers[number % len(writers)]
            # Warm on the replica that is to be late: what waits below is the commit.
            xs = draw(rng)
            writer.check(await old.forward(writer.chunk(xs)), xs, proof)
            stale = writer.chunk(draw(rng))
            state = rng.standard_normal((N, H)).astype(np.float32)
            late = await stalled(slow, old, stale)
            before, epoch = proof.operations, writer.session.epoch
            session = await begin_epoch(kind, new, writer, state)
            slow.set(Faults())
            fenced = await refusal(late)
            proof.hit(f"commit late for a {kind}")
            proof.require(fenced.reason == "EPOCH_FENCED", f"{kind}: {fenced!r}, not EPOCH_FENCED")
            proof.require(session.epoch > epoch, "the epoch did not grow")
            for wire in (old, new):
                again = await refusal(wire.forward(stale))
                proof.require(again.reason == "EPOCH_FENCED", f"{kind}, sent again: {again!r}")
            info, h = await state_of(new, writer.session.session_id)
            wanted = state if kind == "set state" else np.zeros_like(state)
            proof.require(np.array_equal(h, wanted), f"{kind}: the old chunk moved the new state")
            proof.require(info.chunk_seq == 0, f"{kind}: the old chunk moved the session")
            writer.session.CopyFrom(session)
            writer.local.set_state(wanted.copy())
            xs = draw(rng)
            writer.check(await old.forward(writer.chunk(xs)), xs, proof)
            assert proof.operations > before


async def stalled(slow: FaultProxy, wire: Wire, request: Any) -> asyncio.Task[Any]:
    """Send a chunk and wait until its commit stands before the stalled store."""
    slow.set(Faults(up=Link(stall=True)))
    hits = slow.counts["stall"]
    task = asyncio.create_task(wire.forward(request))
    await asyncio.to_thread(
        wait_until, "the commit to stall", lambda: slow.counts["stall"] > hits, 30
    )
    return task


@pytest.mark.timeout(300)
@pytest.mark.promise("R7", "reset, set_state and a session begun again fence old writers")
@figure("rounds", 100, 600)
async def test_a_chunk_racing_a_reset_is_applied_before_it_or_fenced(
    fleet: Fleet, proof: Proof, seed: int, rounds: int
) -> None:
    """Forward and Reset start together on two replicas: one order of the two explains what is left."""
    rng = np.random.default_rng(seed)
    async with Wire(fleet.addresses[0]) as one, Wire(fleet.addresses[1]) as other:
        model = await Model.create(one, rng, f"race-{seed}-{rounds}")
        writers = await steady_traffic(proof, [one, other], model, rng)
        for number in range(rounds):
            writer = writers[number % len(writers)]
            xs, session_id = draw(rng), writer.session.session_id
            expected = int(rng.integers(2))
            reset = session_pb.ResetStateRequest(session_id=session_id)
            if expected:  # of the two, only one can then win
                reset.expected_chunk_seq = writer.session.chunk_seq
            wires = (one, other) if number % 2 else (other, one)
            forward, fence = await asyncio.gather(
                outcome(wires[0].forward(writer.chunk(xs))),
                outcome(wires[1].sessions.ResetState(reset, timeout=60)),
            )
            proof.hit("race")
            reasons = [getattr(each, "reason", "") for each in (forward, fence)]
            allowed = [["", ""], ["EPOCH_FENCED", ""]]
            if expected:
                allowed = [["", "SEQ_GAP"], ["EPOCH_FENCED", ""]]
            proof.require(reasons in allowed, f"{reasons} is no order of the two")
            if not reasons[0]:
                writer.check(forward, xs, proof)
            if not reasons[1]:
                writer.local.reset_state()
                writer.session.CopyFrom(fence.session)
            session, h = await state_of(wires[0], session_id)
            local = writer.local.h
            wanted = np.zeros_like(h) if local is None else local
            proof.require(is_close(h, wanted), "the state is that of no order of the two")
            proof.require(session.chunk_seq == writer.session.chunk_seq, "another place")
