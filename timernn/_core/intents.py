"""What a caller asked for, as operations on the wire: an intent is kept until its outcome is known.

A call may end without an answer: time over, cancelled, no replica reachable. Its operations may
have been applied or not: the intent is "in doubt". Before anything else is sent, the same operations
are sent again with the same numbers and content; asked for once more by the caller, the same intent
is finished and answered (`doubts`).

An exception may come between any two steps of this code: a signal's, a time limit's. So an answer
is taken in two halves. The first decodes and checks all of it and ends by noting it in one
assignment: that is the moment from which it is answered. The second brings the session to where the
answer puts it; it only assigns what the first has made, and is repeated when it was interrupted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import numpy as np

from timernn import errors
from timernn._core.contract import BACKWARD, FORWARD, RESET_STATE, SET_STATE, UPDATE
from timernn._core.convert import (
    gradients_from_proto,
    join_steps,
    tensor_from_proto,
    update_from_proto,
    version_from_proto,
)
from timernn._core.refusals import Proof, proof_of
from timernn._core.session_state import BackwardResult, Forwarded, Taped, TapedChunk
from timernn.types import Gradients
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.ages import Lifetime
    from timernn._core.contract import Rpc
    from timernn._core.model_state import ModelState
    from timernn._core.session_state import Position, SessionState
    from timernn.types import Array, Step, UpdateResult, Version
    from timernn.v1.tensor_pb2 import Tensor


EpochRequest: TypeAlias = session_pb.SetStateRequest | session_pb.ResetStateRequest
Q = TypeVar("Q")
A = TypeVar("A")


class Intent(ABC, Generic[Q, A]):
    """Operations that belong together and are carried out in order.

    Attributes:
        rpc: The method of all its requests.
        requests: What is sent, in order.
        answers: What came back, decoded, one for each answered request.
        is_wanted: Whether its caller may still ask for the same again and mean this.
        is_refused: Whether the rest of it was refused after a part had been applied.
        may_be_applied: Whether an attempt had an unknown outcome.
        came_from: Where the session stood before it went back for this; None if it did not.
        memory: How long the server surely remembers the step that it makes, since it was first sent.
        needs_history: Whether they continue what was applied before them, which is then healed.
    """

    rpc: Rpc[Any, Any]
    needs_history = True

    def __init__(self, requests: Sequence[Q]) -> None:
        self.requests = requests
        self.answers: tuple[A, ...] = ()
        self.is_wanted, self.is_refused, self.may_be_applied = True, False, False
        self.came_from: Position | None = None
        self.memory: Memory | None = None
        self._applied = 0

    @property
    def done(self) -> int:
        """How many requests are answered."""
        return len(self.answers)

    @property
    def is_done(self) -> bool:
        """Whether every request is answered."""
        return len(self.answers) == len(self.requests)

    def accept(self, answer: Any) -> None:
        """Take the answer of the request that was prepared."""
        self.answers = (*self.answers, self.read(answer))
        self.apply()

    def apply(self) -> None:
        """Bring the session to where the last answer puts it; nothing if it is there already."""
        done = len(self.answers)
        if self._applied < done:
            self.carry_over(self.answers[-1])
            self._applied = done

    def note_failure(self, error: errors.Error) -> None:
        """Note how an attempt failed: where the error proves nothing, it may be applied."""
        if proof_of(error) is Proof.NOTHING:
            self.may_be_applied = True

    @abstractmethod
    def prepare(self) -> Q:
        """Return the next request with its numbers; the same each time until it is accepted."""

    @abstractmethod
    def read(self, answer: Any) -> A:
        """Decode and check an answer and all that follows from it; nothing is changed."""

    @abstractmethod
    def carry_over(self, answer: A) -> None:
        """Change the session by what `read` returned; may be interrupted and done again."""

    @abstractmethod
    def is_same(self, other: Intent[Any, Any]) -> bool:
        """Return whether the other, not sent yet, asks for the same."""

    def refused(self, error: errors.Error) -> UpdateIntent | None:
        """Take over what was done of the request that was refused; mostly nothing.

        Returns:
            A step which may have been made all the same, to be asked for by itself.
        """

    def step(self) -> rnn_pb.UpdateRequest | None:
        """Return the step that the next request makes, if it makes one."""
        return None

    def step_made(self) -> tuple[Step, UpdateResult] | None:
        """Return the step that it has made: what was asked for, and what came of it."""
        return None


@dataclass(frozen=True, slots=True)
class Memory:
    """The server's memory of a step: it ends some time after the step.

    Attributes:
        lifetime: From when it was first sent.
        head: The version that was known then.
    """

    lifetime: Lifetime
    head: Version | None

    def may_have_missed(self, head: Version) -> bool:
        """Return whether the step may be one of those that have led to this head."""
        known = self.head
        return known is None or (head != known and head.number >= known.number)


class ForwardIntent(Intent[rnn_pb.ForwardRequest, Forwarded]):
    """One `forward`: the pieces of its sequence, as consecutive chunks.

    Args:
        session: The session that it moves on.
        requests: The pieces with everything but their numbers.
    """

    rpc = FORWARD

    def __init__(self, session: SessionState, requests: list[rnn_pb.ForwardRequest]) -> None:
        super().__init__(requests)
        self._session = session
        self._is_training = requests[0].mode == rnn_pb.FORWARD_MODE_TRAIN
        self._returns = [request.return_hs for request in requests]
        self._outputs = len(requests) - self._returns.count(rnn_pb.RETURN_HS_NONE)

    def prepare(self) -> rnn_pb.ForwardRequest:
        """Number the next piece after the last answered one."""
        request = self.requests[len(self.answers)]
        if not request.chunk_seq:
            self._session.number(request)
        # Also for one that was sent behind others in flight and could not name it then.
        request.previous_token = self._session.state_token
        return request

    def read(self, answer: rnn_pb.ForwardResponse) -> Forwarded:
        """Decode what was asked for, and find out what is left for a Backward."""
        request = self.requests[len(self.answers)]
        sent = (request.session_id, request.epoch, request.chunk_seq)
        if (answer.session_id, answer.epoch, answer.chunk_seq) != sent:
            raise errors.Internal(f"chunk {request.chunk_seq} got the answer of {answer.chunk_seq}")
        version = version_from_proto(answer.weights_version)
        hs = tensor_from_proto(answer.hs) if answer.HasField("hs") else None
        piece = Forwarded(request, answer, version, hs, None, None)
        if self._is_training:
            piece.taped = TapedChunk(
                answer.epoch,
                answer.chunk_seq,
                answer.state_token,
                steps=request.xs.shape[1],
                tape=self._session.new_tape(),
            )
            piece.whole = self._whole_tape((*self.answers, piece))
        return piece

    def _whole_tape(self, pieces: Sequence[Forwarded]) -> Taped | None:
        """Join the pieces' tapes once all are there; without all outputs no gradient can come."""
        if len(pieces) < len(self.requests) or self._without_output(pieces):
            return None
        chunks = tuple(piece.taped for piece in pieces if piece.taped)
        return Taped(chunks, has_last_only=self._returns[-1] == rnn_pb.RETURN_HS_LAST)

    def carry_over(self, answer: Forwarded) -> None:
        """Advance the session."""
        self._session.advance(answer)

    def is_same(self, other: Intent[Any, Any]) -> bool:
        """Compare mode, what is returned and every input bit."""
        if not isinstance(other, ForwardIntent) or self._returns != other._returns:  # noqa: SLF001
            return False
        return all(
            (mine.mode, mine.xs) == (theirs.mode, theirs.xs)
            for mine, theirs in zip(self.requests, other.requests, strict=True)
        )

    def hs(self) -> Array:
        """Return the hidden states asked for, shape (N, T, H), (N, 1, H) or (N, 0, H).

        Raises:
            ReplayWindowPassed: If they cannot be had any more, though all is applied.
        """
        session = self._session
        pieces = [answer.hs for answer in self.answers if answer.hs is not None]
        if len(pieces) < self._outputs:
            missing = self._without_output(self.answers)
            raise errors.ReplayWindowPassed(
                f"chunk {missing[0]} was applied, but what its outputs are computed from is not kept any "
                f"more: session {session.session_id!r} goes on after chunk "
                f"{self.answers[-1].request.chunk_seq}",
                metadata={"applied": "true", "chunk_seq": str(missing[0])},
            )
        none = (session.batch_size, 0, session.model.hidden_size)
        return join_steps(pieces, none, session.model.dtype)

    def _without_output(self, answers: Sequence[Forwarded]) -> list[int]:
        """Number the chunks that were answered without the outputs which were asked for."""
        return [
            answer.request.chunk_seq
            for answer, wanted in zip(answers, self._returns, strict=False)
            if answer.hs is None and wanted != rnn_pb.RETURN_HS_NONE
        ]


