"""Makes a model's next version: one decision, once, whatever is sent again.

The request id, the head and the contributions are read in one look; the version is computed and written
under its own name; one script then flips the head if all is still as it was looked at. A request that
was carried out is answered from what is remembered of it.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from rnn_engine import moments_to_arrays
from service.compute.scheduler import hash_work
from service.domain import weights
from service.domain.carrying import Carrier
from service.domain.digests import request_name
from service.domain.errors import FailedPrecondition, Unavailable
from service.domain.finite import is_finite
from service.domain.ports import NewVersion, Publication, PublishOutcome
from service.domain.refusals import (
    UNCHANGED,
    model_not_found,
    request_id_reused,
    unsupported_layout,
    version_conflict,
)
from service.domain.types import Version
from service.domain.weights import spec_from_bytes
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rnn_engine import Moments, Params
    from service.compute.scheduler import Scheduler
    from service.domain.blob import Blob
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import ModelStore, UpdateInputs
    from service.domain.types import ModelKey
    from service.telemetry import Observer

    MakeCandidate = Callable[[KnownModel, UpdateInputs], Awaitable["CandidateVersion | None"]]
    Look = Callable[[bytes], Awaitable[UpdateInputs | None]]  # given the request's name

_TRIES = 16
_ANSWER = struct.Struct(">Q16sd?I")


@dataclass(frozen=True)
class CandidateVersion:
    """What the next version holds and how it was made."""

    params: Params
    moments: Moments
    names: Sequence[bytes] = ()
    gradient_norm: float = 0.0
    clipped: bool = False

    @cached_property
    def stored(self) -> tuple[Blob, Blob, bytes]:
        """Weights and moments laid out for the store, and the digest that names them.

        Raises:
            FailedPrecondition: NON_FINITE_RESULT.
        """
        params = self.params
        named = {"Wx": params.Wx, "Wh": params.Wh, "b": params.b, **moments_to_arrays(self.moments)}
        bad = [name for name, array in named.items() if not is_finite(array)]
        if bad:
            text = f"the new {', '.join(bad)} would not be finite; {UNCHANGED}"
            if self.names:
                text += (
                    ", and the contributions still wait: discard them, or clip them with clip_norm"
                )
            raise FailedPrecondition("NON_FINITE_RESULT", text, tensors=",".join(bad))
        data = weights.params_to_blob(params)
        moments = weights.moments_to_blob(self.moments)
        return data, moments, weights.version_digest(data, moments)


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """What is answered, and remembered, of a step."""

    version: Version
    gradient_norm: float
    clipped: bool
    contribution_count: int
    replayed: bool = False

    def to_bytes(self) -> bytes:
        """Lay out the answer for the store."""
        version = self.version
        return _ANSWER.pack(
            version.number,
            version.digest,
            self.gradient_norm,
            self.clipped,
            self.contribution_count,
        )


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Who asks for a next version, and under which condition."""

    model_key: ModelKey
    request_id: str
    content_digest: bytes
    expected: Version | None
    selectors: Sequence[bytes] = ()


