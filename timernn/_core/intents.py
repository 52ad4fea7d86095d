"""What a caller asked for, as operations on the wire: kept until the outcome is known.

A call may end without an answer: time over, cancelled, no replica reachable. Its operations may
have been applied or not. The intent then stays "in doubt", and before anything else is sent, the
same operations are sent again with the same numbers and content; asked for once more by the
caller, the same intent is finished and answered.
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
)
from timernn.types import Gradients
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.contract import Rpc
    from timernn._core.session import SessionCore
    from timernn._core.training import Training
    from timernn.types import Array, Step, UpdateResult


EpochRequest: TypeAlias = session_pb.SetStateRequest | session_pb.ResetStateRequest
Q = TypeVar("Q")


class Intent(ABC, Generic[Q]):
    """Operations that belong together and are carried out in order.

    Attributes:
        rpc: The method of all its requests.
        requests: What is sent, in order.
        done: How many are answered.
    """

    rpc: Rpc[Any, Any]

    def __init__(self, requests: Sequence[Q]) -> None:
        self.requests, self.done = requests, 0

    @property
    def is_done(self) -> bool:
        """Whether every request is answered."""
        return self.done == len(self.requests)

    @abstractmethod
    def prepare(self) -> Q:
        """Return the next request with its numbers; the same each time until it is accepted."""

    @abstractmethod
    def accept(self, answer: Any) -> None:
        """Take the answer of the request that was prepared."""

    @abstractmethod
    def is_same(self, other: Intent[Any]) -> bool:
        """Tell whether the other, not sent yet, asks for the same."""

    def refused(self, error: errors.Error) -> None:
        """Take over what was done of the request that was refused; mostly nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class TapedChunk:
    """A training chunk whose Backward may come: its name, its token and its T."""

    epoch: int
    chunk_seq: int
    token: bytes
    steps: int


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


class ForwardIntent(Intent[rnn_pb.ForwardRequest]):
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
        self._hs: list[Array] = []
        self._taped: list[TapedChunk] = []

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

    def accept(self, answer: rnn_pb.ForwardResponse) -> None:
        """Advance the session; keep what was asked for."""
        request = self.requests[self.done]
        self.done += 1
        if answer.HasField("hs"):
            self._hs.append(tensor_from_proto(answer.hs))
        self._session.advance(request, answer)
        if self.is_training:
            steps = request.xs.shape[1]
            chunk = TapedChunk(answer.epoch, answer.chunk_seq, answer.state_token, steps)
            self._taped.append(chunk)
            if self.is_done:
                has_last_only = self._returns[-1] == rnn_pb.RETURN_HS_LAST
                self._session.tapes.append(Taped(tuple(self._taped), has_last_only))

    def is_same(self, other: Intent[Any]) -> bool:
        """Compare mode, what is returned and every input bit."""
        if not isinstance(other, ForwardIntent) or self._returns != other._returns:  # noqa: SLF001
            return False
        return all(
            (mine.mode, mine.xs) == (theirs.mode, theirs.xs)
            for mine, theirs in zip(self.requests, other.requests, strict=True)
        )

    def hs(self) -> Array:
        """Return the hidden states asked for, shape (N, T, H), (N, 1, H) or (N, 0, H)."""
        session = self._session
        none = (session.batch_size, 0, session.model.hidden_size)
        return join_steps(self._hs, none, session.model.dtype)


