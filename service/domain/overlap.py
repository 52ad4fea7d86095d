"""The step of a Backward with an Update of its own contribution, overlapped with recording it.

Two round trips and a computation run at the same time instead of one after another; see
docs/adr/0022-overlap-of-backward-and-update.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.domain.ports import UpdateInputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.domain.contributions import Contributions, Recording
    from service.domain.model_cache import KnownModel
    from service.domain.publisher import CandidateVersion, StepRequest
    from service.domain.updates import EarlyStep, OptimizerStep


class OverlappedStep:
    """An optimizer step whose only contribution is recorded with the first read; a `VersionStep`.

    The first `read_inputs` records the contribution and reads the inputs in one round trip, and computes
    the step meanwhile from the cached head. `make_step` uses that result if the inputs turn out to be the
    same. In every other case, and on later attempts, the ordinary step does the work.
    """

    def __init__(
        self,
        step: OptimizerStep,
        recording: Recording,
        contributions: Contributions,
        *,
        consume_tape: Callable[[], asyncio.Future[None]],
    ) -> None:
        """Overlap a step with a recording.

        Args:
            step: The step, which selects this contribution and no other.
            recording: The contribution.
            contributions: Records it.
            consume_tape: Starts to mark its tape as consumed; called once it is recorded.
        """
        self._step = step
        self._recording = recording
        self._contributions = contributions
        self._consume_tape = consume_tape
        self._consuming: asyncio.Future[None] | None = None
        self._early: EarlyStep | None = None

    @property
    def request(self) -> StepRequest:
        """What was asked for."""
        return self._step.request

    async def read_inputs(self) -> UpdateInputs | None:
        """Read the inputs; the first time record the contribution and compute the step as well.

        Raises:
            DomainError: As `Contributions.record`.
        """
        if self._recording.outcome is not None:
            return await self._step.read_inputs()
        recorded, self._early = await asyncio.gather(
            self._contributions.record_and_read(
                self._recording, self.request, self._step.op.selectors
            ),
            self._step.make_early(self._recording),
        )
        self._consuming = self._consume_tape()
        if recorded is None:
            return None
        if isinstance(recorded, UpdateInputs) and self._is_usable(recorded):
            return recorded
        return await self._step.read_inputs()

    async def make_step(self, model: KnownModel, inputs: UpdateInputs) -> CandidateVersion | None:
        """Return the early step if it started from these inputs; else make the ordinary one."""
        early = self._early
        if early and (early.head, early.waiting) == (inputs.head, inputs.waiting):
            return early.candidate
        return await self._step.make_step(model, inputs)

    async def wait_for_tape(self) -> None:
        """Wait until the tape is marked as consumed, if it was recorded."""
        if self._consuming is not None:
            await self._consuming

    def _is_usable(self, inputs: UpdateInputs) -> bool:
        """Return whether the inputs were read after the contribution was recorded, as far as it matters.

        One of the two scripts may have been sent again, so that the read came first.
        """
        return (
            inputs.remembered is not None or self._recording.contribution.waiting in inputs.waiting
        )
