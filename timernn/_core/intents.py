"""What a caller asked for, as operations on the wire: kept until the outcome is known.

A call may end without an answer: time over, cancelled, no replica reachable. Its operations may
have been applied or not. The intent then stays "in doubt", and before anything else is sent, the
same operations are sent again with the same numbers and content; asked for once more by the
caller, the same intent is finished and answered.

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
from timernn._core.moves import Move
from timernn.types import Gradients
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.ages import Lifetime
    from timernn._core.contract import Rpc
    from timernn._core.session import SessionCore
    from timernn._core.training import Training
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
        self.came_from: Move | None = None
        self.memory: Memory | None = None
        self._applied = 0

    @property
    def done(self) -> int:
        """How many requests are answered."""
        return len(self.answers)

    @property
    def is_done(self) -> bool:
        """Whether every request is answered."""
        return self.done == len(self.requests)

    def accept(self, answer: Any) -> None:
        """Take the answer of the request that was prepared."""
        self.answers = (*self.answers, self.read(answer))
        self.apply()

    def apply(self) -> None:
        """Bring the session to where the last answer puts it; nothing if it is there already."""
        if self._applied < self.done:
            self.carry_over(self.answers[-1])
            self._applied = self.done

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
        """Tell whether the other, not sent yet, asks for the same."""

    def refused(self, error: errors.Error) -> None:
        """Take over what was done of the request that was refused; mostly nothing."""

    def step(self) -> rnn_pb.UpdateRequest | None:
        """Return the step that the next request makes, if it makes one."""
        return None

    def stepped(self) -> tuple[Step, UpdateResult] | None:
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
        """Tell whether the step may be one of those that have led to this head."""
        known = self.head
        return known is None or (head != known and head.number >= known.number)


@dataclass(frozen=True, slots=True, eq=False)
class TapedChunk:
    """A training chunk whose Backward may come: its name, its token, its T, its tape's time."""

    epoch: int
    chunk_seq: int
    token: bytes
    steps: int
    tape: Lifetime


@dataclass(frozen=True, slots=True, eq=False)
class Taped:
    """What one `forward` in training mode left for its `backward`.

    Attributes:
        chunks: Its pieces in order of time.
        has_last_only: Whether it returned the last step alone, so that dhs may be of that step.
    """

    chunks: tuple[TapedChunk, ...]
    has_last_only: bool

    @property
    def steps(self) -> int:
        """T of the whole."""
        return sum(chunk.steps for chunk in self.chunks)


@dataclass(slots=True, eq=False)  # not frozen: that costs a call a field, for every chunk
class Forwarded:
    """A Forward's answer.

    Attributes:
        request: The request, with its numbers.
        message: The answer as it came.
        version: The weights version it names.
        hs: The hidden states it brought, shape (N, T, H) or (N, 1, H); None if it brought none.
        taped: What it left for a Backward; None in inference.
        move: Where it puts the session.
    """

    request: rnn_pb.ForwardRequest
    message: rnn_pb.ForwardResponse
    version: Version
    hs: Array | None
    taped: TapedChunk | None
    move: Move