class BackwardIntent(Intent[rnn_pb.BackwardRequest]):
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
        self._session, self._taped = session, taped
        first = requests[0]
        self._asked = (step, first.return_dxs, first.return_gradients, first.dh_next)
        self._dxs: list[Array] = []
        self._gradients: list[Gradients] = []
        self._norms: list[float] = []
        self._dh = first.dh_next if first.HasField("dh_next") else None

    def prepare(self) -> rnn_pb.BackwardRequest:
        """Give the next piece the gradient that arrives at its last state."""
        request = self.requests[self.done]
        if self._dh is not None:
            request.dh_next.CopyFrom(self._dh)
        return request

    def accept(self, answer: rnn_pb.BackwardResponse) -> None:
        """Keep the gradients; note the contribution, and the step where one was made."""
        request = self.requests[self.done]
        self.done += 1
        self._dh = answer.dh0
        self._norms.append(answer.gradient_norm)
        if answer.HasField("dxs"):
            self._dxs.insert(0, tensor_from_proto(answer.dxs))
        if answer.HasField("gradients"):
            self._gradients.append(gradients_from_proto(answer.gradients))
        update = rnn_pb.UpdateRequest()
        update.CopyFrom(request.update)
        self._session.contributed(request)
        if answer.HasField("update"):
            self._session.training.stepped(update, answer.update)
            self._session.last_update = result = update_from_proto(answer.update)
            self._session.version = result.version
        if self.done == len(self.requests):
            self._finish()

    def refused(self, error: errors.Error) -> None:
        """Note the contribution where the step alone was refused: the next update takes it.

        The tape stays until then, so that the same backward may be asked for once more.
        """
        if error.metadata.get("recorded") == "true":
            request = rnn_pb.BackwardRequest()
            request.CopyFrom(self.requests[self.done])
            self._session.contributed(request)

    def is_same(self, other: Intent[Any]) -> bool:
        """Compare the tape, every gradient bit and the options."""
        if not isinstance(other, BackwardIntent) or self._taped is not other._taped:  # noqa: SLF001
            return False
        return self._asked == other._asked and all(  # noqa: SLF001
            mine.dhs == theirs.dhs
            for mine, theirs in zip(self.requests, other.requests, strict=True)
        )

    def dxs(self) -> Array:
        """Return the gradient of the inputs, shape (N, T, D), or (N, 0, D) if not asked for."""
        session = self._session
        none = (session.batch_size, 0, session.model.input_size)
        return join_steps(self._dxs, none, session.model.dtype)

    def _finish(self) -> None:
        session = self._session
        if self._taped in session.tapes:
            session.tapes.remove(self._taped)
        session.dh = None if self._dh is None else tensor_from_proto(self._dh)
        session.gradients = self._joined()
        one = len(self._norms) == 1
        norm = None if session.gradients is None else session.gradients.norm
        session.gradient_norm = self._norms[0] if one else norm

    def _joined(self) -> Gradients | None:
        if not self._gradients:
            return None
        return Gradients(
            dWx=np.sum([g.dWx for g in self._gradients], axis=0),
            dWh=np.sum([g.dWh for g in self._gradients], axis=0),
            db=np.sum([g.db for g in self._gradients], axis=0),
        )


class UpdateIntent(Intent[rnn_pb.UpdateRequest]):
    """One exact `update`: named contributions on an expected head."""

    rpc = UPDATE

    def __init__(self, training: Training, request: rnn_pb.UpdateRequest) -> None:
        super().__init__([request])
        self._training = training
        self.result: UpdateResult | None = None

    def prepare(self) -> rnn_pb.UpdateRequest:
        """Return the request; it is complete from the beginning."""
        return self.requests[0]

    def accept(self, answer: rnn_pb.UpdateResponse) -> None:
        """Note the new head and that the contributions are consumed."""
        self.done = 1
        self.result = update_from_proto(answer)
        self._training.stepped(self.requests[0], answer)

    def is_same(self, other: Intent[Any]) -> bool:
        """Compare everything but the request id."""
        if not isinstance(other, UpdateIntent):
            return False
        theirs = rnn_pb.UpdateRequest()
        theirs.CopyFrom(other.requests[0])
        theirs.request_id = self.requests[0].request_id
        return theirs == self.requests[0]


class EpochIntent(Intent[EpochRequest]):
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
        self.rpc = SET_STATE if isinstance(request, session_pb.SetStateRequest) else RESET_STATE

    def prepare(self) -> EpochRequest:
        """Say which epoch is to end."""
        request = self.requests[0]
        request.expected_epoch = request.expected_epoch or self._session.epoch
        if self._is_strict:
            request.expected_chunk_seq = self._session.chunk_seq
        return request

    def accept(self, answer: session_pb.SetStateResponse | session_pb.ResetStateResponse) -> None:
        """Begin the new epoch."""
        self.done = 1
        request = self.requests[0]
        state = request.state if isinstance(request, session_pb.SetStateRequest) else None
        self._session.begin(answer.session, state)

    def is_same(self, other: Intent[Any]) -> bool:
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