def wants_less(request: object, error: errors.Error) -> bool:
    """Let a chunk that was applied too long ago to be computed again be answered without outputs.

    Its state and token are still on record, and bring the session to where it stands on the server.

    Returns:
        Whether the request, changed by this, is to be sent again.
    """
    is_applied = error.metadata.get("applied") == "true"
    if not (isinstance(error, errors.ReplayWindowPassed) and is_applied):
        return False
    if not isinstance(request, rnn_pb.ForwardRequest) or not request.session_id:
        return False
    if request.return_hs == rnn_pb.RETURN_HS_NONE:
        return False
    request.return_hs = rnn_pb.RETURN_HS_NONE
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Backwarded:
    """A Backward's answer.

    Attributes:
        request: The request.
        message: The answer as it came.
        dxs: The gradient of the inputs, shape (N, T, D); None if not asked for.
        gradients: The weights' gradients, if they were asked for.
        update: The request of the step made in the same call; None if none was made.
        result: What the pieces gave together, with the last of them.
    """

    request: rnn_pb.BackwardRequest
    message: rnn_pb.BackwardResponse
    dxs: Array | None
    gradients: Gradients | None
    update: rnn_pb.UpdateRequest | None
    result: BackwardResult | None


class BackwardIntent(Intent[rnn_pb.BackwardRequest, Backwarded]):
    """One `backward`: the pieces of its Forward in reverse, chained by dh0 and dh_next.

    Args:
        session: The session that it contributes for.
        taped: What the Forward left.
        requests: The pieces, the last in time first; a step to make stands in the last of them.
        model: The model's shared state.
        step: That step, as the caller asked for it.
    """

    rpc = BACKWARD

    def __init__(
        self,
        session: SessionState,
        taped: Taped,
        requests: list[rnn_pb.BackwardRequest],
        *,
        model: ModelState,
        step: Step | None,
    ) -> None:
        super().__init__(requests)
        self._session, self._model, self.taped = session, model, taped
        first = requests[0]
        self._asked = (step, first.return_dxs, first.return_gradients, first.dh_next)

    def prepare(self) -> rnn_pb.BackwardRequest:
        """Give the next piece the gradient that arrives at its last state.

        Raises:
            TapeMissing: If the tape's time is over and healing has made tapes of the session again:
                the server may have forgotten that the gradient was recorded, and would take it twice.
        """
        request = self.requests[self.done]
        tape = self.taped.chunks[-1 - self.done].tape
        if tape.is_over and self._session.lifetime.was_healed:
            raise errors.TapeMissing(
                f"the forward of chunk {request.chunk_seq} was {tape.age_s:.0f} s ago; its tape can be "
                f"used for {tape.ttl_s:.0f} s",
                metadata={"chunk_seq": str(request.chunk_seq)},
            )
        if self.answers:
            request.dh_next.CopyFrom(self.answers[-1].message.dh0)
        return request

    def read(self, answer: rnn_pb.BackwardResponse) -> Backwarded:
        """Decode the gradients, and the step where one was made."""
        request, update = self.requests[self.done], None
        if answer.HasField("update"):
            update = rnn_pb.UpdateRequest()
            update.CopyFrom(request.update)  # the journal's copy of the request goes without
        gradients = None
        if answer.HasField("gradients"):
            gradients = gradients_from_proto(answer.gradients)
        is_last = self.done == len(self.requests) - 1
        return Backwarded(
            request=request,
            message=answer,
            dxs=tensor_from_proto(answer.dxs) if answer.HasField("dxs") else None,
            gradients=gradients,
            update=update,
            result=self._joined(answer, gradients) if is_last else None,
        )

    def _joined(self, last: rnn_pb.BackwardResponse, gradients: Gradients | None) -> BackwardResult:
        """Return what all the pieces gave together, with the last answer and its gradients."""
        found = (*(piece.gradients for piece in self.answers), gradients)
        whole = _sum([each for each in found if each is not None])
        norm = None if whole is None else whole.norm
        return BackwardResult(
            taped=self.taped,
            dh=tensor_from_proto(last.dh0),
            gradients=whole,
            gradient_norm=norm if self.answers else last.gradient_norm,
            update=update_from_proto(last.update) if last.HasField("update") else None,
        )

    def carry_over(self, answer: Backwarded) -> None:
        """Note the contribution, and the step where one was made."""
        self._session.record_contribution(answer.request)
        if answer.update is not None:
            self._model.note_step(answer.update, answer.message.update)
        if answer.result is not None:
            self._session.finish_backward(answer.result)

    def refused(self, error: errors.Error) -> UpdateIntent | None:
        """Note the contribution that is recorded all the same: the next update takes it.

        The step alone was refused, or an earlier attempt had recorded it and its tape is gone since. A
        tape stays until the update, so that the same backward may be asked for once more.
        """
        update, step = self.step(), self._asked[0]
        if isinstance(error, errors.OutcomeLost):
            self._model.abandon_step(self.requests[-1].update)
            self._session.drop_tape(self.taped)
        elif error.metadata.get("recorded") == "true":
            request = rnn_pb.BackwardRequest()
            request.CopyFrom(self.requests[self.done])
            self._session.record_contribution(request)
        elif error.metadata.get("counted") == "true" and update is not None and step is not None:
            # Recorded, and taken by a step since: by its own, it may be, which the server remembers.
            asked = AskedUpdate((self._session,), step)
            intent = UpdateIntent(self._model, update, asked)
            intent.may_be_applied, intent.memory = True, self.memory
            return intent
        return None

    def step(self) -> rnn_pb.UpdateRequest | None:
        """Return the step that stands in the last piece."""
        request = self.requests[self.done]
        return request.update if request.HasField("update") else None

    def step_made(self) -> tuple[Step, UpdateResult] | None:
        """Return the step made in the same call."""
        result, step = self.answers[-1].result if self.answers else None, self._asked[0]
        if result is None or result.update is None or step is None:
            return None
        return step, result.update

    def is_same(self, other: Intent[Any, Any]) -> bool:
        """Compare the tape, every gradient bit and the options."""
        if not isinstance(other, BackwardIntent) or self.taped is not other.taped:
            return False
        return self._asked == other._asked and all(  # noqa: SLF001
            mine.dhs == theirs.dhs
            for mine, theirs in zip(self.requests, other.requests, strict=True)
        )

    def dxs(self) -> Array:
        """Return the gradient of the inputs, shape (N, T, D), or (N, 0, D) if not asked for."""
        session = self._session
        none = (session.batch_size, 0, session.model.input_size)
        pieces = [answer.dxs for answer in reversed(self.answers) if answer.dxs is not None]
        return join_steps(pieces, none, session.model.dtype)