class ForwardIntent(Intent[rnn_pb.ForwardRequest, Forwarded]):
    """One `forward`: the pieces of its sequence, as consecutive chunks.

    Args:
        session: Whose.
        requests: The pieces with everything but their numbers.
    """

    rpc = FORWARD

    def __init__(self, session: SessionCore, requests: list[rnn_pb.ForwardRequest]) -> None:
        super().__init__(requests)
        self._session = session
        self._returns = [request.return_hs for request in requests]
        self._outputs = len(requests) - self._returns.count(rnn_pb.RETURN_HS_NONE)

    @property
    def is_training(self) -> bool:
        """Whether a Backward may follow."""
        return self.requests[0].mode == rnn_pb.FORWARD_MODE_TRAIN

    def prepare(self) -> rnn_pb.ForwardRequest:
        """Number the next piece after the last answered one."""
        request = self.requests[self.done]
        if not request.chunk_seq:
            self._session.number(request)
        # Also for one that was sent behind others in flight and could not name it then.
        request.previous_token = self._session.state_token
        return request

    def read(self, answer: rnn_pb.ForwardResponse) -> Forwarded:
        """Decode what was asked for; find out where it puts the session."""
        session, request = self._session, self.requests[self.done]
        sent = (request.session_id, request.epoch, request.chunk_seq)
        if (answer.session_id, answer.epoch, answer.chunk_seq) != sent:
            raise errors.Internal(f"chunk {request.chunk_seq} got the answer of {answer.chunk_seq}")
        version, taped = version_from_proto(answer.weights_version), None
        move = Move(
            chunk_seq=answer.chunk_seq, state_token=answer.state_token, _h=answer.h, version=version
        )
        if self.is_training:
            steps = request.xs.shape[1]
            tape = session.new_tape()
            taped = TapedChunk(answer.epoch, answer.chunk_seq, answer.state_token, steps, tape)
        hs = tensor_from_proto(answer.hs) if answer.HasField("hs") else None
        piece = Forwarded(request, answer, version, hs, taped, move)
        if taped is not None and self.done == len(self.requests) - 1:
            pieces = (*self.answers, piece)
            # Where outputs are missing, no gradient of them can come.
            if not self._without_output(pieces):
                chunks = tuple(each.taped for each in pieces if each.taped)
                has_last_only = self._returns[-1] == rnn_pb.RETURN_HS_LAST
                move["tapes"] = [*session.tapes, Taped(chunks, has_last_only)]
        return piece

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
        dh0: The gradient of the state before the chunk.
        norm: The global norm of the weights' gradients.
        dxs: The gradient of the inputs, shape (N, T, D); None if not asked for.
        gradients: The weights' gradients, if they were asked for.
        stepped: The step made in the same call: what was asked, what was answered.
        move: What it changes of the session; nothing before the last piece.
    """

    request: rnn_pb.BackwardRequest
    dh0: Tensor
    norm: float
    dxs: Array | None
    gradients: Gradients | None
    stepped: tuple[rnn_pb.UpdateRequest, rnn_pb.UpdateResponse] | None
    move: Move


class BackwardIntent(Intent[rnn_pb.BackwardRequest, Backwarded]):
    """One `backward`: the pieces of its Forward in reverse, chained by dh0 and dh_next.

    Args:
        session: Whose.
        taped: What the Forward left.
        requests: The pieces, the last in time first; a step to make stands in the last of them.
        step: That step, as the caller asked for it.
    """

    rpc = BACKWARD

    def __init__(
        self,
        session: SessionCore,
        taped: Taped,
        requests: list[rnn_pb.BackwardRequest],
        step: Step | None,
    ) -> None:
        super().__init__(requests)
        self._session, self.taped = session, taped
        first = requests[0]
        self._asked = (step, first.return_dxs, first.return_gradients, first.dh_next)

    def prepare(self) -> rnn_pb.BackwardRequest:
        """Give the next piece the gradient that arrives at its last state.

        Raises:
            TapeMissing: If the tape's time is over and healing has made tapes of the session again:
                the server may have forgotten that the gradient was counted, and would take it twice.
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
            request.dh_next.CopyFrom(self.answers[-1].dh0)
        return request

    def read(self, answer: rnn_pb.BackwardResponse) -> Backwarded:
        """Decode the gradients, and the step where one was made."""
        request, stepped = self.requests[self.done], None
        if answer.HasField("update"):
            update = rnn_pb.UpdateRequest()
            update.CopyFrom(request.update)  # the log's copy of the request goes without
            stepped = (update, answer.update)
        piece = Backwarded(
            request=request,
            dh0=answer.dh0,
            norm=answer.gradient_norm,
            dxs=tensor_from_proto(answer.dxs) if answer.HasField("dxs") else None,
            gradients=gradients_from_proto(answer.gradients)
            if answer.HasField("gradients")
            else None,
            stepped=stepped,
            move=Move(),
        )
        if self.done == len(self.requests) - 1:
            piece.move.update(self._result([*self.answers, piece]))
        return piece

    def refused(self, error: errors.Error) -> None:
        """Note the contribution that is recorded all the same: the next update takes it.

        The step alone was refused, or an earlier attempt had counted it and its tape is gone since. A
        tape stays until the update, so that the same backward may be asked for once more.
        """
        step, training = self.step(), self._session.training
        if error.metadata.get("recorded") == "true":
            request = rnn_pb.BackwardRequest()
            request.CopyFrom(self.requests[self.done])
            self._session.contributed(request)
        elif error.metadata.get("counted") == "true" and step and self._asked[0]:
            # Counted, and taken by a step since: by its own, it may be, which the server remembers.
            training.doubted(step, self._session, self._asked[0], self.memory)
        if isinstance(error, errors.OutcomeLost):
            training.given_up(self.requests[-1].update)
            self._session.move(Move(tapes=self._tapes_left()))

    def step(self) -> rnn_pb.UpdateRequest | None:
        """Return the step that stands in the last piece."""
        request = self.requests[self.done]
        return request.update if request.HasField("update") else None

    def stepped(self) -> tuple[Step, UpdateResult] | None:
        """Return the step made in the same call."""
        made = self.answers[-1].stepped if self.is_done else None
        step = self._asked[0]
        return None if made is None or step is None else (step, update_from_proto(made[1]))

    def _tapes_left(self) -> list[Taped]:
        return [taped for taped in self._session.tapes if taped is not self.taped]

    def carry_over(self, answer: Backwarded) -> None:
        """Note the contribution, and the step where one was made."""
        session = self._session
        session.contributed(answer.request)
        if answer.stepped is not None:
            session.training.stepped(*answer.stepped)
        session.move(answer.move)

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

    def _result(self, pieces: list[Backwarded]) -> Move:
        """Return what all the pieces together change of the session."""
        gradients = _sum([piece.gradients for piece in pieces if piece.gradients])
        norm = None if gradients is None else gradients.norm
        if len(pieces) == 1:
            norm = pieces[0].norm
        move = Move(
            tapes=self._tapes_left(),
            dh=tensor_from_proto(pieces[-1].dh0),
            gradients=gradients,
            gradient_norm=norm,
        )
        if (stepped := pieces[-1].stepped) is not None:
            result = update_from_proto(stepped[1])
            move.update(Move(last_update=result, version=result.version))
        return move


