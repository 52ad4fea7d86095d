"""Updates: optimizer steps from the contributions that wait.

A step reads the head and the waiting contributions in one atomic read, and is a function of them: the
same inputs give the same version, bit for bit, whoever computes it and however often.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rnn_engine import apply_update, clip_by_global_norm, scale_grads, sum_grads
from service.compute.scheduler import hash_work
from service.domain.digests import contribution_key, request_name, update_digest
from service.domain.errors import DomainError, FailedPrecondition, UnsupportedLayout
from service.domain.publisher import CandidateVersion, StepRequest
from service.domain.refusals import UNCHANGED
from service.domain.types import (
    ChunkKey,
    ModelKey,
    Reduction,
    RequestDigest,
    SessionKey,
    UpdateResult,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import Grads, Moments, Weights
    from rnn_engine.optimizers import Optimizer
    from service.compute.scheduler import Scheduler
    from service.domain.contributions import Contributions, Recording
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import UpdateInputs, WaitingContribution
    from service.domain.publisher import VersionPublisher, VersionStep
    from service.domain.rules import InputRules
    from service.domain.types import (
        Selector,
        Update,
        Version,
    )


class Updates:
    """The Update operation."""

    def __init__(
        self,
        contributions: Contributions,
        publisher: VersionPublisher,
        *,
        model_cache: ModelCache,
        scheduler: Scheduler,
        rules: InputRules,
    ) -> None:
        """Keep the parts that a step uses."""
        self._rules = rules
        self._contributions = contributions
        self._publisher = publisher
        self._model_cache = model_cache
        self._scheduler = scheduler

    async def update(self, tenant: str, op: Update) -> UpdateResult:
        """Make one optimizer step from waiting contributions."""
        self._rules.check_update(op)
        return await self.publish(self.step(tenant, op))

    def step(self, tenant: str, op: Update) -> OptimizerStep:
        """Return the step that an Update asks for."""
        request = StepRequest(
            ModelKey(tenant, op.model_id),
            RequestDigest(request_name(op.request_id), update_digest(op)),
            op.expected,
        )
        return OptimizerStep(
            request=request,
            op=op,
            contributions=self._contributions,
            model_cache=self._model_cache,
            scheduler=self._scheduler,
        )

    def is_busy(self, model: ModelKey) -> bool:
        """Return whether a step of the model is running in this process."""
        return self._publisher.is_busy(model)

    async def publish(self, step: VersionStep) -> UpdateResult:
        """Publish what a step makes, or return the answer of an earlier try."""
        answer = await self._publisher.publish(step)
        return UpdateResult(
            step.request.model_key.model_id,
            answer.version,
            answer.gradient_norm,
            answer.clipped,
            answer.contribution_count,
            answer.replayed,
        )


@dataclass(frozen=True, slots=True)
class EarlyStep:
    """A step that was computed before its inputs were read; valid only if they are these.

    Attributes:
        head: The version that it starts from.
        waiting: The contributions that it takes.
        candidate: What it makes.
    """

    head: Version
    waiting: tuple[WaitingContribution, ...]
    candidate: CandidateVersion


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """A step of a model's optimizer from waiting contributions; a `VersionStep`.

    Attributes:
        request: What was asked for.
        op: Which contributions are taken and how they are joined, and the learning rate.
        contributions: Where they wait.
        model_cache: Gives weights and moments of the head.
        scheduler: Runs the arithmetic.
    """

    request: StepRequest
    op: Update
    contributions: Contributions
    model_cache: ModelCache
    scheduler: Scheduler

    async def read_inputs(self) -> UpdateInputs | None:
        """Read the head, the remembered request and the contributions that wait."""
        return await self.contributions.read_inputs(self.request, self.op.selectors)

    async def make_step(self, model: KnownModel, inputs: UpdateInputs) -> CandidateVersion | None:
        """Apply the optimizer to the head and the sum of the gradients.

        Raises:
            FailedPrecondition: NO_GRADIENTS; NON_FINITE_RESULT.
        """
        _check_all_wait(self.request.model_key.tenant, self.op.selectors, inputs)
        waiting = await self.contributions.read_gradients(model, inputs.waiting)
        if waiting is None:
            return None
        try:
            _, loaded = await self.model_cache.weights(model, inputs.head)
        except UnsupportedLayout:
            raise
        except DomainError:  # the head was superseded, and its weights dropped
            return None
        moments = await self.model_cache.kept_moments(model, inputs.head, loaded.weights)
        if moments is None:  # only a superseded version has none
            return None
        return await self._compute(_Start(model.spec.optimizer, loaded.weights, moments), waiting)

    async def make_early(self, recording: Recording) -> EarlyStep | None:
        """Compute the step from one contribution and the cached head, before any inputs are read.

        Returns:
            None if the head is not cached, or if the step fails: then `make_step` will say why.
        """
        model, waiting = recording.model, recording.contribution.waiting
        loaded = self.model_cache.cached_weights(model.incarnation, model.head)
        moments = self.model_cache.cached_moments(model)
        if loaded is None or moments is None:
            return None
        start = _Start(model.spec.optimizer, loaded.weights, moments)
        with suppress(DomainError):
            candidate = await self._compute(start, {waiting: recording.grads})
            # Cached with the candidate, for the publisher.
            await self.scheduler.run(hash_work(loaded.weights.nbytes), lambda: candidate.stored)
            return EarlyStep(model.head, (waiting,), candidate)
        return None

    async def _compute(
        self, start: _Start, waiting: dict[WaitingContribution, Grads]
    ) -> CandidateVersion:
        work = 4 * len(waiting) * start.weights.buffer.size
        return await self.scheduler.run(work, _apply_optimizer, self.op, start, waiting)


@dataclass(frozen=True, slots=True)
class _Start:
    """What an optimizer starts from."""

    optimizer: Optimizer
    weights: Weights
    moments: Moments


def _apply_optimizer(
    op: Update, start: _Start, waiting: dict[WaitingContribution, Grads]
) -> CandidateVersion:
    joined = sum_grads(list(waiting.values()))
    if op.reduction is Reduction.MEAN:
        joined = scale_grads(joined, 1.0 / len(waiting))
    joined, norm, clipped = clip_by_global_norm(joined, op.clip_norm)
    if not math.isfinite(norm):  # clipping would turn it into a step of zero or of NaN
        text = (
            f"the sum of the contributions ({len(waiting)}) is not finite; {UNCHANGED} and they "
            "still wait: take fewer of them, or discard them"
        )
        raise FailedPrecondition("NON_FINITE_RESULT", text, contributions=len(waiting))
    optimizer = start.optimizer
    if op.learning_rate is not None:
        optimizer = replace(optimizer, lr=op.learning_rate)
    weights, moments = apply_update(optimizer, start.weights, joined, start.moments)
    return CandidateVersion(weights, moments, [one.key for one in waiting], norm, clipped)


def _check_all_wait(tenant: str, selectors: Sequence[Selector], inputs: UpdateInputs) -> None:
    """Raise NO_GRADIENTS unless something waits, and each contribution whose chunk was named."""
    waiting = {one.key for one in inputs.waiting}
    named = [
        contribution_key(ChunkKey(SessionKey(tenant, one.session_id), one.epoch, chunk_seq))
        for one in selectors
        for chunk_seq in one.chunk_seqs
    ]
    found = sum(key in waiting for key in named) if named else len(waiting)
    expected = len(named) or 1
    if not waiting or found < expected:
        text = f"waiting contributions: expected {'' if named else 'at least '}{expected}, found {found}"
        raise FailedPrecondition("NO_GRADIENTS", text, found=found, expected=expected)
