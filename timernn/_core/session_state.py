"""Where a session stands in its history, and what it has contributed.

Every change is a method of `SessionState`; other modules read its attributes and never write them.
An exception may come between any two steps of the interpreter (a signal's, a time limit's), so what
belongs together is changed in one step, and each change may be made a second time: an interrupted one
is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from timernn import errors
from timernn._core.ages import Lifetime
from timernn._core.convert import (
    duration_to_proto,
    tensor_from_proto,
    version_from_proto,
    version_to_proto,
)
from timernn._core.journal import backward_entry, begin_entry, forward_entry
from timernn.types import Contributions
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterable, Sequence

    from timernn._core.context import ClientContext
    from timernn._core.journal import Entry, Journal
    from timernn._core.splitting import Bounds
    from timernn.types import Array, Gradients, ModelInfo, Step, UpdateResult, Version
    from timernn.v1 import time_rnn_service_pb2 as rnn_pb
    from timernn.v1.tensor_pb2 import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TapedChunk:
    """A training chunk for which a Backward may come.

    Attributes:
        epoch: With `chunk_seq`, its name.
        chunk_seq: Its number.
        token: The state token after it.
        steps: T.
        tape: How long the server keeps its tape.
    """

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
    """A Forward's answer, decoded.

    Attributes:
        request: The request, with its numbers.
        message: The answer as it came.
        version: The weights version it names.
        hs: The hidden states it brought, shape (N, T, H) or (N, 1, H); None if it brought none.
        taped: What this chunk left for a Backward; None in inference.
        whole: What it and the pieces before it left together, once the last one is answered.
    """

    request: rnn_pb.ForwardRequest
    message: rnn_pb.ForwardResponse
    version: Version
    hs: Array | None
    taped: TapedChunk | None
    whole: Taped | None


@dataclass(frozen=True, slots=True, eq=False)
class BackwardResult:
    """What the Backwards of one `backward` gave together.

    Attributes:
        taped: The tapes that they used.
        dh: Gradient of the state before the first chunk, shape (N, H).
        gradients: Gradients of the weights, if they were asked for.
        gradient_norm: Their global norm; None if it cannot be known.
        update: What the step in the same call did, if one was made.
    """

    taped: Taped
    dh: Array
    gradients: Gradients | None
    gradient_norm: float | None
    update: UpdateResult | None


class Position(TypedDict, total=False):
    """New values of the session's attributes of these names, to be assigned in one step."""

    epoch: int
    chunk_seq: int
    state_token: bytes
    version: Version | None
    tapes: tuple[Taped, ...]
    dh: Array | None
    gradients: Gradients | None
    gradient_norm: float | None
    last_update: UpdateResult | None
    undelivered_step: tuple[Step, UpdateResult] | None
    _h: Tensor | None