def _sum(gradients: list[Gradients]) -> Gradients | None:
    if not gradients:
        return None
    return Gradients(
        dWx=np.sum([g.dWx for g in gradients], axis=0),
        dWh=np.sum([g.dWh for g in gradients], axis=0),
        db=np.sum([g.db for g in gradients], axis=0),
    )


class UpdateIntent(Intent[rnn_pb.UpdateRequest, "Updated"]):
    """One exact `update`: named contributions on an expected head.

    Args:
        training: The model's.
        request: Complete from the beginning.
        asked: What the caller asked for: the sessions, the step, whether a head is expected, whether
            what the server lists is taken too.
    """

    rpc = UPDATE

    def __init__(
        self,
        training: Training,
        request: rnn_pb.UpdateRequest,
        asked: tuple[tuple[SessionCore, ...], Step, bool, bool],
    ) -> None:
        super().__init__([request])
        self._training, self.asked = training, asked

    def prepare(self) -> rnn_pb.UpdateRequest:
        """Return the request; it is complete from the beginning."""
        return self.requests[0]

    def read(self, answer: rnn_pb.UpdateResponse) -> Updated:
        """Decode what the step did."""
        return Updated(answer, update_from_proto(answer))

    def carry_over(self, answer: Updated) -> None:
        """Note the new head and that the contributions are consumed."""
        result = answer.result
        self._training.stepped(self.requests[0], answer.message)
        for session in self.asked[0]:
            session.move(Move(last_update=result, version=result.version))

    def refused(self, error: errors.Error) -> None:
        """Forget contributions of which nobody knows whether they wait."""
        if isinstance(error, errors.OutcomeLost):
            self._training.given_up(self.requests[0])

    def step(self) -> rnn_pb.UpdateRequest | None:
        """Return the request: it is the step."""
        return self.requests[0]

    def stepped(self) -> tuple[Step, UpdateResult] | None:
        """Return the step."""
        return (self.asked[1], self.answers[0].result) if self.is_done else None

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
    """An epoch's beginning: the session as the server told it, and its hidden state; None: zero."""

    session: session_pb.Session
    state: Tensor | None


class EpochIntent(Intent[EpochRequest, Begun]):
    """One `set_state` or `reset_state`.

    Args:
        session: Whose.
        request: Without the epoch that it ends.
        is_strict: Demand that the epoch ends with the last chunk that this client was answered.
    """

    def __init__(
        self, session: SessionCore, request: EpochRequest, *, is_strict: bool = False
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


def require_finite(array: Array, name: str) -> None:
    """Refuse NaN and infinity here, where the server would see only a piece of the array.

    Raises:
        NonFinite: If there is any; the first index is named.
    """
    finite = np.isfinite(array)
    if not finite.all():
        index = ",".join(map(str, np.argwhere(~finite)[0]))
        raise errors.NonFinite(f"{name}[{index}] is {array[tuple(np.argwhere(~finite)[0])]}")
