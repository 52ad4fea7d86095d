"""Publishes the next version of a model, once for each request.

Publishing is optimistic: nothing is locked in the store. One atomic read returns the head, the waiting
contributions and what is remembered of the request id. The next version is computed from them. Then one
script compares and swaps: it writes the version and makes it the head only if the head is still the one
that was read and the contributions still wait. If not, all is read and computed again.

It is idempotent by request id: the swap remembers the answer with the id, and a request that comes again
gets that answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol
from weakref import WeakValueDictionary

from rnn_engine import moments_to_arrays
from service.compute.scheduler import hash_work
from service.domain.errors import FailedPrecondition
from service.domain.finite import is_finite
from service.domain.ports import NewVersion, Publication, PublishOutcome, Remembered, StepAnswer
from service.domain.recent_steps import RecentSteps
from service.domain.refusals import (
    UNCHANGED,
    contended,
    model_not_found,
    request_id_reused,
    version_conflict,
)
from service.domain.retries import STEP_TRIES
from service.domain.types import Version
from service.domain.weights import (
    moments_to_blob,
    spec_bytes,
    spec_from_bytes,
    version_digest,
    weights_to_blob,
)
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import Moments, Weights
    from service.compute.scheduler import Scheduler
    from service.domain.blob import Blob
    from service.domain.carrying import Carrier
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import ModelStore, UpdateInputs
    from service.domain.types import ContributionKey, ModelKey, RequestDigest
    from service.telemetry import Observer


@dataclass(frozen=True)
class CandidateVersion:
    """A version that was computed and is not published yet.

    Attributes:
        weights: Its weights.
        moments: Its optimizer's state.
        contributions: What it was made from.
        gradient_norm: The norm of their joined gradient, before clipping.
        clipped: Whether the gradient was clipped.
    """

    weights: Weights
    moments: Moments
    contributions: Sequence[ContributionKey] = ()
    gradient_norm: float = 0.0
    clipped: bool = False

    @cached_property
    def stored(self) -> tuple[Blob, Blob, bytes]:
        """Weights and moments as the store keeps them, and the digest that names both.

        Raises:
            FailedPrecondition: NON_FINITE_RESULT.
        """
        named = self.weights.named() | moments_to_arrays(self.moments)
        bad = [name for name, array in named.items() if not is_finite(array)]
        if bad:
            text = f"the new {', '.join(bad)} would not be finite; {UNCHANGED}"
            if self.contributions:
                text += (
                    ", and the contributions still wait: discard them, or clip them with clip_norm"
                )
            raise FailedPrecondition("NON_FINITE_RESULT", text, tensors=",".join(bad))
        data = weights_to_blob(self.weights)
        moments = moments_to_blob(self.moments)
        return data, moments, version_digest(data, moments)


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Which model shall have a next version, for which request, and under which condition.

    Attributes:
        model_key: The model.
        digest: What the store remembers the request by; the same on every attempt.
        expected: The head that the step must start from; None if any will do.
    """

    model_key: ModelKey
    digest: RequestDigest
    expected: Version | None


class VersionStep(Protocol):
    """A step from a model's head to its next version.

    The publisher calls both methods on each attempt, in this order, until it can swap the head.
    """

    @property
    def request(self) -> StepRequest:
        """What was asked for; the same on every attempt."""

    async def read_inputs(self) -> UpdateInputs | None:
        """Read in one atomic read what the step starts from; None if there is no such model."""

    async def make_step(self, model: KnownModel, inputs: UpdateInputs) -> CandidateVersion | None:
        """Compute the next version; None if what it needs is gone from the store meanwhile.

        Args:
            model: The model, in the incarnation of the inputs.
            inputs: What `read_inputs` returned. Their head is the version to start from.
        """