class SessionState:
    """A session as of the last answer.

    Args:
        context: The client's clocks and known versions.
        model: The model's sizes and dtype.
        bounds: The server's limits.
        journal: Where answered operations are logged.
        train: Whether `forward` leaves tapes.

    Attributes:
        chunk_seq: The last chunk answered in this epoch.
        state_token: Stands for the history up to there.
        tapes: What `backward` can still be called for, the newest last.
        dh: Gradient of the state before the last backward's chunk, shape (N, H); None before.
        gradients: Gradients of the weights of the last backward, if they were asked for.
        gradient_norm: Their global norm; None where a backward was split along T and the gradients
            were not asked for.
        version: The weights version of the last answer; None before the first.
        last_update: What the last step over this session did.
        undelivered_step: A step over what this session contributed whose caller has not got its
            result: another call settled it, or an interrupt came. As it was asked for, and what it did.
        lifetime: How long the session lives on without another answer.
        resumed: Whether opening it went on with a live session.
    """

    def __init__(
        self,
        context: ClientContext,
        model: ModelInfo,
        bounds: Bounds,
        *,
        journal: Journal,
        train: bool,
    ) -> None:
        self._ages, self._known = context.ages, context.known
        self.model, self.bounds, self.journal, self.train = model, bounds, journal, train
        self.session_id, self.epoch, self.chunk_seq, self.state_token = "", 0, 0, b""
        self.batch_size = 1
        self._ttl = duration_to_proto(0)
        self.lifetime = Lifetime(context.ages)
        self._h: Tensor | None = None
        self._contributed: dict[tuple[int, int], None] = {}  # and not consumed; in order
        self.tapes: tuple[Taped, ...] = ()
        self.dh: Array | None = None
        self.gradients: Gradients | None = None
        self.gradient_norm: float | None = None
        self.version: Version | None = None
        self.last_update: UpdateResult | None = None
        self.undelivered_step: tuple[Step, UpdateResult] | None = None
        # Weakly: a stream that an interrupt kept from closing ends with its last reference.
        self._stream: weakref.ref[object] | None = None
        self.resumed = False

    # -- what can be read ----------------------------------------------------------------------------

    @property
    def h(self) -> Array:
        """The hidden state as of the last answer, shape (N, H)."""
        if self._h is None:
            return np.zeros((self.batch_size, self.model.hidden_size), self.model.dtype)
        return tensor_from_proto(self._h)

    def require_idle(self) -> None:
        """Refuse while a stream uses the session's numbers.

        Raises:
            SessionBusy: If one does.
        """
        if self.is_streaming:
            raise errors.SessionBusy(
                f"session {self.session_id!r} is in use by a stream(); finish or close it first"
            )

    @property
    def is_streaming(self) -> bool:
        """Whether a `stream()` uses the numbers now."""
        return self._stream is not None and self._stream() is not None

    def is_used_by(self, stream: object) -> bool:
        """Return whether this stream uses the numbers now."""
        return self._stream is not None and self._stream() is stream

    def position(self) -> Position:
        """Return where the session stands, to come back to."""
        return Position(
            chunk_seq=self.chunk_seq,
            state_token=self.state_token,
            version=self.version,
            tapes=self.tapes,
            _h=self._h,
        )

    def new_tape(self) -> Lifetime:
        """Return the time for which a tape that was just written can be used."""
        return Lifetime(self._ages, self.bounds.tape_ttl_s)

    def beginning(self) -> Entry:
        """Return an entry that begins the present epoch anew, from the state as of the last answer."""
        return begin_entry(self._restoring_request(self.epoch, self._h), self.lifetime)

    def contributions(self, *more: TapedChunk) -> list[Contributions]:
        """Name this session's contributions since the last update, by epoch.

        Args:
            more: Chunks whose contributions are about to be made.
        """
        by_epoch: dict[int, list[int]] = {}
        about = ((chunk.epoch, chunk.chunk_seq) for chunk in more)
        for epoch, chunk_seq in sorted({*self._contributed, *about}):
            by_epoch.setdefault(epoch, []).append(chunk_seq)
        return [
            Contributions(self.session_id, epoch, tuple(chunks))
            for epoch, chunks in by_epoch.items()
        ]

    def number(self, request: rnn_pb.ForwardRequest, ahead: int = 0) -> None:
        """Write a chunk's numbers into its request, `ahead` chunks after the next."""
        request.session_id, request.epoch = self.session_id, self.epoch
        request.chunk_seq = self.chunk_seq + 1 + ahead
        request.previous_token = b"" if ahead else self.state_token
        # A program that goes on where this one was killed sends the chunks of its last step again: the
        # states that their outputs are computed from are kept while a backward is to come.
        acknowledged = self.chunk_seq
        for taped in self.tapes:
            acknowledged = min(acknowledged, taped.chunks[0].chunk_seq - 1)
        request.acknowledged_seq = acknowledged
        known = self._known.version(self.model.model_id)
        if known is not None:
            request.minimum_version.CopyFrom(version_to_proto(known))

    # -- the session as a whole ----------------------------------------------------------------------

    def begin(
        self, session: session_pb.Session, h: Tensor | None, *, resumed: bool = False
    ) -> None:
        """Take over an epoch's beginning, or a session that goes on.

        Args:
            session: As the server describes it.
            h: Its hidden state (N, H); None: zero.
            resumed: Whether opening it went on with a live one.
        """
        self.session_id, self.batch_size = session.session_id, session.batch_size
        self._ttl, self.resumed = session.ttl, self.resumed or resumed
        self.lifetime.renew(session.ttl.ToNanoseconds() / 1e9)
        position = Position(
            epoch=session.epoch,
            chunk_seq=session.chunk_seq,
            state_token=session.state_token,
            tapes=(),  # a chunk of an epoch that has ended has no Backward
            _h=h,
        )
        if session.HasField("weights_version"):
            position["version"] = version_from_proto(session.weights_version)
        if not session.chunk_seq:  # a history that the journal can describe from its beginning
            request = self._restoring_request(session.epoch, h)
            self.journal.append(begin_entry(request, self.lifetime))
        self._move(position)

    def occupy(self, stream: weakref.ref[object]) -> None:
        """Let a stream use the numbers; other operations are refused while it is there."""
        self._stream = stream

    def vacate(self) -> None:
        """End the use by a stream."""
        self._stream = None

    # -- chunks --------------------------------------------------------------------------------------

    def advance(self, answer: Forwarded) -> None:
        """Move on to an answered chunk."""
        self.lifetime.renew()
        self._known.note_version(self.model.model_id, answer.version)
        message = answer.message
        self.journal.append(forward_entry(answer.request, message, self.lifetime))
        tapes, whole = self.tapes, answer.whole
        if whole is not None and whole not in tapes:
            tapes = (*tapes, whole)
        vars(self).update(
            Position(
                chunk_seq=message.chunk_seq,
                state_token=message.state_token,
                version=answer.version,
                tapes=tapes,
                _h=message.h,
            )
        )

    def go_back(self, chunk_seq: int) -> None:
        """Stand before a chunk, which is sent next: where it was applied, it is answered again.

        Raises:
            SeqGap: If the chunks before it have not been applied.
        """
        if chunk_seq > self.chunk_seq + 1:
            raise errors.SeqGap(
                f"chunk_seq: session {self.session_id!r} is at chunk {self.chunk_seq}, so the next is "
                f"{self.chunk_seq + 1}, got {chunk_seq}",
                metadata={"expected_seq": str(self.chunk_seq + 1)},
            )
        if chunk_seq <= self.chunk_seq:
            tapes = (taped for taped in self.tapes if taped.chunks[-1].chunk_seq < chunk_seq)
            self._move(Position(chunk_seq=chunk_seq - 1, state_token=b"", tapes=tuple(tapes)))

    def come_back(self, position: Position) -> None:
        """Stand again where the session stood before it went back, unless it is beyond that."""
        if self.chunk_seq <= position["chunk_seq"]:
            self._move(position)

    # -- gradients -----------------------------------------------------------------------------------

    def record_contribution(self, request: rnn_pb.BackwardRequest) -> None:
        """Note a contribution that waits for the next update."""
        self._contributed[request.epoch, request.chunk_seq] = None
        self.undelivered_step = None  # the next update is about this contribution
        if len(self._contributed) > self.bounds.contributions_per_model:
            del self._contributed[next(iter(self._contributed))]
        known = self._known.version(self.model.model_id)
        head = 0 if known is None else known.number
        self.journal.append(backward_entry(request, self.lifetime, tape=self.new_tape(), head=head))

    def adopt_contributions(self, names: Iterable[tuple[int, int]]) -> None:
        """Note contributions, (epoch, chunk_seq), that an earlier program made, as if this one had."""
        self._contributed.update(dict.fromkeys(names))

    def finish_backward(self, result: BackwardResult) -> None:
        """Take over what a whole `backward` gave; its tapes are used."""
        position = Position(
            tapes=self._tapes_without(result.taped),
            dh=result.dh,
            gradients=result.gradients,
            gradient_norm=result.gradient_norm,
        )
        if result.update is not None:
            position["last_update"] = result.update
            position["version"] = result.update.version
        self._move(position)

    def drop_tape(self, taped: Taped) -> None:
        """Let go of tapes that no `backward` is to use any more."""
        self._move(Position(tapes=self._tapes_without(taped)))

    def note_update(self, step: Step, result: UpdateResult) -> None:
        """Note a step over this session's contributions, which its caller is yet to get."""
        self._move(
            Position(last_update=result, version=result.version, undelivered_step=(step, result))
        )

    def deliver_step(self) -> None:
        """Note that the caller of the last step gets its result."""
        self.undelivered_step = None

    def consume(self, named: Sequence[Contributions] | None) -> None:
        """Forget contributions that an update took, and tapes all of whose chunks it took.

        Args:
            named: The contributions; None: all.
        """
        taken = {
            (epoch, chunk_seq)
            for epoch, chunk_seq in list(self._contributed)
            if named is None or any(self._is_named(n, epoch, chunk_seq) for n in named)
        }
        if not taken:
            return  # another session's: this one may be in the middle of a call by another thread
        for name in taken:
            del self._contributed[name]
        left = (
            taped
            for taped in self.tapes
            if not taken.issuperset((chunk.epoch, chunk.chunk_seq) for chunk in taped.chunks)
        )
        self._move(Position(tapes=tuple(left)))

    def discard(self) -> None:
        """Forget all contributions and tapes: the server has dropped them."""
        self.journal.drop_contributions(self.session_id, dict(self._contributed))
        self._contributed.clear()
        self._move(Position(tapes=(), undelivered_step=None))

    # -- inner parts ---------------------------------------------------------------------------------

    def _move(self, to: Position) -> None:
        """Change the attributes named; an interrupt finds all of them changed or none."""
        vars(self).update(to)  # one step of the interpreter

    def _tapes_without(self, used: Taped) -> tuple[Taped, ...]:
        return tuple(taped for taped in self.tapes if taped is not used)

    def _is_named(self, name: Contributions, epoch: int, chunk_seq: int) -> bool:
        return (
            name.session_id == self.session_id
            and name.epoch in (0, epoch)
            and (not name.chunk_seqs or chunk_seq in name.chunk_seqs)
        )

    def _restoring_request(self, epoch: int, state: Tensor | None) -> session_pb.OpenSessionRequest:
        return session_pb.OpenSessionRequest(
            model_id=self.model.model_id,
            session_id=self.session_id,
            batch_size=self.batch_size,
            initial_state=state,
            ttl=self._ttl,
            on_exists=session_pb.ON_EXISTS_RESET,
            restored_epoch=epoch,
        )