def _sum(gradients: list[Gradients]) -> Gradients | None:
    if not gradients:
        return None
    return Gradients(
        dWx=np.sum([g.dWx for g in gradients], axis=0),
        dWh=np.sum([g.dWh for g in gradients], axis=0),
        db=np.sum([g.db for g in gradients], axis=0),
    )


@dataclass(frozen=True, slots=True)
class AskedUpdate:
    """What the caller of an `update` asked for, by which it is known when asked for again.

    Attributes:
        sessions: Whose contributions; a session equals itself alone.
        step: The learning rate, clipping and reduction.
        expect_known: Whether the head has to be the version that this client has seen last.
        take_waiting: Whether what the server lists of the sessions is taken too.
    """

    sessions: tuple[SessionState, ...]
    step: Step
    expect_known: bool = True
    take_waiting: bool = False


class UpdateIntent(Intent[rnn_pb.UpdateRequest, "Updated"]):
    """One exact `update`: named contributions on an expected head.

    Args:
        model: The model's shared state.
        request: Complete from the beginning.
        asked: What the caller asked for.
    """

    rpc = UPDATE

    def __init__(
        self, model: ModelState, request: rnn_pb.UpdateRequest, asked: AskedUpdate
    ) -> None:
        super().__init__([request])
        self._model, self.asked = model, asked

    def prepare(self) -> rnn_pb.UpdateRequest:
        """Return the request; it is complete from the beginning."""
        return self.requests[0]

    def read(self, answer: rnn_pb.UpdateResponse) -> Updated:
        """Decode what the step did."""
        return Updated(answer, update_from_proto(answer))

    def carry_over(self, answer: Updated) -> None:
        """Note the new head and that the contributions are consumed."""
        self._model.note_step(self.requests[0], answer.message)
        for session in self.asked.sessions:
            session.note_update(self.asked.step, answer.result)

    def refused(self, error: errors.Error) -> UpdateIntent | None:
        """Forget contributions of which nobody knows whether they wait."""
        if isinstance(error, errors.OutcomeLost):
            self._model.abandon_step(self.requests[0])
        return None

    def step(self) -> rnn_pb.UpdateRequest | None:
        """Return the request: it is the step."""
        return self.requests[0]

    def step_made(self) -> tuple[Step, UpdateResult] | None:
        """Return the step."""
        return (self.asked.step, self.answers[0].result) if self.is_done else None

    def is_same(self, other: Intent[Any, Any]) -> bool:
        """Compare what was asked for: what waited then may be consumed by now."""
        return isinstance(other, UpdateIntent) and self.asked == other.asked


