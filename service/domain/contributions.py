"""Contributions: the gradients of chunks that wait in their model's slot until an Update takes them.

A contribution is named by session, epoch and chunk, and recorded once: whoever sends its gradient again
finds it recorded. Names sort by session, epoch and chunk, and gradients are summed in the order of their
names, so that the same contributions give the same weights bit for bit on whichever replica.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.domain.digests import contribution_key
from service.domain.errors import AlreadyExists, ResourceExhausted
from service.domain.lru import LruCache
from service.domain.ports import RecordOutcome
from service.domain.refusals import model_not_found, tape_missing
from service.domain.types import ChunkKey, Selector
from service.domain.weights import grads_from_bytes, spec_bytes, spec_from_bytes
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import Grads
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.model_cache import KnownModel
    from service.domain.ports import (
        Contribution,
        ContributionState,
        ModelStore,
        UpdateInputs,
        WaitingContribution,
    )
    from service.domain.publisher import StepRequest
    from service.domain.types import ContributionKey, ModelKey, SessionKey, WaitingTape
    from service.telemetry import Observer


@dataclass(slots=True)
class Recording:
    """A contribution on its way into the model's slot, and what came of it.

    Attributes:
        model: The model that the gradient is of.
        contribution: What is recorded.
        grads: The same gradient as arrays.
        chunk_seq: The chunk that it was computed for.
        outcome: None until the store has decided, or if it refused.
    """

    model: KnownModel
    contribution: Contribution
    grads: Grads
    chunk_seq: int
    outcome: RecordOutcome | None = None

    @property
    def is_replayed(self) -> bool:
        """Whether it had been recorded before."""
        return self.outcome in (RecordOutcome.REPLAYED, RecordOutcome.CONSUMED)

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for an Update."""
        return self.outcome in (RecordOutcome.RECORDED, RecordOutcome.REPLAYED)


