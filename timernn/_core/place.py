"""Where a session stands in its history, and what it has contributed."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from timernn import errors
from timernn._core.ages import Lifetime
from timernn._core.convert import (
    duration_to_proto,
    tensor_from_proto,
    version_from_proto,
    version_to_proto,
)
from timernn._core.journal import (
    backward_entry,
    begin_entry,
    forward_entry,
)
from timernn._core.moves import Move
from timernn._core.refusals import leaves_in_doubt
from timernn.types import Contributions
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from timernn._core.client import ClientCore
    from timernn._core.intents import (
        Forwarded,
        Intent,
        Taped,
        TapedChunk,
    )
    from timernn._core.journal import Entry
    from timernn._core.splitting import Bounds
    from timernn.types import (
        Array,
        Gradients,
        ModelInfo,
        UpdateResult,
        Version,
    )
    from timernn.v1 import time_rnn_service_pb2 as rnn_pb
    from timernn.v1.tensor_pb2 import Tensor

_I = TypeVar("_I", bound="Intent[Any, Any]")


def no_stream() -> None:
    """Stand for no stream."""


class SessionPlace:
    """A session's place as of the last answer.

    Args:
        client: Whose connection, log limits and known versions it uses.
        model: The model's sizes and dtype.
        bounds: The server's limits.
        train: Whether `forward` leaves tapes.

    Attributes:
        tapes: What `backward` can still be called for, the newest last.
        dh: Gradient of the state before the last backward's chunk, shape (N, H); None before.
        gradients: Gradients of the weights of the last backward, if they were asked for.
        gradient_norm: Their global norm; None where a backward was split along T and the gradients
            were not asked for.
        version: The weights version of the last answer; None before the first.
        last_update: What the last step over this session did.
        doubts: What was begun and has not been handed to its caller, in the order of the numbers:
            of an unknown outcome, or answered while the call that asked was interrupted. Each
            stands here from before it is first sent, so that no interrupt can lose it.
        lifetime: How long the session lives on without another answer.
        stream: Returns the `stream()` that uses the numbers now, or None; refers to it weakly, so that
            one which an interrupt kept from closing ends with its last reference.
        resumed: Whether opening it went on with a live session.
    """

    def __init__(
        self, client: ClientCore, model: ModelInfo, bounds: Bounds, *, train: bool
    ) -> None:
        self.client, self.model, self.bounds, self.train = client, model, bounds, train
        self.training = client.training(model.model_id)
        options = client.options
        self.journal = (
            self.training.journal
            if train
            else client.shelf.new_journal(options.log_limit, options.log_bytes)
        )
        if train:
            self.training.join(self)
        self.session_id, self.epoch, self.chunk_seq, self.state_token = "", 0, 0, b""
        self.batch_size = 1
        self._ttl = duration_to_proto(0)
        self.lifetime = Lifetime(client.ages)
        self._h: Tensor | None = None
        self._waiting: dict[tuple[int, int], None] = {}
        self.doubts: deque[Intent[Any, Any]] = deque()
        self.tapes: list[Taped] = []
        self.dh: Array | None = None
        self.gradients: Gradients | None = None
        self.gradient_norm: float | None = None
        self.version: Version | None = None
        self.last_update: UpdateResult | None = None
        self.stream: Callable[[], object | None] = no_stream
        self.resumed = False

    @property
    def is_streaming(self) -> bool:
        """Whether a `stream()` uses the numbers now."""
        return self.stream() is not None

    @property
    def h(self) -> Array:
        """The hidden state as of the last answer, shape (N, H); no call is made."""
        return self._zeros() if self._h is None else tensor_from_proto(self._h)

    @property
    def in_doubt(self) -> bool:
        """Whether something was sent whose outcome is unknown, or whose output nobody got."""
        return any(not intent.is_refused for intent in self.doubts)

    def move(self, to: Move) -> None:
        """Change the attributes named; an interrupt finds all of them changed or none."""
        vars(self).update(to)  # one step of the interpreter

    def again(self, intent: _I, position: int = 0) -> _I | None:
        """Return what is in doubt at a position if the caller, asking anew, asks for that.

        What is answered there and is not asked for stays applied, and leaves the doubts.
        """
        while position < len(self.doubts):
            doubt = self.doubts[position]
            if doubt.is_wanted and doubt.is_same(intent):
                doubt.may_be_applied |= not doubt.is_refused
                doubt.is_refused = False
                doubt.apply()
                return doubt  # type: ignore[return-value]  # is_same() compares the class
            if not doubt.is_done:
                break
            doubt.apply()
            self.doubts.remove(doubt)
        return None

    def delivered(self, intents: list[Intent[Any, Any]]) -> None:
        """Forget intents whose caller gets their outputs; all of them in one step."""
        self.doubts = deque(doubt for doubt in self.doubts if doubt not in intents)

    def doubted(self, intent: Intent[Any, Any]) -> None:
        """Keep an intent that is about to be sent until its caller has got its output."""
        if intent not in self.doubts:
            self.doubts.append(intent)

    def failed(self, intent: Intent[Any, Any], error: errors.Error) -> None:
        """Let an intent go that is certain not to be applied, and what was sent behind it.

        Where a part of it is applied, the same call can still go on with the rest.
        """
        if leaves_in_doubt(error, before=intent.may_be_applied or intent.done > 0):
            intent.may_be_applied = True
            return
        intent.refused(error)
        if intent.came_from is not None:
            self.come_back(intent.came_from)
        intent.is_refused = True
        while intent in self.doubts and (self.doubts[-1] is not intent or not intent.done):
            self.doubts.pop()

    def begin(self, session: session_pb.Session, state: Tensor | None) -> None:
        """Take over an epoch's beginning, or a session that goes on.

        Args:
            session: As the server told it.
            state: Its hidden state (N, H); None: zero.
        """
        self.session_id, self.batch_size, self._ttl = (
            session.session_id,
            session.batch_size,
            session.ttl,
        )
        self.lifetime.renew(session.ttl.ToNanoseconds() / 1e9)
        move = Move(
            epoch=session.epoch,
            chunk_seq=session.chunk_seq,
            state_token=session.state_token,
            _h=state,
            tapes=[],  # a chunk of an epoch that has ended has no Backward
        )
        if session.HasField("weights_version"):
            move["version"] = version_from_proto(session.weights_version)
        if not session.chunk_seq:  # a history that the log can tell from its beginning
            request = self._restoring_request(session.epoch, state)
            self.journal.append(begin_entry(request, self.lifetime))
        self.move(move)

    def number(self, request: rnn_pb.ForwardRequest, ahead: int = 0) -> None:
        """Write a chunk's place into its request, `ahead` chunks after the next."""
        request.session_id, request.epoch = self.session_id, self.epoch
        request.chunk_seq = self.chunk_seq + 1 + ahead
        request.previous_token = b"" if ahead else self.state_token
        # A program that goes on where this one was killed sends the chunks of its last step again: the
        # states that their outputs are computed from are kept while a backward is to come.
        firsts = [taped.chunks[0].chunk_seq - 1 for taped in self.tapes]
        request.acknowledged_seq = min([self.chunk_seq, *firsts])
        known = self.client.known(self.model.model_id)
        if known is not None:
            request.minimum_version.CopyFrom(version_to_proto(known))

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
            tapes = [taped for taped in self.tapes if taped.chunks[-1].chunk_seq < chunk_seq]
            self.move(Move(chunk_seq=chunk_seq - 1, state_token=b"", tapes=tapes))

    def come_back(self, to: Move) -> None:
        """Stand again where the session stood before it went back, unless it is beyond that."""
        if self.chunk_seq <= to["chunk_seq"]:
            self.move(to)

    def advance(self, answer: Forwarded) -> None:
        """Move on to an answered chunk."""
        self.lifetime.renew()
        self.client.note_version(self.model.model_id, answer.version)
        self.journal.append(forward_entry(answer.request, answer.message, self.lifetime))
        self.move(answer.move)

    def contributed(self, request: rnn_pb.BackwardRequest) -> None:
        """Note a contribution that waits for the next update."""
        self._waiting[request.epoch, request.chunk_seq] = None
        if len(self._waiting) > self.bounds.contributions_per_model:
            del self._waiting[next(iter(self._waiting))]
        known = self.client.known(self.model.model_id)
        head = 0 if known is None else known.number
        self.journal.append(backward_entry(request, self.lifetime, self.new_tape(), head))

    def new_tape(self) -> Lifetime:
        """Return the time for which a tape that was just written can be used."""
        return Lifetime(self.client.ages, self.bounds.tape_ttl_s)

    def beginning(self) -> Entry:
        """Log the beginning of the present epoch, from the state as of the last answer."""
        return begin_entry(self._restoring_request(self.epoch, self._h), self.lifetime)

    def waiting(self, *more: TapedChunk) -> list[Contributions]:
        """Name this session's contributions since the last update, by epoch.

        Args:
            more: Chunks whose contributions are about to be made.
        """
        by_epoch: dict[int, list[int]] = {}
        about = ((chunk.epoch, chunk.chunk_seq) for chunk in more)
        for epoch, chunk_seq in sorted({*self._waiting, *about}):
            by_epoch.setdefault(epoch, []).append(chunk_seq)
        return [
            Contributions(self.session_id, epoch, tuple(chunks))
            for epoch, chunks in by_epoch.items()
        ]

    def consumed(self, named: Sequence[Contributions] | None) -> None:
        """Forget contributions that an update took, and the tapes that they leave done; None: all."""
        taken = {
            (epoch, chunk_seq)
            for epoch, chunk_seq in list(self._waiting)
            if named is None or any(self._is_named(n, epoch, chunk_seq) for n in named)
        }
        for name in taken:
            del self._waiting[name]
        self.tapes = [
            taped
            for taped in self.tapes
            if not taken.issuperset((chunk.epoch, chunk.chunk_seq) for chunk in taped.chunks)
        ]

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

    def _zeros(self) -> Array:
        return np.zeros((self.batch_size, self.model.hidden_size), self.model.dtype)