class VersionPublisher:
    """Publishes versions; within this process the steps of one model run one after another."""

    def __init__(
        self,
        store: ModelStore,
        model_cache: ModelCache,
        scheduler: Scheduler,
        *,
        carrier: Carrier,
        observer: Observer = NULL_OBSERVER,
        steps: RecentSteps | None = None,
    ) -> None:
        """Start idle."""
        self._observer = observer
        self._steps = steps or RecentSteps()
        self._store = store
        self._model_cache = model_cache
        self._scheduler = scheduler
        self._carrier = carrier
        self._turns: WeakValueDictionary[ModelKey, asyncio.Lock] = WeakValueDictionary()

    def is_busy(self, model: ModelKey) -> bool:
        """Return whether a step of the model is running in this process."""
        turn = self._turns.get(model)
        return turn is not None and turn.locked()

    async def publish(self, step: VersionStep) -> StepAnswer:
        """Make a step's version the head of its model, or return the answer of an earlier try.

        Raises:
            DomainError: MODEL_NOT_FOUND, REQUEST_ID_REUSED, VERSION_CONFLICT, NON_FINITE_RESULT,
                UNSUPPORTED_LAYOUT, UNKNOWN_OUTCOME.
        """
        # A large step may take longer than its caller waits. It goes on, and the retry, whose turn comes
        # after it, finds the remembered answer.
        return await self._carrier.carry(self._publish_in_turn(step))

    async def _publish_in_turn(self, step: VersionStep) -> StepAnswer:
        # The lock saves work only: of two steps from the same head one would have to compute again.
        turn = self._turns.setdefault(step.request.model_key, asyncio.Lock())
        async with turn:
            for _ in range(STEP_TRIES):
                answer = await self._try_step(step)
                if answer is not None:
                    return answer
        raise contended()

    async def _try_step(self, step: VersionStep) -> StepAnswer | None:
        """Read, compute, and swap the head; return None if another writer was faster."""
        request = step.request
        inputs = await step.read_inputs()
        if inputs is None:
            raise self._model_gone(request.model_key)
        spec_from_bytes(inputs.spec)  # an unknown layout also governs what is remembered
        if inputs.remembered is not None:
            return _remembered_answer(inputs.remembered, request.digest)
        if request.expected is not None and not request.expected.names(inputs.head):
            raise version_conflict(request.expected, inputs.head)
        model = await self._model_of(request.model_key, inputs.incarnation)
        candidate = None if model is None else await step.make_step(model, inputs)
        if model is None or candidate is None:
            return None
        publication = await self._prepare(request, inputs, candidate)
        return await self._swap_head(model, publication, candidate)

    async def _model_of(self, key: ModelKey, incarnation: bytes) -> KnownModel | None:
        model = await self._model_cache.get(key)
        if model.incarnation != incarnation:
            model = await self._model_cache.get(key, fresh=True)
        return model if model.incarnation == incarnation else None

    async def _prepare(
        self, request: StepRequest, inputs: UpdateInputs, candidate: CandidateVersion
    ) -> Publication:
        """Name the version by its content and encode what is published."""
        work = hash_work(spec_bytes(spec_from_bytes(inputs.spec)))
        data, moments, digest = await self._scheduler.run(work, lambda: candidate.stored)
        version = Version(inputs.head.number + 1, digest)
        return Publication(
            incarnation=inputs.incarnation,
            base=inputs.head,
            new=NewVersion(version, data, moments),
            request=request.digest,
            answer=_answer_of(version, candidate),
            contributions=candidate.contributions,
        )

    async def _swap_head(
        self, model: KnownModel, publication: Publication, candidate: CandidateVersion
    ) -> StepAnswer | None:
        """Make the version the head if all is as it was read; else return None."""
        asked_at = self._model_cache.now()
        outcome, answer = await self._store.publish_version(model.key, publication)
        request, version = publication.request, publication.new.version
        if outcome is PublishOutcome.PUBLISHED:
            self._model_cache.note_head(
                model,
                version,
                weights=candidate.weights,
                moments=candidate.moments,
                asked_at=asked_at,
            )
            new = publication.new
            self._observer.version_published(
                contributions=len(candidate.contributions),
                version_bytes=new.weights.nbytes + new.moments.nbytes,
            )
            if candidate.contributions:
                self._steps.note(model.key, publication.answer)
            return publication.answer
        if outcome is PublishOutcome.REPLAYED:
            return _remembered_answer(Remembered(request.content, answer), request)
        if outcome is PublishOutcome.REUSED:
            raise request_id_reused()
        if outcome is PublishOutcome.GONE:
            raise self._model_gone(model.key)
        return None

    def _model_gone(self, key: ModelKey) -> Exception:
        self._model_cache.forget(key)
        return model_not_found(key.model_id)


def _answer_of(version: Version, candidate: CandidateVersion) -> StepAnswer:
    count = len(candidate.contributions)
    return StepAnswer(version, candidate.gradient_norm, candidate.clipped, count)


def _remembered_answer(remembered: Remembered, request: RequestDigest) -> StepAnswer:
    """Return the answer that is remembered with a request id, if it was the same request."""
    # Without an answer, the id was used to create the model.
    if remembered.content != request.content or remembered.answer is None:
        raise request_id_reused()
    return replace(remembered.answer, replayed=True)
