"""Backward: the gradients of a chunk from its tape, recorded once as a contribution.

What only computes may run before the store has answered; what has an effect waits for the answer. So the
gradients are computed from a cached tape while the store is asked whether that tape may still be used,
and nothing is recorded before it has said so.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from rnn_engine import global_norm
from service.compute.scheduler import hash_work
from service.domain.contributions import Recording
from service.domain.digests import contribution_key, gradient_digest
from service.domain.errors import DomainError, FailedPrecondition, NotFound
from service.domain.finite import is_finite
from service.domain.overlap import OverlappedStep
from service.domain.ports import Contribution
from service.domain.refusals import (
    answer_too_large,
    check_tensor,
    recorded_metadata,
    still_recorded,
)
from service.domain.types import BackwardResult, ChunkKey, ModelKey, Selector, SessionKey
from service.domain.weights import grads_to_blob

if TYPE_CHECKING:
    from rnn_engine import Array, Grads, Network
    from service.compute.scheduler import Scheduler
    from service.domain.contributions import Contributions
    from service.domain.model_cache import KnownModel, LoadedWeights, ModelCache
    from service.domain.rules import InputRules
    from service.domain.session_tapes import SessionTapes
    from service.domain.tapes import StoredTape
    from service.domain.types import Backward, Update, UpdateResult
    from service.domain.updates import OptimizerStep, Updates

_ANSWER_OVERHEAD = 2048  # bytes of an answer beside its tensors, at most


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What a chunk's way back gives.

    Attributes:
        grads: Of the weights.
        d_inputs: Of the inputs, (N, T, D); None where inputs are not numbers.
        d_state: Of the state before the chunk, (N, state size).
    """

    grads: Grads
    d_inputs: Array | None
    d_state: Array


@dataclass(frozen=True, slots=True)
class _Computed:
    """Gradients, and the digest of what they were computed from."""

    gradients: _Gradients
    digest: bytes


class Backpropagation:
    """The Backward operation."""

    def __init__(
        self,
        tapes: SessionTapes,
        contributions: Contributions,
        updates: Updates,
        *,
        model_cache: ModelCache,
        scheduler: Scheduler,
        rules: InputRules,
    ) -> None:
        """Keep the parts that a Backward passes through."""
        self._tapes = tapes
        self._contributions = contributions
        self._updates = updates
        self._model_cache = model_cache
        self._scheduler = scheduler
        self._rules = rules

    async def backward(self, tenant: str, op: Backward) -> BackwardResult:
        """Compute a chunk's gradients and record them once; then make a step, if one is asked for."""
        self._rules.check_backward(op)
        cached = self._tapes.get_cached(op)
        found, early = await asyncio.gather(
            self._tapes.read(tenant, op, cached), self._compute_early(op, cached)
        )
        session, tape = found.session, found.tape
        model = await self._model_cache.get_incarnation(
            ModelKey(tenant, session.model_id), session.incarnation
        )
        self._check(op, tape, model)
        if early is None or tape.incarnation != model.incarnation:
            early = await self._compute(op, tape, await self._weights_of(op, tape, model))
        gradients = early.gradients
        norm = _finite_norm(gradients)
        contribution = Contribution(
            model.incarnation,
            contribution_key(ChunkKey(SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq)),
            early.digest,
            grads_to_blob(gradients.grads),
            found.expires_ms,
        )
        recording = Recording(model, contribution, gradients.grads, op.chunk_seq)
        update = await self._record_and_update(tenant, op, recording)
        return BackwardResult(
            session_id=op.session_id,
            epoch=op.epoch,
            chunk_seq=op.chunk_seq,
            d_inputs=gradients.d_inputs if op.return_d_inputs else None,
            d_state=gradients.d_state,
            grads=gradients.grads if op.return_gradients else None,
            gradient_norm=norm,
            version=tape.version,
            replayed=recording.is_replayed,
            update=update,
        )

    # --- gradients --------------------------------------------------------------------------------

    async def _compute_early(self, op: Backward, cached: StoredTape | None) -> _Computed | None:
        """Compute gradients from cached tape and weights; None if one is missing or does not fit."""
        if cached is None:
            return None
        weights = self._model_cache.cached_weights(cached.incarnation, cached.version)
        if weights is None or not _fits(op, cached, weights.network):
            return None
        return await self._compute(op, cached, weights)

    async def _compute(self, op: Backward, tape: StoredTape, weights: LoadedWeights) -> _Computed:
        gradients, digest = await asyncio.gather(
            self._scheduler.run(_work(tape, weights.network), _differentiate, weights, tape, op),
            self._scheduler.run(hash_work(op.d_outputs.nbytes), gradient_digest, op),
        )
        return _Computed(gradients, digest)

    async def _weights_of(self, op: Backward, tape: StoredTape, model: KnownModel) -> LoadedWeights:
        """Return the weights that the tape was made with."""
        try:
            _, weights = await self._model_cache.weights(model, tape.version)
        except NotFound as error:
            key = SessionKey(model.key.tenant, op.session_id)
            contribution = contribution_key(ChunkKey(key, op.epoch, op.chunk_seq))
            state = await self._contributions.find(model.key, contribution)
            text = f"{error.message}: the tape's version is not kept any more"
            facts = recorded_metadata(op.chunk_seq, state)
            raise FailedPrecondition(
                error.reason, text, version=tape.version.number, **facts
            ) from error
        return weights

    def _check(self, op: Backward, tape: StoredTape, model: KnownModel) -> None:
        """Refuse gradients that do not fit the tape, and a request whose answer would be too large."""
        network, dtype, (n, t) = model.spec.network, model.spec.dtype, tape.inputs.shape[:2]
        check_tensor("dhs", op.d_outputs, (n, t, network.output_size), dtype)
        if op.d_state is not None:
            check_tensor("dh_next", op.d_state, tape.state.shape, dtype)
        size = tape.state.nbytes + _ANSWER_OVERHEAD
        size += tape.inputs.nbytes if op.return_d_inputs else 0
        size += network.weight_spec.size * tape.state.itemsize if op.return_gradients else 0
        if size > self._rules.limits.message_bytes:
            raise answer_too_large(size, self._rules.limits.message_bytes)

    # --- recording, and the step after it ---------------------------------------------------------

    async def _record_and_update(
        self, tenant: str, op: Backward, recording: Recording
    ) -> UpdateResult | None:
        """Record the contribution; then make the step that the Backward asks for, if any."""
        if op.update is None:
            await self._record(tenant, op, recording)
            return None
        step = self._updates.step(tenant, _own_update(op, op.update, recording.model))
        try:
            if self._may_overlap(op, step, recording):
                return await self._update_overlapped(op, step, recording)
            await self._record(tenant, op, recording)
            return await self._updates.publish(step)
        except DomainError as error:
            if recording.is_waiting:
                raise still_recorded(error, op.chunk_seq) from error
            raise

    async def _record(self, tenant: str, op: Backward, recording: Recording) -> None:
        await self._contributions.record(recording)
        await self._tapes.consume(tenant, op)

    def _may_overlap(self, op: Backward, step: OptimizerStep, recording: Recording) -> bool:
        """Return whether recording may be part of the step.

        The step must take this contribution alone. And no other step of the model may be running here:
        the recording would wait for it.
        """
        model = recording.model.key
        is_own = step.request.model_key == model and step.op.selectors == (_own_selector(op),)
        return is_own and not self._updates.is_busy(model)

    async def _update_overlapped(
        self, op: Backward, step: OptimizerStep, recording: Recording
    ) -> UpdateResult:
        """Record and step at once; the tape is marked as consumed while the version is published."""
        consume_tape = partial(self._tapes.consume, recording.model.key.tenant, op)
        overlapped = OverlappedStep(step, recording, self._contributions, consume_tape=consume_tape)
        try:
            result = await self._updates.publish(overlapped)
        finally:
            await overlapped.wait_for_tape()
        self._contributions.forget_gradient(recording)  # the step took it
        return result