class Contributions:
    """Records contributions and reads those that wait; caches the gradients recorded last."""

    def __init__(
        self,
        store: ModelStore,
        policy: LimitsPolicy,
        *,
        cache_bytes: int,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Start with an empty cache of up to so many bytes of gradients."""
        self._observer = observer
        self._store = store
        self._policy = policy
        self._grads: LruCache[tuple[bytes, WaitingContribution], Grads] = LruCache(
            cache_bytes, _grads_bytes
        )
        observer.cache_added("gradients", self._grads.counts)

    # --- recording --------------------------------------------------------------------------------

    async def record(self, recording: Recording) -> None:
        """Record a contribution once.

        Raises:
            DomainError: SEQ_REUSED, MODEL_NOT_FOUND, TAPE_MISSING, TAPE_QUOTA.
        """
        key = recording.model.key
        outcome = await self._store.record_contribution(key, recording.contribution)
        self._note_outcome(recording, outcome)

    async def record_and_read(
        self, recording: Recording, request: StepRequest, selectors: Sequence[Selector]
    ) -> UpdateInputs | Exception | None:
        """Record a contribution once and, in the same round trip, read the inputs of a step.

        Returns:
            The inputs, or what went wrong with reading them; they may have been read before the
            contribution was recorded, if one of the two scripts had to be sent again.

        Raises:
            DomainError: As `record`.
        """
        outcome, inputs = await self._store.record_and_read(
            request.model_key, recording.contribution, request=request.digest, selectors=selectors
        )
        self._note_outcome(recording, outcome)
        return inputs

    def forget_gradient(self, recording: Recording) -> None:
        """Drop a gradient from the cache that no step can need any more."""
        contribution = recording.contribution
        self._grads.drop((contribution.incarnation, contribution.waiting))

    def _note_outcome(self, recording: Recording, outcome: RecordOutcome) -> None:
        """Note what came of a recording, or refuse it."""
        self._refuse(recording, outcome)
        recording.outcome = outcome
        contribution = recording.contribution
        if not recording.is_replayed:
            self._observer.contribution_recorded(gradient_bytes=contribution.gradient.nbytes)
        self._grads.put((contribution.incarnation, contribution.waiting), recording.grads)

    def _refuse(self, recording: Recording, outcome: RecordOutcome) -> None:
        chunk_seq = recording.chunk_seq
        if outcome is RecordOutcome.REUSED:
            text = (
                f"a gradient of chunk {chunk_seq} was recorded with different content: "
                "another writer uses this session, or other data was sent for the same chunk"
            )
            raise AlreadyExists("SEQ_REUSED", text, chunk_seq=chunk_seq)
        if outcome is RecordOutcome.GONE:
            raise model_not_found(recording.model.key.model_id)
        if outcome is RecordOutcome.EXPIRED:
            raise tape_missing(chunk_seq, None)
        if outcome is RecordOutcome.QUOTA:
            limits = self._policy.of(recording.model.key.tenant)
            text = (
                f"the contributions that wait for an Update have reached {limits.contributions_per_model} "
                f"or {limits.contribution_bytes_per_model} bytes; send Update or DiscardGradients"
            )
            raise ResourceExhausted("TAPE_QUOTA", text, quota="contributions_per_model")
        if outcome is RecordOutcome.TENANT_QUOTA:
            limit = self._policy.of(recording.model.key.tenant).contribution_bytes_per_tenant
            text = (
                f"the contributions of this tenant that wait for an Update would need more than {limit} "
                "bytes, the most there may be; send Update or DiscardGradients"
            )
            raise ResourceExhausted(
                "TAPE_QUOTA", text, quota="contribution_bytes_per_tenant", limit=limit
            )
        if outcome is RecordOutcome.FULL:
            text = (
                "too many contributions were recorded lately to remember one more; try again later"
            )
            raise ResourceExhausted(
                "TAPE_QUOTA", text, retry_after_s=30.0, quota="remembered_contributions_per_model"
            )

    # --- reading ----------------------------------------------------------------------------------

    async def find(
        self, model: ModelKey, contribution: ContributionKey
    ) -> ContributionState | None:
        """Return what has become of a contribution; None if it was never recorded."""
        return await self._store.find_contribution(model, contribution)

    async def read_inputs(
        self, request: StepRequest, selectors: Sequence[Selector]
    ) -> UpdateInputs | None:
        """Read what a step starts from, with the waiting contributions that the selectors choose."""
        return await self._store.read_update_inputs(request.model_key, request.digest, selectors)

    async def read_gradients(
        self, model: KnownModel, waiting: Sequence[WaitingContribution]
    ) -> dict[WaitingContribution, Grads] | None:
        """Return the gradients of contributions, in their order; None if one does not wait any more.

        Args:
            model: Their model.
            waiting: The contributions.
        """
        cached = {one: self._grads.get((model.incarnation, one)) for one in waiting}
        missing = [one for one, grads in cached.items() if grads is None]
        if missing:
            found = await self._store.read_gradients(model.key, missing, spec_bytes(model.spec))
            if found is None:
                return None
            for one, data in zip(missing, found, strict=True):
                cached[one] = grads_from_bytes(model.spec, data)
        return {one: grads for one, grads in cached.items() if grads is not None}

    # --- what waits -------------------------------------------------------------------------------

    async def list_of_session(
        self, model: ModelKey, key: SessionKey, incarnation: bytes
    ) -> list[Selector]:
        """Return which contributions of a session wait, by epoch.

        Raises:
            DomainError: MODEL_NOT_FOUND, also if the model is of another incarnation;
                UNSUPPORTED_LAYOUT.
        """
        selectors = [Selector(key.session_id)]
        inputs = await self._store.read_update_inputs(model, None, selectors)
        if inputs is not None:
            spec_from_bytes(inputs.spec)  # an unknown layout also governs the contributions
        if inputs is None or inputs.incarnation != incarnation:
            raise model_not_found(model.model_id)
        by_epoch: dict[int, list[int]] = {}
        for waiting in inputs.waiting:
            by_epoch.setdefault(waiting.key.epoch, []).append(waiting.key.chunk_seq)
        return [Selector(key.session_id, epoch, tuple(seqs)) for epoch, seqs in by_epoch.items()]

    async def without_recorded(
        self, model: ModelKey, key: SessionKey, tapes: Sequence[WaitingTape]
    ) -> list[WaitingTape]:
        """Return those of the tapes of a session whose contribution was never recorded."""
        wanted = [contribution_key(ChunkKey(key, tape.epoch, tape.chunk_seq)) for tape in tapes]
        states = await asyncio.gather(*(self.find(model, one) for one in wanted))
        return [tape for tape, state in zip(tapes, states, strict=True) if state is None]

    async def discard(self, model: KnownModel, selectors: Sequence[Selector]) -> int:
        """Drop waiting contributions and return how many there were.

        Raises:
            NotFound: MODEL_NOT_FOUND.
        """
        dropped = await self._store.discard_contributions(model.key, model.incarnation, selectors)
        if dropped is None:
            raise model_not_found(model.key.model_id)
        return dropped


def _grads_bytes(grads: Grads) -> int:
    return grads.nbytes + 512
