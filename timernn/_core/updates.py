"""The exact optimizer steps of one model over the sessions of this client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from timernn import errors
from timernn._core.contract import LIST_WAITING
from timernn._core.convert import waiting_from_proto
from timernn._core.doubts import StepInDoubt
from timernn._core.effects import InTurn
from timernn._core.healing import Scope
from timernn._core.intents import AskedUpdate, UpdateIntent
from timernn._core.model_state import ModelState
from timernn._core.refusals import leaves_in_doubt
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.context import ClientContext
    from timernn._core.doubts import Doubts
    from timernn._core.effects import Op
    from timernn._core.intents import Intent
    from timernn._core.recovery import Recovery
    from timernn.types import Step, UpdateResult, Waiting

R = TypeVar("R")


class Updates:
    """Makes a model's steps, one at a time: one in doubt is asked for again before the next.

    Calls of several sessions may overlap, and share the model; so whoever sends a step waits for its turn.

    Args:
        context: How calls are made.
        recovery: Sends the steps.
        model_id: The model.

    Attributes:
        model: What the model's training sessions share.
        in_doubt: The step whose outcome is unknown.
    """

    def __init__(self, context: ClientContext, recovery: Recovery, model_id: str) -> None:
        self._context, self._recovery = context, recovery
        self.model = ModelState(context, model_id)
        self.in_doubt = StepInDoubt()
        self._lock = context.new_lock()
        self._sending: UpdateIntent | None = None

    @property
    def is_in_doubt(self) -> bool:
        """Whether there is a step in doubt; one that another call is sending now is not yet."""
        return self.in_doubt.intent is not self._sending

    def update(
        self,
        sessions: Sequence[Doubts],
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
        deadline = self._context.caller.deadline()
        settled: list[Intent[Any, Any]] = []
        for session in sessions:
            settled += yield from session.settle(deadline)
        states = tuple(each.session for each in sessions)
        asked = AskedUpdate(states, step, expect_known, take_waiting)
        result: UpdateResult = yield InTurn(self._lock, self._make_step(asked, settled, deadline))
        return result

    def in_turn(self, op: Op[R], deadline: float) -> Op[R]:
        """Carry out an operation that makes a step in another way, once no other is sent or in doubt.

        What head it expects it may only find out then.
        """
        outcome: R = yield InTurn(self._lock, self._after_doubts(op, deadline))
        return outcome

    def _after_doubts(self, op: Op[R], deadline: float) -> Op[R]:
        yield from self._settle(deadline)
        return (yield from op)

    def _make_step(
        self, asked: AskedUpdate, settled: list[Intent[Any, Any]], deadline: float
    ) -> Op[UpdateResult]:
        states, step = asked.sessions, asked.step
        intent = self.in_doubt.intent
        if intent is None or intent.asked != asked:
            yield from self._settle(deadline)
            if asked.take_waiting:
                yield from self._adopt_waiting(asked, deadline)
            named = [names for state in states for names in state.contributions()]
            found = [one.step_made() for one in reversed(settled)]
            found += [state.undelivered_step for state in states]
            made = next(filter(None, found), None)
            if made is not None and not named:
                for state in states:
                    state.deliver_step()
                return self._made_already(made, step)
            request = self.model.update_request(named, step, expect_known=asked.expect_known)
            intent = UpdateIntent(self.model, request, asked)
        yield from self._finish(intent, deadline)
        for state in states:
            state.deliver_step()
        return intent.answers[0].result

    def settle(self, deadline: float) -> Op[None]:
        """Send an update again whose outcome is not known; one that is being sent is waited for."""
        if self.in_doubt.intent is not None:
            yield InTurn(self._lock, self._settle(deadline))

    def _settle(self, deadline: float) -> Op[None]:
        if self.in_doubt.intent is not None:
            yield from self._finish(self.in_doubt.intent, deadline)

    def _adopt_waiting(self, asked: AskedUpdate, deadline: float) -> Op[None]:
        """Note the contributions that the server lists, as if this client had made them."""
        for session in asked.sessions:
            found = yield from list_waiting(self._context, session.session_id, deadline)
            session.adopt_contributions(
                (one.epoch, one.chunk_seq) for one in found if one.kind == "contribution"
            )

    def _made_already(self, made: tuple[Step, UpdateResult], step: Step) -> UpdateResult:
        """Return what the step in doubt did, if it is the one that is asked for."""
        asked, result = made
        if asked == step:
            return result
        raise errors.NoGradients(
            f"model {self.model.model_id!r}: the step that was in doubt, {asked}, is made and took all "
            f"that waited: version {result.version.number}",
            metadata={"version": str(result.version.number)},
        )

    def _finish(self, intent: UpdateIntent, deadline: float) -> Op[None]:
        self._sending = self.in_doubt.intent = intent
        try:
            yield from self._recovery.carry_out(intent, self._scope, deadline)
        except errors.Error as error:
            if not leaves_in_doubt(error, before=intent.may_be_applied):
                intent.refused(error)
                self.in_doubt.intent = None
            intent.may_be_applied = True
            raise
        finally:
            self._sending = None
        self.in_doubt.intent = None

    def _scope(self) -> Scope:
        return Scope(self.model.model_id, (self.model.journal,))


def list_waiting(context: ClientContext, session_id: str, deadline: float) -> Op[list[Waiting]]:
    """List what waits of a session on the server, in order of the chunks."""
    request = rnn_pb.ListWaitingRequest(session_id=session_id)
    answer = yield from context.caller.call(LIST_WAITING, request, deadline)
    return waiting_from_proto(answer)