def _own_update(op: Backward, update: Update, model: KnownModel) -> Update:
    """Return the Update of a Backward, which stands for the Backward's model and chunk by default."""
    return replace(
        update,
        model_id=update.model_id or model.key.model_id,
        selectors=update.selectors or (_own_selector(op),),
    )


def _own_selector(op: Backward) -> Selector:
    """Return what selects the contribution of a Backward alone."""
    return Selector(op.session_id, op.epoch, (op.chunk_seq,))


def _finite_norm(gradients: _Gradients) -> float:
    norm = global_norm(gradients.grads)
    others = (gradients.d_inputs, gradients.d_state)
    if not (math.isfinite(norm) and all(one is None or is_finite(one) for one in others)):
        text = "the gradients are not finite; nothing was recorded"
        raise FailedPrecondition("NON_FINITE_RESULT", text)
    return norm


def _fits(op: Backward, tape: StoredTape, network: Network) -> bool:
    """Return whether the gradients that came have the shape and type of the tape."""
    shape, dtype = (*tape.inputs.shape[:2], network.output_size), tape.state.dtype
    fits = op.d_outputs.shape == shape and op.d_outputs.dtype == dtype
    arriving = op.d_state
    return fits and (
        arriving is None or (arriving.shape == tape.state.shape and arriving.dtype == dtype)
    )


def _differentiate(weights: LoadedWeights, tape: StoredTape, op: Backward) -> _Gradients:
    network = weights.network
    state_spec = network.state_spec
    arriving = None if op.d_state is None else state_spec.split_rows(op.d_state)
    grads, d_inputs, d_state = network.backward(
        weights.prepared, tape.complete(weights), op.d_outputs, arriving
    )
    return _Gradients(grads, d_inputs, state_spec.join_rows(d_state))


def _work(tape: StoredTape, network: Network) -> int:
    """Return the multiply-adds of a Backward: twice those of its Forward."""
    n, t = tape.inputs.shape[:2]
    return 2 * network.work(n, t)
