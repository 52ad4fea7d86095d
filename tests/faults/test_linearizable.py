"""Rivals on one session and on one model: every history is that of something that does one thing at a time."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments import session_model, training_model
from instruments.dialects import SCRIPT_CALLS
from instruments.history import Recorder, Refused
from instruments.linearizability import Outcome, check
from instruments.proxy import Faults
from scenes.figures import figure
from scenes.fleet import Fleet
from scenes.wire import H, Model, Wire, Writer, draw, head_of, outcome, steady_traffic
from timernn import errors
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import tensor_pb2
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from instruments.history import Operation
    from instruments.report import Proof

CLIENTS, CALLS = 3, 14  # of each session: a history has 42 operations
TIMEOUT_S = 20.0
# Each fault cuts a connection that several callers share: their outcomes are unknown as well.
LOSSY = Faults(drop_reply_p=0.04, reset_p=0.01)
# A server whose store lost an answer asks once more by itself, and finds its own work done.
RESENT = True

SessionRecorder = Recorder[session_model.SessionAsk, session_model.SessionAnswer]
TrainingRecorder = Recorder[training_model.TrainingAsk, training_model.TrainingAnswer]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Three replicas with proxies on both sides; nothing is ever wrong with the last one's."""
    options = ("--store-timeout-ms", "5000")
    with Fleet(3, *options, seed=10, faulty_store=True, faulty_clients=True) as running:
        yield running


def fingerprint(data: bytes) -> str:
    """Shorten bytes to what can be compared and read."""
    return hashlib.sha256(data).hexdigest()[:12]


def refused_as(error: errors.Error) -> Refused | None:
    """Return a refusal as the models know it; None where the outcome is unknown."""
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded | errors.Cancelled):
        return None
    expected = error.metadata.get("expected_seq")
    counted = error.metadata.get("counted") == "true"
    return Refused(error.reason, int(expected) if expected else None, counted)


class SessionRival:
    """One of several clients that use a session at once, each by what it last heard."""

    def __init__(
        self, name: str, wires: Sequence[Wire], direct: Wire, writer: Writer, seed: int
    ) -> None:
        """Start from the session as it was opened; `direct` is a connection without faults."""
        self._name, self._wires, self._direct = name, wires, direct
        self._writer = Writer(session_pb.Session(), writer.local)
        self._writer.session.CopyFrom(writer.session)
        self._dice, self._rng = random.Random(f"{seed} {name}"), np.random.default_rng(seed)
        # Few contents, so that rivals send now the same chunk and now another under its number.
        self._contents = [draw(self._rng) for _ in range(2)]

    async def run(self, recorder: SessionRecorder) -> None:
        """Make the calls and record what came of each."""
        for _ in range(CALLS):
            ask, call = self._draw()
            key = self._writer.session.session_id
            with recorder.calling(self._name, key, ask) as pending:
                answer = await outcome(call(self._dice.choice(self._wires)))
                known = self._read(ask, answer)
                if known is not None:
                    pending.returned(known)

    def _draw(self) -> tuple[session_model.SessionAsk, Callable[[Wire], Any]]:
        session, chance = self._writer.session, self._dice.random()
        if chance < 0.15:
            get = session_pb.GetStateRequest(session_id=session.session_id)
            return session_model.ReadSession(), lambda wire: wire.sessions.GetState(
                get, timeout=TIMEOUT_S
            )
        if chance < 0.18:
            reset = session_pb.ResetStateRequest(
                session_id=session.session_id, request_id=f"{self._dice.random()}"
            )
            # Its outcome has to be known: nobody could know the epoch that a lost one began.
            return session_model.Restart(), lambda _: self._direct.sessions.ResetState(
                reset, timeout=TIMEOUT_S
            )
        seq = max(1, session.chunk_seq + self._dice.choice((1, 1, 1, 1, 0, 2)))
        xs = self._dice.choice(self._contents)
        is_checked = seq == session.chunk_seq + 1 and self._dice.random() < 0.5
        token = session.state_token if is_checked and session.chunk_seq else b""
        request = self._writer.chunk(xs, seq, previous_token=token)
        ask = session_model.Forward(
            session.epoch, seq, fingerprint(xs.tobytes()), token.hex() or None, resent=RESENT
        )
        return ask, lambda wire: wire.rnn.Forward(request, timeout=TIMEOUT_S)

    def _read(
        self, ask: session_model.SessionAsk, answer: Any
    ) -> session_model.SessionAnswer | None:
        """Go on from an answer, and put it as the model knows it."""
        session = self._writer.session
        if isinstance(answer, errors.Error):
            if answer.reason == "EPOCH_FENCED":
                session.epoch, session.chunk_seq = int(answer.metadata["epoch"]), 0
            return refused_as(answer)
        if isinstance(ask, session_model.Forward):
            self._writer.took(answer)
            return session_model.Applied(
                answer.state_token.hex(), fingerprint(answer.h.data), answer.replayed
            )
        session.CopyFrom(answer.session)
        if isinstance(ask, session_model.Restart):
            return session_model.Restarted(session.epoch)
        return session_model.SessionAt(
            session.epoch,
            session.chunk_seq,
            session.state_token.hex() if session.chunk_seq else None,
            fingerprint(answer.state.data) if session.chunk_seq else None,
        )


