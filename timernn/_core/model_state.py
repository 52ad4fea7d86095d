"""What the training sessions of one model share in one client."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from timernn import errors
from timernn._core.convert import (
    reduction_to_proto,
    selectors_to_proto,
    version_from_proto,
    version_to_proto,
)
from timernn._core.ids import update_request_id
from timernn._core.journal import update_entry
from timernn._core.session_state import SessionState
from timernn.types import Contributions
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.context import ClientContext
    from timernn._core.splitting import Bounds
    from timernn.types import ModelInfo, Step


class ModelState:
    """The journal of a model's training sessions, and what they have contributed together.

    An Update may join contributions of several sessions, and the next Forward of any of them may
    use its version: so they have one journal, in the order of the answers.

    Args:
        context: The client's known versions, and the bounds of the journal.
        model_id: The model.
    """

    def __init__(self, context: ClientContext, model_id: str) -> None:
        self._context, self.model_id = context, model_id
        self.journal = context.new_journal()
        self._sessions: weakref.WeakSet[SessionState] = weakref.WeakSet()
        self._lock = threading.RLock()  # no thread may add one while another goes through them

    def new_session(self, model: ModelInfo, bounds: Bounds, *, train: bool) -> SessionState:
        """Make the state of a session; of one that trains it writes the shared journal."""
        journal = self.journal if train else self._context.new_journal()
        session = SessionState(self._context, model, bounds, journal=journal, train=train)
        if train:
            with self._lock:
                self._sessions.add(session)
                self.journal.share_between(len(self._sessions))
        return session

    def leave(self, session: SessionState) -> None:
        """Take a closed session out; what it logged stays."""
        with self._lock:
            self._sessions.discard(session)
            self.journal.share_between(len(self._sessions))

    def update_request(
        self, named: Sequence[Contributions], step: Step, *, expect_known: bool = True
    ) -> rnn_pb.UpdateRequest:
        """Write an Update of exactly these contributions.

        Args:
            named: The contributions.
            step: The learning rate, clipping and reduction.
            expect_known: Whether the head has to be the version that this client has seen last.

        Raises:
            NoGradients: If there are none; an Update that names none would take all that wait.
        """
        if not named:
            raise errors.NoGradients(
                f"model {self.model_id!r}: no backward() since the last update(); what an earlier "
                "program left stands in session.waiting, and update(take_waiting=True) takes it"
            )
        known = self._context.known.version(self.model_id) if expect_known else None
        request = rnn_pb.UpdateRequest(
            model_id=self.model_id,
            contributions=selectors_to_proto(named),
            reduction=reduction_to_proto(step.reduction),
            learning_rate=step.lr,
            clip_norm=step.clip_norm,
            expected_version=None if known is None else version_to_proto(known),
        )
        request.request_id = update_request_id(request)
        return request

    def note_step(self, request: rnn_pb.UpdateRequest, answer: rnn_pb.UpdateResponse) -> None:
        """Note a step that was made: the new head, and that its contributions are consumed."""
        self._context.known.set_version(self.model_id, version_from_proto(answer.version))
        self.consume(_named_in(request))
        self.journal.append(update_entry(request, answer))

    def abandon_step(self, request: rnn_pb.UpdateRequest) -> None:
        """Forget the contributions of a step of which nobody knows whether it was made."""
        self.consume(_named_in(request))

    def consume(self, named: Sequence[Contributions] | None) -> None:
        """Forget contributions that an update took; None: all."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.consume(named)


def _named_in(request: rnn_pb.UpdateRequest) -> list[Contributions]:
    return [
        Contributions(c.session_id, c.epoch, tuple(c.chunk_seqs)) for c in request.contributions
    ]
