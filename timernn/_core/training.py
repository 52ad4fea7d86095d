"""One model as this client trains it: the shared log, and the exact updates over its sessions."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core.convert import (
    reduction_to_proto,
    selectors_to_proto,
    version_from_proto,
    version_to_proto,
)
from timernn._core.healing import Scope
from timernn._core.ids import update_request_id
from timernn._core.intents import UpdateIntent
from timernn._core.journal import update_entry
from timernn._core.refusals import leaves_in_doubt
from timernn.types import Contributions
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from timernn._core.client import ClientCore
    from timernn._core.effects import Op
    from timernn._core.intents import Intent, Memory
    from timernn._core.place import SessionPlace
    from timernn._core.session import SessionCore
    from timernn.types import Step, UpdateResult


class Training:
    """What the training sessions of one model share in one client.

    An Update may join contributions of several sessions, and the next Forward of any of them may
    use its version: so they have one log, in the order of the answers.
    """

    def __init__(self, client: ClientCore, model_id: str) -> None:
        self._client, self._model_id = client, model_id
        options = client.options
        self.journal = client.shelf.new_journal(options.log_limit, options.log_bytes)
        self.doubt: UpdateIntent | None = None
        self._sessions: weakref.WeakSet[SessionPlace] = weakref.WeakSet()

    def join(self, session: SessionPlace) -> None:
        """Add a session that writes the shared log."""
        self._sessions.add(session)
        self.journal.writer_count = len(self._sessions)

    def leave(self, session: SessionPlace) -> None:
        """Take a closed session out; what it logged stays."""
        self._sessions.discard(session)
        self.journal.writer_count = max(1, len(self._sessions))

    def scope(self) -> Scope:
        """Return what an Update depends on."""
        return Scope(self._model_id, (self.journal,))

    def request(
        self, named: Sequence[Contributions], step: Step, *, expect_known: bool = True
    ) -> rnn_pb.UpdateRequest:
        """Write an Update of exactly these contributions.

        Raises:
            NoGradients: If there are none; an Update that names none would take all that wait.
        """
        if not named:
            raise errors.NoGradients(
                f"model {self._model_id!r}: no backward() since the last update(); what an earlier "
                "program left stands in session.waiting, and update(take_waiting=True) takes it"
            )
        known = self._client.known(self._model_id) if expect_known else None
        request = rnn_pb.UpdateRequest(
            model_id=self._model_id,
            contributions=selectors_to_proto(named),
            reduction=reduction_to_proto(step.reduction),
            learning_rate=step.lr,
            clip_norm=step.clip_norm,
            expected_version=None if known is None else version_to_proto(known),
        )
        request.request_id = update_request_id(request)
        return request

    def update(
        self,
        sessions: Sequence[SessionCore],
        step: Step,
        *,
        expect_known: bool,
        take_waiting: bool,
    ) -> Op[UpdateResult]:
        """Take what these sessions contributed since their last update into one step.

        With `take_waiting` also what the server lists of them: then both are named. Where the step was
        in doubt and settling it has made it, this is its answer.

        Raises:
            NoGradients: If there are none; says which other step settling has made.
        """
        deadline = self._client.caller.deadline()
        settled: list[Intent[Any, Any]] = []
        for session in sessions:
            settled += yield from session.settle_own(deadline)
        asked = (tuple(sessions), step, expect_known, take_waiting)
        intent = self.doubt
        if intent is None or intent.asked != asked:
            if self.doubt is not None and any(one in sessions for one in self.doubt.asked[0]):
                settled.append(self.doubt)
            yield from self.settle(deadline)
            for session in sessions if take_waiting else ():
                yield from session.adopt_waiting(deadline)
            named = [names for session in sessions for names in session.waiting()]
            made = next(filter(None, (one.stepped() for one in reversed(settled))), None)
            if made is not None and not named:
                return self._made_already(made, step)
            request = self.request(named, step, expect_known=expect_known)
            intent = UpdateIntent(self, request, asked)
        yield from self._finish(intent, deadline)
        return intent.answers[0].result

    def _made_already(self, made: tuple[Step, UpdateResult], step: Step) -> UpdateResult:
        """Return what the step in doubt did, if it is the one that is asked for."""
        asked, result = made
        if asked == step:
            return result
        raise errors.NoGradients(
            f"model {self._model_id!r}: the step that was in doubt, {asked}, is made and took all that "
            f"waited: version {result.version.number}",
            metadata={"version": str(result.version.number)},
        )

    def doubted(
        self, request: rnn_pb.UpdateRequest, session: SessionCore, step: Step, memory: Memory | None
    ) -> None:
        """Ask for a step by itself that may have been made with a backward, before anything else."""
        if self.doubt is None:
            self.doubt = UpdateIntent(self, request, ((session,), step, True, False))
            self.doubt.may_be_applied, self.doubt.memory = True, memory

    def given_up(self, request: rnn_pb.UpdateRequest) -> None:
        """Forget the contributions of a step of which nobody knows whether it was made."""
        self.consumed(_named_in(request))

    def settle(self, deadline: float) -> Op[None]:
        """Send an update again whose outcome is not known."""
        if self.doubt is not None:
            yield from self._finish(self.doubt, deadline)

    def stepped(self, request: rnn_pb.UpdateRequest, answer: rnn_pb.UpdateResponse) -> None:
        """Note a step that was made: the new head, and that its contributions are consumed."""
        self._client.set_known(self._model_id, version_from_proto(answer.version))
        self.consumed(_named_in(request))
        self.journal.append(update_entry(request, answer))

    def consumed(self, named: Iterable[Contributions] | None) -> None:
        """Forget contributions that an update took; None: all."""
        taken = None if named is None else list(named)
        for session in list(self._sessions):
            session.consumed(taken)

    def _finish(self, intent: UpdateIntent, deadline: float) -> Op[None]:
        self.doubt = intent
        try:
            yield from self._client.carry_out(intent, self.scope, deadline)
        except errors.Error as error:
            if not leaves_in_doubt(error, before=intent.may_be_applied):
                intent.refused(error)
                self.doubt = None
            intent.may_be_applied = True
            raise
        self.doubt = None


def _named_in(request: rnn_pb.UpdateRequest) -> list[Contributions]:
    return [
        Contributions(c.session_id, c.epoch, tuple(c.chunk_seqs)) for c in request.contributions
    ]