class VersionPublisher:
    """Makes next versions; steps of one model in this process go one after another."""

    def __init__(
        self,
        store: ModelStore,
        model_cache: ModelCache,
        scheduler: Scheduler,
        *,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Keep the parts that a step uses."""
        self._observer = observer
        self._store = store
        self._model_cache = model_cache
        self._scheduler = scheduler
        self._carrier = Carrier()
        self._turns: WeakValueDictionary[ModelKey, asyncio.Lock] = WeakValueDictionary()

    async def install(
        self,
        model: KnownModel,
        expected: Version | None,
        request_id: str,
        content_digest: bytes,
        made: CandidateVersion,
    ) -> tuple[Version, bool]:
        """Make given weights the next version; tell whether an earlier try had done so."""

        async def give(now: KnownModel, _inputs: UpdateInputs) -> CandidateVersion:
            if now.incarnation != model.incarnation:  # made for another specification, perhaps
                raise model_not_found(model.key.model_id)
            return made

        request = StepRequest(model.key, request_id, content_digest, expected)
        answer = await self.advance(request, give)
        return answer.version, answer.replayed

    def is_busy(self, request: StepRequest) -> bool:
        """Tell whether a step of the request's model is being made in this process."""
        turn = self._turns.get(request.model_key)
        return turn is not None and turn.locked()

    async def advance(
        self, request: StepRequest, make: MakeCandidate, first_read: Look | None = None
    ) -> StepAnswer:
        """Make the next version by `make`, which returns None when what it needs went away.

        Args:
            request: Who asks, and under which condition.
            make: Given the model and what was looked at.
            first_read: Looks in place of the store the first time.

        Raises:
            DomainError: MODEL_NOT_FOUND, REQUEST_ID_REUSED, VERSION_CONFLICT, NON_FINITE_RESULT,
                UNSUPPORTED_LAYOUT.
        """
        # Carried on: a large step may take longer than a caller waits for one answer, and its retry,
        # whose turn comes after, is to find it made.
        return await self._carrier.carry(self._advance_in_turn(request, make, first_read))

    async def _advance_in_turn(
        self, request: StepRequest, make: MakeCandidate, first_read: Look | None
    ) -> StepAnswer:
        # Only to spare work: two steps from one head would make one of them compute again.
        turn = self._turns.setdefault(request.model_key, asyncio.Lock())
        async with turn:
            return await self._advance(request, make, first_read)

    async def _advance(
        self, request: StepRequest, make: MakeCandidate, first_read: Look | None
    ) -> StepAnswer:
        name = request_name(request.request_id)
        for attempt in range(_TRIES):
            if first_read and not attempt:
                inputs = await first_read(name)
            else:
                inputs = await self._store.read_update_inputs(
                    request.model_key, name, request.selectors
                )
            if inputs is None:
                self._model_cache.forget(request.model_key)
                raise model_not_found(request.model_key.model_id)
            spec_from_bytes(inputs.spec)  # one that is not known governs what is remembered too
            if inputs.remembered:
                return _remembered(inputs.remembered, request.content_digest)
            if request.expected is not None and not request.expected.names(inputs.head):
                raise version_conflict(request.expected, inputs.head)
            model = await self._model_at(request, inputs)
            made = None if model is None else await make(model, inputs)
            if model is None or made is None:
                continue
            answer = await self._publish(request, name, model, inputs, made)
            if answer is not None:
                return answer
        text = "other writers were faster each time; send the same call again"
        raise Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=0.05)

    async def _model_at(self, request: StepRequest, inputs: UpdateInputs) -> KnownModel | None:
        model = await self._model_cache.get(request.model_key)
        if model.incarnation != inputs.incarnation:
            model = await self._model_cache.get(request.model_key, fresh=True)
        return model if model.incarnation == inputs.incarnation else None

    async def _publish(
        self,
        request: StepRequest,
        name: bytes,
        model: KnownModel,
        inputs: UpdateInputs,
        made: CandidateVersion,
    ) -> StepAnswer | None:
        size = weights.spec_bytes(model.spec)
        data, moments, digest = await self._scheduler.run(hash_work(size), lambda: made.stored)
        version = Version(inputs.head.number + 1, digest)
        answer = StepAnswer(version, made.gradient_norm, made.clipped, len(made.names))
        publication = Publication(
            incarnation=inputs.incarnation,
            base=inputs.head,
            new=NewVersion(version, data, moments),
            request=name,
            content_digest=request.content_digest,
            answer=answer.to_bytes(),
            names=made.names,
        )
        asked_at = self._model_cache.now()
        outcome, known = await self._store.publish_version(request.model_key, publication)
        if outcome is PublishOutcome.PUBLISHED:
            self._model_cache.note_head(model, version, made.params, made.moments, asked_at)
            self._observer.version_published(
                contributions=len(made.names), version_bytes=data.nbytes + moments.nbytes
            )
            return answer
        if outcome is PublishOutcome.REPLAYED:
            return _remembered(request.content_digest + known, request.content_digest)
        if outcome is PublishOutcome.REUSED:
            raise request_id_reused()
        if outcome is PublishOutcome.GONE:
            self._model_cache.forget(request.model_key)
            raise model_not_found(request.model_key.model_id)
        return None


def _remembered(known: bytes, content_digest: bytes) -> StepAnswer:
    if known[: len(content_digest)] != content_digest:
        raise request_id_reused()
    answer = known[len(content_digest) :]
    if not answer:  # the id was used to create the model
        raise request_id_reused()
    if len(answer) != _ANSWER.size:
        found, expected = f"{len(answer)} bytes", f"{_ANSWER.size} bytes"
        raise unsupported_layout("the remembered answer of a step", found, expected)
    number, digest, norm, clipped, count = _ANSWER.unpack(answer)
    return replace(StepAnswer(Version(number, digest), norm, clipped, count), replayed=True)
