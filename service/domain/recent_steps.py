"""The last step of each model that this process has stepped lately, for the page that shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.domain.ports import StepAnswer
    from service.domain.types import ModelKey

MOST_MODELS: Final = 100


@dataclass(frozen=True, slots=True)
class LastStep:
    """What is known of a model's steps.

    Attributes:
        steps: How many this process has made of it, as long as it was among those that are kept.
        gradient_norm: Of the last one, before clipping.
        time_ms: When that was, in ms since 1970.
    """

    steps: int
    gradient_norm: float
    time_ms: int


class RecentSteps:
    """Keeps the models that were stepped last; costs a step two lookups."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Start empty."""
        self._clock = clock
        self._last: dict[ModelKey, LastStep] = {}

    def note(self, model: ModelKey, answer: StepAnswer) -> None:
        """Note that a step was published."""
        before = self._last.pop(model, None)
        steps = before.steps + 1 if before else 1
        self._last[model] = LastStep(steps, answer.gradient_norm, int(self._clock() * 1000))
        if len(self._last) > MOST_MODELS:
            del self._last[next(iter(self._last))]

    def all(self) -> dict[ModelKey, LastStep]:
        """Return the last step by model."""
        return dict(self._last)