class ModelRival:
    """One of several trainers of a model, with a session of its own and lost answers.

    They name what they take, also what a rival has recorded: a step over all that waits takes what it
    finds at its beginning, and what is recorded while it is under way may be left for the next.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        wires: Sequence[Wire],
        direct: Wire,
        writer: Writer,
        recorded: list[rnn_pb.BackwardRequest],
        seed: int,
    ) -> None:
        """Take the ways to the replicas: lossy ones to be recorded, a direct one to prepare.

        `recorded` is shared by the rivals: the Backwards that one of them has sent.
        """
        self._recorded = recorded
        self._name, self._model, self._wires, self._direct = name, model, wires, direct
        self._writer = writer
        self._dice = random.Random(f"{seed} {name}")
        self._rng = np.random.default_rng([seed, *name.encode()])
        self._gradients: list[tuple[training_model.Contribute, rnn_pb.BackwardRequest]] = []
        self._updates: list[tuple[training_model.Update, rnn_pb.UpdateRequest]] = []

    async def run(self, recorder: TrainingRecorder) -> None:
        """Make the calls and record what came of each."""
        for number in range(CALLS):
            ask, call = await self._draw(number)
            with recorder.calling(self._name, self._model.model_id, ask) as pending:
                answer = await outcome(call(self._dice.choice(self._wires)))
                known = self._read(ask, answer)
                if known is not None:
                    pending.returned(known)

    async def _draw(self, number: int) -> tuple[training_model.TrainingAsk, Callable[[Wire], Any]]:
        chance = self._dice.random()
        if chance < 0.15:
            get = model_pb.GetModelRequest(model_id=self._model.model_id)
            return training_model.ReadHead(), lambda wire: wire.models.GetModel(
                get, timeout=TIMEOUT_S
            )
        if chance < 0.5 and self._recorded:
            ask, update = await self._update(number)
            return ask, lambda wire: wire.rnn.Update(update, timeout=TIMEOUT_S)
        again = self._gradients and (len(self._gradients) > 5 or self._dice.random() < 0.3)
        made = self._dice.choice(self._gradients) if again else await self._gradient()
        return made[0], lambda wire: wire.rnn.Backward(made[1], timeout=TIMEOUT_S)

    async def _gradient(self) -> tuple[training_model.Contribute, rnn_pb.BackwardRequest]:
        answer = await self._direct.forward(self._writer.chunk(draw(self._rng), train=True))
        self._writer.took(answer)
        request = self._writer.backward(draw(self._rng, size=H), resent=True)
        version = training_model.Version(
            answer.weights_version.number, answer.weights_version.digest.hex()
        )
        ask = training_model.Contribute(
            contribution_name(request), fingerprint(request.dhs.data), version, resent=RESENT
        )
        self._gradients.append((ask, request))
        self._recorded.append(request)
        return ask, request

    async def _update(self, number: int) -> tuple[training_model.Update, rnn_pb.UpdateRequest]:
        if self._updates and self._dice.random() < 0.3:
            return self._dice.choice(self._updates)
        request = rnn_pb.UpdateRequest(
            model_id=self._model.model_id, request_id=f"{self._name} {number}"
        )
        taken = self._dice.sample(self._recorded[-6:], min(2, len(self._recorded)))
        for each in taken:
            request.contributions.add(
                session_id=each.session_id, epoch=each.epoch, chunk_seqs=[each.chunk_seq]
            )
        expected = None
        if self._dice.random() < 0.5:
            head = await head_of(self._direct, self._model.model_id)
            request.expected_version.CopyFrom(
                tensor_pb2.WeightsVersion(number=head[0], digest=head[1])
            )
            expected = training_model.Version(head[0], head[1].hex())
        names = frozenset(map(contribution_name, taken))
        made = (training_model.Update(request.request_id, names, expected, resent=RESENT), request)
        self._updates.append(made)
        return made

    def _read(
        self, ask: training_model.TrainingAsk, answer: Any
    ) -> training_model.TrainingAnswer | None:
        """Put an answer as the model knows it."""
        if isinstance(answer, errors.Error):
            return refused_as(answer)
        if isinstance(ask, training_model.Contribute):
            version = answer.weights_version
            return training_model.Counted(
                training_model.Version(version.number, version.digest.hex()),
                fingerprint(answer.dxs.data + answer.dh0.data),
                answer.replayed,
            )
        if isinstance(ask, training_model.Update):
            version = training_model.Version(answer.version.number, answer.version.digest.hex())
            return training_model.Updated(version, answer.contribution_count, answer.replayed)
        head = answer.model.head
        return training_model.HeadAt(training_model.Version(head.number, head.digest.hex()))


def contribution_name(request: rnn_pb.BackwardRequest) -> str:
    """Name a contribution as the model does."""
    return f"{request.session_id} {request.epoch} {request.chunk_seq}"


def judge(histories: dict[str, list[Operation[Any, Any]]], model_of: Any, proof: Proof) -> None:
    """Check every history, in time."""
    fenced = 0
    for key, history in histories.items():
        proof.checked(len(history) - 1)
        verdict = check(history, model_of(key))
        if verdict.outcome is Outcome.VIOLATION:
            verdict = check(list(map(fenced_midway, history)), model_of(key))
            fenced += 1
        proof.require(verdict.outcome is Outcome.OK, f"{key}: {verdict}")
        unknown = sum(operation.answer is None for operation in history)
        proof.figures["unknown outcomes"] = proof.figures.get("unknown outcomes", 0) + unknown
    proof.figures["fenced midway"] = proof.figures.get("fenced midway", 0) + fenced
    # Else it would not be the rare case that it is taken for.
    proof.require(fenced <= 1 + len(histories) // 50, f"{fenced} were fenced midway")
    proof.figures["histories"] = proof.figures.get("histories", 0) + len(histories)


def fenced_midway(operation: Operation[Any, Any]) -> Operation[Any, Any]:
    """Let a chunk that was fenced have been applied before.

    The store's answer to its commit was lost, a rival ended the epoch, and the server, asking again,
    finds the new epoch: it cannot know any more. The chunk's epoch is over either way.
    """
    is_fenced = isinstance(operation.answer, Refused) and operation.answer.reason == "EPOCH_FENCED"
    if not is_fenced or not isinstance(operation.ask, session_model.Forward):
        return operation
    return replace(operation, answer=None, return_time=math.inf)


def count_faults(fleet: Fleet, proof: Proof, sign: int) -> None:
    """Add or take away what the proxies have done so far."""
    for side, proxies in (("client", fleet.client_proxies), ("store", fleet.store_proxies)):
        for proxy in proxies:
            for fault in ("drop_reply", "reset"):
                proof.hit(f"{side} {fault}", sign * proxy.counts[fault])


@pytest.mark.timeout(600)
@pytest.mark.promise("R10", "histories are linearizable per session and per model")
@figure("sessions", 150, 600)
async def test_rivals_on_a_session_see_one_thing_at_a_time(
    fleet: Fleet, proof: Proof, seed: int, sessions: int
) -> None:
    """Three clients send chunks, reset and read one session over both replicas with lost answers."""
    rng, recorder = np.random.default_rng(seed), SessionRecorder()
    async with AsyncExitStack() as stack:
        wires, direct = await connections(fleet, stack)
        model = await Model.create(direct, rng, f"sessions-{seed}-{sessions}")
        await steady_traffic(proof, wires, model, rng)
        writers = [await model.open(direct) for _ in range(sessions)]
        count_faults(fleet, proof, -1)
        let_answers_be_lost(fleet)
        for at in range(0, sessions, 25):
            await asyncio.gather(
                *(
                    SessionRival(f"c{k}", wires, direct, writer, seed + at + n).run(recorder)
                    for n, writer in enumerate(writers[at : at + 25])
                    for k in range(CLIENTS)
                )
            )
        fleet.heal()
        count_faults(fleet, proof, 1)
    epochs = {writer.session.session_id: writer.session.epoch for writer in writers}
    histories = {key: dense(history, epochs[key]) for key, history in recorder.histories().items()}
    judge(histories, lambda _: session_model.SessionModel(epoch=0), proof)


def dense(history: list[Operation[Any, Any]], first: int) -> list[Operation[Any, Any]]:
    """Number epochs from 0: the service's are times, the model's follow one another."""
    seen = {first}
    for operation in history:
        seen |= {
            value.epoch
            for value in (operation.ask, operation.answer)
            if value is not None and hasattr(value, "epoch")
        }
    number = {epoch: n for n, epoch in enumerate(sorted(seen))}

    def renumbered(value: Any) -> Any:
        return replace(value, epoch=number[value.epoch]) if hasattr(value, "epoch") else value

    return [
        replace(each, ask=renumbered(each.ask), answer=renumbered(each.answer)) for each in history
    ]


async def connections(fleet: Fleet, stack: AsyncExitStack) -> tuple[list[Wire], Wire]:
    """Open several lossy connections to each replica, and one that loses nothing."""
    lossy = [
        await stack.enter_async_context(Wire(address))
        for address in fleet.addresses[:2]
        for _ in range(8)
    ]
    return lossy, await stack.enter_async_context(Wire(fleet.replicas[2].address))


def let_answers_be_lost(fleet: Fleet) -> None:
    """Disturb all replicas but the last, on both sides."""
    for proxy in fleet.client_proxies[:2]:
        proxy.set(LOSSY)
    for proxy in fleet.store_proxies[:2]:
        proxy.set(Faults(drop_reply_p=0.1, only=SCRIPT_CALLS))


@pytest.mark.timeout(600)
@pytest.mark.promise("R10", "histories are linearizable per session and per model")
@figure("models", 50, 200)
async def test_rival_trainers_of_a_model_see_one_thing_at_a_time(
    fleet: Fleet, proof: Proof, seed: int, models: int
) -> None:
    """Three trainers count gradients, make steps and read the head of one model, with lost answers."""
    rng, recorder = np.random.default_rng(seed), TrainingRecorder()
    starts: dict[str, training_model.Version] = {}
    async with AsyncExitStack() as stack:
        wires, direct = await connections(fleet, stack)
        traffic = await Model.create(direct, rng, f"traffic-{seed}-{models}")
        await steady_traffic(proof, wires, traffic, rng)
        made = [await Model.create(direct, rng, f"r{seed}-{models}-{k}") for k in range(models)]
        rivals = []
        for number, model in enumerate(made):
            head = await head_of(direct, model.model_id)
            starts[model.model_id] = training_model.Version(head[0], head[1].hex())
            recorded: list[rnn_pb.BackwardRequest] = []
            for k in range(CLIENTS):
                writer = await model.open(direct)
                rivals.append(
                    ModelRival(f"c{k}", model, wires, direct, writer, recorded, seed + number)
                )
        count_faults(fleet, proof, -1)
        let_answers_be_lost(fleet)
        for at in range(0, len(rivals), 60):
            await asyncio.gather(*(rival.run(recorder) for rival in rivals[at : at + 60]))
        fleet.heal()
        count_faults(fleet, proof, 1)
    judge(recorder.histories(), lambda key: training_model.ModelModel(starts[key]), proof)
