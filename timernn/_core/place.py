"""Where a session stands in its history, and what it has contributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from timernn import errors
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
from timernn.types import Contributions
from timernn.v1 import session_service_pb2 as session_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.client import ClientCore
    from timernn._core.intents import (
        Intent,
        Taped,
    )
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
        is_streaming: Whether a `stream()` uses the numbers now.
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
        self._h: Tensor | None = None
        self._waiting: dict[tuple[int, int], None] = {}
        self.doubt: Intent[Any] | None = None
        self.tapes: list[Taped] = []
        self.dh: Array | None = None
        self.gradients: Gradients | None = None
        self.gradient_norm: float | None = None
        self.version: Version | None = None
        self.last_update: UpdateResult | None = None
        self.is_streaming = self.resumed = False

    @property
    def h(self) -> Array:
        """The hidden state as of the last answer, shape (N, H); no call is made."""
        return self._zeros() if self._h is None else tensor_from_proto(self._h)

    @property
    def in_doubt(self) -> bool:
        """Whether the outcome of the last call is unknown; `settle()` finds out."""
        return self.doubt is not None

    def begin(self, session: session_pb.Session, state: Tensor | None) -> None:
        """Take over an epoch's beginning, or a session that goes on.

        Args:
            session: As the server told it.
            state: Its hidden state (N, H); None: zero.
        """
        self.session_id, self.epoch = session.session_id, session.epoch
        self.chunk_seq, self.state_token = session.chunk_seq, session.state_token
        self.batch_size, self._ttl, self._h = session.batch_size, session.ttl, state
        self.tapes.clear()  # a chunk of an epoch that has ended has no Backward
        if session.HasField("weights_version"):
            self.version = version_from_proto(session.weights_version)
        if not session.chunk_seq:  # a history that the log can tell from its beginning
            self.journal.append(begin_entry(self._restoring_request()))

    def number(self, request: rnn_pb.ForwardRequest, ahead: int = 0) -> None:
        """Write a chunk's place into its request, `ahead` chunks after the next."""
        request.session_id, request.epoch = self.session_id, self.epoch
        request.chunk_seq = self.chunk_seq + 1 + ahead
        request.previous_token = b"" if ahead else self.state_token
        request.acknowledged_seq = self.chunk_seq
        known = self.client.known(self.model.model_id)
        if known is not None:
            request.minimum_version.CopyFrom(version_to_proto(known))

    def advance(self, request: rnn_pb.ForwardRequest, answer: rnn_pb.ForwardResponse) -> None:
        """Move on to an answered chunk."""
        if (answer.epoch, answer.chunk_seq) != (request.epoch, request.chunk_seq):
            raise errors.Internal(f"chunk {request.chunk_seq} got the answer of {answer.chunk_seq}")
        self.chunk_seq, self.state_token, self._h = answer.chunk_seq, answer.state_token, answer.h
        self.version = version_from_proto(answer.weights_version)
        self.client.note_version(self.model.model_id, self.version)
        self.journal.append(forward_entry(request, answer))

    def contributed(self, request: rnn_pb.BackwardRequest) -> None:
        """Note a contribution that waits for the next update."""
        self._waiting[request.epoch, request.chunk_seq] = None
        if len(self._waiting) > self.bounds.contributions_per_model:
            del self._waiting[next(iter(self._waiting))]
        self.journal.append(backward_entry(request))

    def waiting(self) -> list[Contributions]:
        """Name this session's contributions since the last update, by epoch."""
        by_epoch: dict[int, list[int]] = {}
        for epoch, chunk_seq in self._waiting:
            by_epoch.setdefault(epoch, []).append(chunk_seq)
        return [
            Contributions(self.session_id, epoch, tuple(sorted(chunks)))
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

    def _restoring_request(self) -> session_pb.OpenSessionRequest:
        return session_pb.OpenSessionRequest(
            model_id=self.model.model_id,
            session_id=self.session_id,
            batch_size=self.batch_size,
            initial_state=self._h,
            ttl=self._ttl,
            on_exists=session_pb.ON_EXISTS_RESET,
            restored_epoch=self.epoch,
        )

    def _zeros(self) -> Array:
        return np.zeros((self.batch_size, self.model.hidden_size), self.model.dtype)
