"""What one session has begun and not handed out: kept, sent again, delivered or let go.

An intent stands here from before it is first sent until its caller has its output, so that no
interrupt can lose it. Meanwhile it is of an unknown outcome ("in doubt"), or answered while the call
that asked for it was interrupted.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from timernn import errors
from timernn._core.healing import Scope
from timernn._core.refusals import leaves_in_doubt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from timernn._core.effects import Op
    from timernn._core.intents import Intent, UpdateIntent
    from timernn._core.model_state import ModelState
    from timernn._core.recovery import Recovery
    from timernn._core.session_state import SessionState

AnyIntent = TypeVar("AnyIntent", bound="Intent[Any, Any]")


class StepInDoubt:
    """The one update of a model whose outcome is unknown, if there is one.

    Attributes:
        intent: The update.
    """

    def __init__(self) -> None:
        self.intent: UpdateIntent | None = None


class Doubts:
    """The intents of one session, in the order of their numbers.

    Args:
        session: What they move on.
        model: The model's shared state; its journal is part of what they depend on.
        recovery: Sends them.
        step: Takes over a step that was sent with a backward and may have been made.
    """

    def __init__(
        self, session: SessionState, model: ModelState, *, recovery: Recovery, step: StepInDoubt
    ) -> None:
        self.session, self._model = session, model
        self._recovery, self._step = recovery, step
        self._intents: deque[Intent[Any, Any]] = deque()

    def __len__(self) -> int:
        return len(self._intents)

    def __iter__(self) -> Iterator[Intent[Any, Any]]:
        """Go through a copy, so that intents may leave meanwhile."""
        return iter(list(self._intents))

    @property
    def is_any(self) -> bool:
        """Whether something was sent whose outcome is unknown, or whose output nobody got."""
        return any(not intent.is_refused for intent in self._intents)

    @property
    def first(self) -> Intent[Any, Any] | None:
        """The intent that is settled first; None without any."""
        return self._intents[0] if self._intents else None

    # -- what stands here ----------------------------------------------------------------------------

    def keep(self, intent: Intent[Any, Any]) -> None:
        """Keep an intent that is about to be sent until its caller has got its output."""
        if intent not in self._intents:
            self._intents.append(intent)

    def again(self, intent: AnyIntent, position: int = 0) -> AnyIntent | None:
        """Return what stands at a position if the caller, asking anew, asks for that.

        What is answered there and is not asked for stays applied, and leaves.
        """
        while position < len(self._intents):
            doubt = self._intents[position]
            if doubt.is_wanted and doubt.is_same(intent):
                doubt.may_be_applied |= not doubt.is_refused
                doubt.is_refused = False
                doubt.apply()
                return doubt  # type: ignore[return-value]  # is_same() compares the class
            if not doubt.is_done:
                break
            doubt.apply()
            self._intents.remove(doubt)
        return None

    def unwanted_from(self, position: int) -> list[Intent[Any, Any]]:
        """Return what stands from a position on and still counts, though nobody asks for it again."""
        for intent in list(self._intents)[position:]:
            if intent.is_refused:
                self._intents.remove(intent)
            else:
                intent.is_wanted = False
        return list(self._intents)[position:]

    def deliver(self, intents: Sequence[Intent[Any, Any]]) -> None:
        """Forget intents whose caller gets their outputs; all of them in one step."""
        self._intents = deque(each for each in self._intents if each not in intents)

    def deliver_first(self) -> None:
        """Forget the first intent: its output was taken."""
        self._intents.popleft()

    def drop_answered(self) -> None:
        """Forget the answered ones before the first that is not: nobody wants their outputs."""
        while self._intents and self._intents[0].is_done:
            self._intents.popleft()

    def clear(self) -> None:
        """Forget all of them: the session has ended."""
        self._intents.clear()

    def failed(self, intent: Intent[Any, Any], error: errors.Error) -> None:
        """Let an intent go that is certain not to be applied, and what was sent behind it.

        Where a part of it is applied, the same call can still go on with the rest.
        """
        if leaves_in_doubt(error, before=intent.may_be_applied or intent.done > 0):
            intent.may_be_applied = True
            return
        step = intent.refused(error)
        if step is not None and self._step.intent is None:
            self._step.intent = step
        if intent.came_from is not None:
            self.session.come_back(intent.came_from)
        intent.is_refused = True
        while intent in self._intents and (self._intents[-1] is not intent or not intent.done):
            self._intents.pop()

    # -- the sending ---------------------------------------------------------------------------------

    def finish(self, intent: Intent[Any, Any], deadline: float) -> Op[None]:
        """Carry out the first intent here, or what is to be the first; its caller has its output then."""
        self.keep(intent)
        yield from self._send(intent, deadline)
        self._intents.popleft()

    def settle(self, deadline: float, *, kept: int = 0) -> Op[list[Intent[Any, Any]]]:
        """Send again what is in doubt, so that its outcome is known.

        Args:
            deadline: When to give up, on the client's clock.
            kept: The first ones are asked for by the call under way. They stay until their caller
                has their outputs, and are sent here only if others stand behind them.

        Returns:
            What is carried out now.
        """
        self.session.require_idle()
        position = 0
        settled: list[Intent[Any, Any]] = []
        while max(kept, position) < len(self._intents):
            intent = self._intents[position]
            if intent.is_refused:
                del self._intents[position]
                continue
            intent.may_be_applied = True
            yield from self._send(intent, deadline)
            settled.append(intent)
            if position < kept:
                position += 1
            else:
                del self._intents[position]
        return settled

    def _send(self, intent: Intent[Any, Any], deadline: float) -> Op[None]:
        """Carry out what is in doubt; it stays there unless it is refused."""
        try:
            yield from self._recovery.carry_out(intent, lambda: self._scope_of(intent), deadline)
        except errors.Error as error:
            self.failed(intent, error)
            raise

    def scope(self) -> Scope:
        """Return what the session's operations depend on."""
        session, shared = self.session, self._model.journal
        own = session.journal
        journals = (shared,) if own is shared else (shared, own)
        return Scope(session.model.model_id, journals, session.epoch, session.lifetime)

    def _scope_of(self, intent: Intent[Any, Any]) -> Scope:
        """Return what an intent depends on: a new state only on the epoch that it ends.

        Such an epoch can be begun again however much the journal has let go.
        """
        if intent.needs_history:
            return self.scope()
        session = self.session
        model_id, beginning = session.model.model_id, session.beginning()
        return Scope(model_id, (), session.epoch, session.lifetime, beginning)