@dataclass(frozen=True, slots=True, eq=False)
class Updated:
    """An Update's answer, as it came and decoded."""

    message: rnn_pb.UpdateResponse
    result: UpdateResult


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """An epoch's beginning: the session as the server describes it, and its hidden state; None: zero."""

    session: session_pb.Session
    state: Tensor | None


class EpochIntent(Intent[EpochRequest, Begun]):
    """One `set_state` or `reset_state`.

    Args:
        session: The session that begins anew.
        request: Without the epoch that it ends.
        is_strict: Demand that the epoch ends with the last chunk that this client was answered.
    """

    def __init__(
        self, session: SessionState, request: EpochRequest, *, is_strict: bool = False
    ) -> None:
        super().__init__([request])
        self._session, self._is_strict = session, is_strict
        self.needs_history = is_strict
        self.rpc = SET_STATE if isinstance(request, session_pb.SetStateRequest) else RESET_STATE

    def prepare(self) -> EpochRequest:
        """Say which epoch is to end."""
        request = self.requests[0]
        if not request.expected_epoch:
            request.expected_epoch = self._session.epoch
            if self._is_strict:
                request.expected_chunk_seq = self._session.chunk_seq
        return request

    def read(self, answer: session_pb.SetStateResponse | session_pb.ResetStateResponse) -> Begun:
        """Take the new epoch's beginning."""
        request = self.requests[0]
        state = request.state if isinstance(request, session_pb.SetStateRequest) else None
        return Begun(answer.session, state)

    def carry_over(self, answer: Begun) -> None:
        """Begin the new epoch."""
        self._session.begin(answer.session, answer.state)

    def is_same(self, other: Intent[Any, Any]) -> bool:
        """Compare the state to set."""
        if not isinstance(other, EpochIntent) or self.rpc is not other.rpc:
            return False
        mine, theirs = self.requests[0], other.requests[0]
        if isinstance(mine, session_pb.ResetStateRequest):
            return True
        return isinstance(theirs, session_pb.SetStateRequest) and mine.state == theirs.state
