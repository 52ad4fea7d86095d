"""The sending of intents: in order, with retries, and healing what a store has lost meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core.ages import Lifetime
from timernn._core.healing import Healing
from timernn._core.intents import Memory, wants_less
from timernn._core.refusals import Proof, proof_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from timernn._core.context import ClientContext
    from timernn._core.effects import Op
    from timernn._core.healing import Scope
    from timernn._core.intents import Intent

# The server remembers a request id and a recorded contribution for so many times tape_ttl.
MEMORY_OF_STEPS = 2


class Recovery:
    """Carries out intents for all sessions of a client.

    Args:
        context: How calls are made, and what is known of versions.
    """

    def __init__(self, context: ClientContext) -> None:
        self._context = context

    def carry_out(
        self, intent: Intent[Any, Any], scope_of: Callable[[], Scope], deadline: float
    ) -> Op[None]:
        """Send an intent's requests in order, healing what was lost on the way.

        Args:
            intent: What to send.
            scope_of: Returns what it depends on; asked only where something went wrong.
            deadline: When all has to be over, on the caller's clock.
        """
        caller = self._context.caller
        healing: Healing | None = None
        intent.apply()  # of an answer that was noted when an interrupt came
        while not intent.is_done:
            if intent.step() is not None:
                yield from self._require_remembered(intent)
            request = intent.prepare()
            try:
                answer = yield from caller.call(intent.rpc, request, deadline)
            except errors.Error as error:
                # An attempt before the loss may have written to the other slot, and still count there.
                intent.may_be_applied |= error._had_unknown_attempt  # noqa: SLF001  # one package
                if proof_of(error) is Proof.REQUEST:
                    yield from self._require_remembered(intent)
                healing = healing or Healing(caller, scope_of())
                yield from self.heal(healing, error, deadline=deadline, request=request)
            else:
                intent.accept(answer)

    def heal(
        self, healing: Healing, error: errors.Error, *, deadline: float, request: Any = None
    ) -> Op[None]:
        """Make a request ready to be sent again: heal what an error is a sign of, or ask for less.

        Args:
            healing: What was tried for this request so far.
            error: What it was refused with.
            deadline: When healing has to be over, on the caller's clock.
            request: The request, where it may be changed or may expect a head.

        Raises:
            Error: The given one, or what healing ended with, if nothing helps.
        """
        if wants_less(request, error):
            return
        try:
            yield from healing.after(error, deadline, request)
        except (errors.VersionGone, errors.WeightsForked):
            # Raised once. Asking for a version that nobody can bring back would fail for ever.
            self._context.known.forget_version(healing.scope.model_id)
            raise

    def _require_remembered(self, intent: Intent[Any, Any]) -> Op[None]:
        """Refuse to ask for a step again of which the server may have forgotten that it was made.

        It would be refused, and taken for not made. While the head is the one from before it was first
        sent, it was not made, and asking is safe.

        Raises:
            OutcomeLost: If it is too late to find out.
        """
        step, context = intent.step(), self._context
        if step is None:
            return
        if intent.memory is None:
            bounds = yield from context.bounds()
            lifetime = Lifetime(context.ages, MEMORY_OF_STEPS * bounds.tape_ttl_s)
            intent.memory = Memory(lifetime, context.known.version(step.model_id))
        elif intent.may_be_applied and intent.memory.lifetime.is_over:
            head = (yield from context.read_model(step.model_id)).head
            if intent.memory.may_have_missed(head):
                raise errors.OutcomeLost(
                    f"model {step.model_id!r}: a step was sent {intent.memory.lifetime.age_s:.0f} s ago, its "
                    f"answer was lost, and the head is version {head.number} by now; whether this step is "
                    "one of those that led to it is not remembered any more. What still waits stands in "
                    "session.waiting",
                    metadata={"head": str(head.number)},
                )
