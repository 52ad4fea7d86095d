"""Trains: contributions from tapes, optimizer steps from contributions, each exactly once.

A Backward leaves one contribution, named by session, epoch and chunk, in its model's slot. An Update
takes contributions by name and makes one step from their sum, in the order of their names, so that the
same contributions give the same weights bit for bit, on whichever replica.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rnn_engine import (
    apply_update,
    clip_by_global_norm,
    global_norm,
    rnn_backward,
    scale_grads,
    sum_grads,
)
from service.compute.scheduler import hash_work
from service.domain.digests import gradient_digest, update_digest
from service.domain.errors import (
    Aborted,
    AlreadyExists,
    DomainError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    UnsupportedLayout,
)
from service.domain.finite import is_finite
from service.domain.lru import LruCache
from service.domain.ports import (
    AbsentSession,
    Contribution,
    ContributionState,
    RecordOutcome,
    UpdateInputs,
)
from service.domain.publisher import CandidateVersion, StepRequest
from service.domain.refusals import (
    STORE_FAILURES,
    UNCHANGED,
    after_decision,
    answer_too_large,
    check_epoch,
    check_tensor,
    history_forked,
    model_not_found,
    recorded,
    session_absent,
)
from service.domain.tapes import check_tape, tape_from_bytes
from service.domain.types import (
    BackwardResult,
    DiscardResult,
    ModelKey,
    Reduction,
    Selector,
    SessionKey,
    UpdateResult,
    Waiting,
)
from service.domain.weights import grads_from_bytes, grads_to_blob, spec_bytes, spec_from_bytes
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import ChunkGradients, Grads, Moments, Params
    from service.compute.scheduler import Scheduler
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import ModelStore, SessionHead, SessionStore, TapeSnapshot
    from service.domain.publisher import MakeCandidate, StepAnswer, VersionPublisher
    from service.domain.tapes import StoredTape, TapeCache
    from service.domain.types import (
        Backward,
        DiscardGradients,
        Update,
        Version,
    )
    from service.settings import Limits
    from service.telemetry import Observer

_ANSWER_OVERHEAD = 2048
_NAME_BYTES = 32  # of a contribution; what names many is shorter


@dataclass(slots=True)
class _Counting:
    """A contribution to count, and what came of it."""

    contribution: Contribution
    grads: Grads
    is_replayed: bool = False
    is_waiting: bool = False  # for an Update


class Training:
    """The Backward, Update, DiscardGradients and ListWaiting operations."""

    def __init__(
        self,
        sessions: SessionStore,
        models: ModelStore,
        model_cache: ModelCache,
        tapes: TapeCache,
        publisher: VersionPublisher,
        scheduler: Scheduler,
        limits: Limits,
        *,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Keep the parts that the operations use."""
        self._observer = observer
        self._sessions = sessions
        self._models = models
        self._model_cache = model_cache
        self._tapes = tapes
        self._publisher = publisher
        self._scheduler = scheduler
        self._limits = limits
        # Those counted last, so that an Update need not read them back.
        self._recent_grads: LruCache[tuple[bytes, bytes], Grads] = LruCache(
            limits.contribution_bytes_per_model // 4, _grads_bytes
        )
        observer.cache_added("gradients", self._recent_grads.counts)

    async def backward(self, tenant: str, op: Backward) -> BackwardResult:
        """Compute a chunk's gradients and count them once; make a step right after if asked."""
        recent = self._tapes.get(op.token)
        (head, stored, expires_ms), early = await asyncio.gather(
            self._find_tape(tenant, op, recent), self._differentiate_early(op, recent)
        )
        model = await self._model_cache.get_incarnation(
            ModelKey(tenant, head.model_id), head.incarnation
        )
        self._check_backward(op, stored, model)
        if early is None or stored.incarnation != model.incarnation:
            params = await self._tape_params(tenant, op, model, stored)
            early = await self._differentiate(op, stored, params)
        made, digest = early
        norm = _finite_norm(made)
        name = self._models.contribution_name(
            SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq
        )
        contribution = Contribution(
            model.incarnation, name, digest, grads_to_blob(made.grads), expires_ms
        )
        counting = _Counting(contribution, made.grads)
        update = None
        if op.update is None:
            await self._count(tenant, op, model, counting)
        else:
            try:
                update = await self._count_and_update(tenant, op, model, counting)
            except DomainError as error:
                if counting.is_waiting:
                    raise recorded(error, op.chunk_seq) from error
                raise
        return BackwardResult(
            session_id=op.session_id,
            epoch=op.epoch,
            chunk_seq=op.chunk_seq,
            dxs=made.dxs if op.return_dxs else None,
            dh0=made.dh0,
            grads=made.grads if op.return_gradients else None,
            gradient_norm=norm,
            version=stored.version,
            replayed=counting.is_replayed,
            update=update,
        )

    async def update(self, tenant: str, op: Update) -> UpdateResult:
        """Make one optimizer step from waiting contributions."""
        request = self._head_request(tenant, op)
        answer = await self._publisher.advance(request, self._stepper(op, request))
        return _update_result(op.model_id, answer)

    async def discard(self, tenant: str, op: DiscardGradients) -> DiscardResult:
        """Drop waiting contributions, and the waiting tapes of the sessions named."""
        model = await self._model_cache.get(ModelKey(tenant, op.model_id), fresh=True)
        # What is not supported is to be met before anything is dropped.
        await asyncio.gather(
            *(self._sessions.list_tapes(SessionKey(tenant, one.session_id)) for one in op.selectors)
        )
        dropped = await self._models.discard_contributions(
            model.key, model.incarnation, self._names(tenant, op.selectors)
        )
        if dropped is None:
            raise model_not_found(op.model_id)
        tapes = 0
        with after_decision():
            for selector in op.selectors:
                tapes += await self._sessions.discard_tapes(
                    SessionKey(tenant, selector.session_id), selector.epoch, selector.chunk_seqs
                )
        return DiscardResult(dropped, tapes)

    async def list_waiting(self, key: SessionKey) -> Waiting:
        """List what waits of one session: tapes for a Backward, contributions for an Update.

        The tapes are read first: one whose gradient is counted in between then shows as a contribution, or
        has been consumed, and is never missed.
        """
        head, tapes = await self._sessions.list_tapes(key)
        if isinstance(head, AbsentSession):
            raise session_absent(key.session_id, head)
        prefix = self._models.contribution_prefix(key, 0)
        model = ModelKey(key.tenant, head.model_id)
        inputs = await self._models.read_update_inputs(model, b"", [prefix])
        if inputs is not None:
            spec_from_bytes(inputs.spec)  # one that is not known governs its contributions too
        if inputs is None or inputs.incarnation != head.incarnation:
            raise model_not_found(head.model_id)
        # A server that died after it had counted a gradient left the tape as one that waits.
        counted = await asyncio.gather(
            *(
                self._models.find_contribution(
                    model,
                    self._models.contribution_name(key, tape.epoch, tape.chunk_seq),
                )
                for tape in tapes
            )
        )
        by_epoch: dict[int, list[int]] = {}
        for entry in inputs.waiting:
            epoch, chunk_seq = self._models.contribution_place(entry[:_NAME_BYTES])
            by_epoch.setdefault(epoch, []).append(chunk_seq)
        return Waiting(
            tuple(tape for tape, state in zip(tapes, counted, strict=True) if state is None),
            tuple(Selector(key.session_id, epoch, tuple(seqs)) for epoch, seqs in by_epoch.items()),
        )

    # --- tapes ------------------------------------------------------------------------------------

    async def _find_tape(
        self, tenant: str, op: Backward, recent: StoredTape | None
    ) -> tuple[SessionHead, StoredTape, int]:
        """Return where the session stands, its tape, and when that expires (ms, the store's clock)."""
        tape = await self._sessions.read_tape(
            SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq, with_data=recent is None
        )
        head = tape.session
        if isinstance(head, AbsentSession):
            raise session_absent(op.session_id, head)
        if op.epoch > head.epoch or (op.epoch == head.epoch and op.chunk_seq > head.chunk_seq):
            raise _chunk_not_applied(op, head)
        if not tape.token or (op.epoch < head.epoch and not op.resent):
            await self._refuse_tape(tenant, op, head, tape)
        if tape.token != op.token:
            raise history_forked(op.chunk_seq)
        assert tape.data is not None  # noqa: S101 - there is one where there is a token
        check_tape(tape.data)
        return head, recent or tape_from_bytes(tape.data, head.dtype), tape.expires_ms

    async def _refuse_tape(
        self, tenant: str, op: Backward, head: SessionHead, tape: TapeSnapshot
    ) -> None:
        """Tell why there is no tape, unless the chunk is an old one that was counted already."""
        with suppress(NotFound):  # a model that is not supported governs its contributions
            await self._model_cache.get_incarnation(
                ModelKey(tenant, head.model_id), head.incarnation
            )
        name = self._models.contribution_name(
            SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq
        )
        counted = await self._models.find_contribution(ModelKey(tenant, head.model_id), name)
        if counted is None and not op.resent:
            check_epoch(op.epoch, head.epoch, head.chunk_seq)
        if not tape.token:
            raise _tape_missing(op, counted)

    async def _differentiate_early(
        self, op: Backward, recent: StoredTape | None
    ) -> tuple[ChunkGradients, bytes] | None:
        """Compute, from what is in hand, while the store is asked whether it may still be used."""
        if recent is None or not _fits(op, recent):
            return None
        params = self._model_cache.cached_params(recent.incarnation, recent.version)
        return None if params is None else await self._differentiate(op, recent, params)

    async def _differentiate(
        self, op: Backward, stored: StoredTape, params: Params
    ) -> tuple[ChunkGradients, bytes]:
        """Return the gradients, and the digest of what they were computed from."""
        return await asyncio.gather(
            self._scheduler.run(_work(stored), _differentiate, params, stored, op),
            self._scheduler.run(hash_work(op.dhs.nbytes), gradient_digest, op),  # meanwhile
        )

    async def _tape_params(
        self, tenant: str, op: Backward, model: KnownModel, stored: StoredTape
    ) -> Params:
        try:
            _, params = await self._model_cache.params(model, stored.version)
        except NotFound as error:
            number = stored.version.number
            name = self._models.contribution_name(
                SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq
            )
            counted = await self._models.find_contribution(model.key, name)
            text = f"{error.message}: the tape's version is not kept any more"
            raise FailedPrecondition(
                error.reason, text, version=number, **_counted_metadata(op, counted)
            ) from error
        return params

    def _check_backward(self, op: Backward, stored: StoredTape, model: KnownModel) -> None:
        dtype, (n, t, d), (_, h) = model.spec.dtype, stored.xs.shape, stored.h0.shape
        check_tensor("dhs", op.dhs, (n, t, h), dtype)
        if op.dh_next is not None:
            check_tensor("dh_next", op.dh_next, (n, h), dtype)
        size = stored.h0.nbytes + _ANSWER_OVERHEAD
        size += stored.xs.nbytes if op.return_dxs else 0
        size += (d * h + h * h + h) * stored.h0.itemsize if op.return_gradients else 0
        if size > self._limits.message_bytes:
            raise answer_too_large(size, self._limits.message_bytes)

    # --- contributions ------------------------------------------------------------------------------

    async def _count(
        self, tenant: str, op: Backward, model: KnownModel, counting: _Counting
    ) -> None:
        """Count a contribution, and note in the session's slot that its tape waits no more."""
        outcome = await self._models.record_contribution(model.key, counting.contribution)
        self._counted(op, model, counting, outcome)
        await self._mark_tape_consumed(tenant, op)

    async def _count_and_update(
        self, tenant: str, op: Backward, model: KnownModel, counting: _Counting
    ) -> UpdateResult:
        """Count a contribution and make the step that was asked for with it.

        A step from this contribution alone looks in the round trip that counts, and its tape is settled
        while it is made.
        """
        update = self._inline(op, model)
        request, entry = self._head_request(tenant, update), counting.contribution.entry
        is_own = request.model_key == model.key
        is_alone = is_own and request.selectors == [counting.contribution.name]
        if not is_alone or self._publisher.is_busy(request):
            await self._count(tenant, op, model, counting)
            return await self.update(tenant, update)
        settling: asyncio.Task[None] | None = None
        foreseen: tuple[Version, CandidateVersion] | None = None

        async def record_and_read(name: bytes) -> UpdateInputs | None:
            nonlocal settling, foreseen
            (outcome, inputs), foreseen = await asyncio.gather(
                self._models.record_and_read(
                    request.model_key, counting.contribution, name, request.selectors
                ),
                self._foresee(update, model, counting),
            )
            self._counted(op, model, counting, outcome)
            settling = asyncio.create_task(self._mark_tape_consumed(tenant, op))
            if inputs is None:
                return inputs
            if isinstance(inputs, UpdateInputs) and (inputs.remembered or entry in inputs.waiting):
                return inputs
            # It failed, or one of the two was sent again and the look came first.
            return await self._models.read_update_inputs(request.model_key, name, request.selectors)

        step = self._stepper(update, request)

        async def step_as_foreseen(
            now: KnownModel, inputs: UpdateInputs
        ) -> CandidateVersion | None:
            if foreseen and inputs.waiting == (entry,) and inputs.head == foreseen[0]:
                return foreseen[1]
            return await step(now, inputs)

        try:
            answer = await self._publisher.advance(request, step_as_foreseen, record_and_read)
        finally:
            if settling:
                await settling
        self._recent_grads.drop((model.incarnation, entry))
        return _update_result(update.model_id, answer)

    def _counted(
        self, op: Backward, model: KnownModel, counting: _Counting, outcome: RecordOutcome
    ) -> None:
        """Note that a contribution was counted, or refuse the Backward."""
        self._refuse_contribution(op, model, outcome)
        counting.is_replayed = outcome is not RecordOutcome.COUNTED
        counting.is_waiting = outcome is not RecordOutcome.CONSUMED
        if not counting.is_replayed:
            self._observer.contribution_recorded(
                gradient_bytes=counting.contribution.gradient.nbytes
            )
        self._recent_grads.put((model.incarnation, counting.contribution.entry), counting.grads)
        self._tapes.drop(op.token)  # what comes next finds its memory warm; a retry reads the store

    async def _mark_tape_consumed(self, tenant: str, op: Backward) -> None:
        # The contribution is counted whatever becomes of this; the tape then keeps its place for a
        # while, until it expires or the same Backward comes again.
        with suppress(*STORE_FAILURES, UnsupportedLayout):
            await self._sessions.mark_tape_consumed(
                SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq, op.token
            )

    def _refuse_contribution(self, op: Backward, model: KnownModel, outcome: RecordOutcome) -> None:
        if outcome is RecordOutcome.REUSED:
            text = (
                f"a gradient of chunk {op.chunk_seq} was counted with different content: "
                "another writer uses this session, or other data was sent for the same chunk"
            )
            raise AlreadyExists("SEQ_REUSED", text, chunk_seq=op.chunk_seq)
        if outcome is RecordOutcome.GONE:
            raise model_not_found(model.spec.model_id)
        if outcome is RecordOutcome.EXPIRED:
            raise _tape_missing(op, None)
        if outcome is RecordOutcome.QUOTA:
            limits = self._limits
            text = (
                f"the contributions that wait for an Update have reached {limits.contributions_per_model} "
                f"or {limits.contribution_bytes_per_model} bytes; send Update or DiscardGradients"
            )
            raise ResourceExhausted("TAPE_QUOTA", text, quota="contributions_per_model")
        if outcome is RecordOutcome.FULL:
            text = (
                "too many contributions were counted lately to remember one more; try again later"
            )
            raise ResourceExhausted(
                "TAPE_QUOTA", text, retry_after_s=30.0, quota="remembered_contributions_per_model"
            )

    def _names(self, tenant: str, selectors: tuple[Selector, ...]) -> list[bytes]:
        """Turn selectors into names, what names begin with, or nothing for all that wait."""
        names: list[bytes] = []
        for one in selectors:
            key, epoch = SessionKey(tenant, one.session_id), one.epoch
            if one.chunk_seqs:
                names += [self._models.contribution_name(key, epoch, seq) for seq in one.chunk_seqs]
            else:
                names.append(self._models.contribution_prefix(key, epoch))
        return names or [b""]

    # --- steps --------------------------------------------------------------------------------------

    def _inline(self, op: Backward, model: KnownModel) -> Update:
        assert op.update is not None  # noqa: S101 - asked for by the caller
        own = (Selector(op.session_id, op.epoch, (op.chunk_seq,)),)
        update = op.update
        return replace(
            update,
            model_id=update.model_id or model.spec.model_id,
            selectors=update.selectors or own,
        )

    def _head_request(self, tenant: str, op: Update) -> StepRequest:
        names = self._names(tenant, op.selectors)
        digest = update_digest(op)
        return StepRequest(ModelKey(tenant, op.model_id), op.request_id, digest, op.expected, names)

    def _stepper(self, op: Update, request: StepRequest) -> MakeCandidate:
        async def step(model: KnownModel, inputs: UpdateInputs) -> CandidateVersion | None:
            _check_names(request.selectors, inputs)
            return await self._step(op, model, inputs)

        return step

    async def _foresee(
        self, op: Update, model: KnownModel, counting: _Counting
    ) -> tuple[Version, CandidateVersion] | None:
        """Make the step that will be asked for unless the head went on; None when that is not in hand."""
        params = self._model_cache.cached_params(model.incarnation, model.head)
        moments = self._model_cache.cached_moments(model)
        if params is None or moments is None:
            return None
        waiting = {counting.contribution.entry: counting.grads}
        made = await self._run_step(op, model, params, moments, waiting)
        with suppress(DomainError):  # told when the step is asked for
            await self._scheduler.run(hash_work(params.Wh.nbytes), lambda: made.stored)
        return model.head, made

    async def _step(
        self, op: Update, model: KnownModel, inputs: UpdateInputs
    ) -> CandidateVersion | None:
        grads = await self._gradients(model, inputs.waiting)
        if grads is None:
            return None
        try:
            _, params = await self._model_cache.params(model, inputs.head)
        except UnsupportedLayout:
            raise
        except DomainError:  # the head went on meanwhile
            return None
        moments = await self._model_cache.kept_moments(model, inputs.head, params)
        if moments is None:  # a head has some, so it is superseded where they were looked for
            return None
        return await self._run_step(op, model, params, moments, grads)

    async def _run_step(
        self,
        op: Update,
        model: KnownModel,
        params: Params,
        moments: Moments,
        waiting: dict[bytes, Grads],
    ) -> CandidateVersion:
        work = 4 * len(waiting) * params.Wh.size
        return await self._scheduler.run(work, _make_step, op, model, params, moments, waiting)

    async def _gradients(
        self, model: KnownModel, waiting: tuple[bytes, ...]
    ) -> dict[bytes, Grads] | None:
        """Return the gradient of each contribution that waits, in their order; None when one went away."""
        known = {one: self._recent_grads.get((model.incarnation, one)) for one in waiting}
        missing = [one for one in waiting if known[one] is None]
        if missing:
            found = await self._models.read_gradients(model.key, missing, spec_bytes(model.spec))
            if found is None:
                return None
            for one, data in zip(missing, found, strict=True):
                known[one] = grads_from_bytes(model.spec, data)
        return {one: grads for one, grads in known.items() if grads is not None}


def _grads_bytes(grads: Grads) -> int:
    return sum(array.nbytes for array in grads.arrays) + 512


def _make_step(
    op: Update,
    model: KnownModel,
    params: Params,
    moments: Moments,
    waiting: dict[bytes, Grads],
) -> CandidateVersion:
    joined = sum_grads(list(waiting.values()))
    if op.reduction is Reduction.MEAN:
        joined = scale_grads(joined, 1.0 / len(waiting))
    joined, norm, clipped = clip_by_global_norm(joined, op.clip_norm)
    if not math.isfinite(norm):  # to clip it would make a step of nothing, or of NaN
        text = (
            f"the sum of the {len(waiting)} contributions is not finite; {UNCHANGED} and they "
            "still wait: take fewer of them, or discard them"
        )
        raise FailedPrecondition("NON_FINITE_RESULT", text, contributions=len(waiting))
    optimizer = model.spec.optimizer
    if op.learning_rate is not None:
        optimizer = replace(optimizer, lr=op.learning_rate)
    after, later = apply_update(optimizer, params, joined, moments)
    names = tuple(entry[:_NAME_BYTES] for entry in waiting)
    return CandidateVersion(after, later, names, norm, clipped)


def _check_names(names: Sequence[bytes], inputs: UpdateInputs) -> None:
    """Raise NO_GRADIENTS unless something waits, and each contribution that was named in full."""
    waiting = {entry[:_NAME_BYTES] for entry in inputs.waiting}
    exact = [name for name in names if len(name) == _NAME_BYTES]
    found = sum(name in waiting for name in exact) if exact else len(waiting)
    expected = len(exact) or 1
    if not waiting or found < expected:
        text = f"expected {'' if exact else 'at least '}{expected} waiting contributions, found {found}"
        raise FailedPrecondition("NO_GRADIENTS", text, found=found, expected=expected)


def _chunk_not_applied(op: Backward, head: SessionHead) -> Aborted:
    text = (
        f"chunk {op.chunk_seq} of epoch {op.epoch} was not applied; "
        f"the session is at chunk {head.chunk_seq} of epoch {head.epoch}"
    )
    return Aborted("SEQ_GAP", text, expected_seq=head.chunk_seq + 1, epoch=head.epoch)


def _tape_missing(op: Backward, counted: ContributionState | None) -> FailedPrecondition:
    if counted:
        text = f"the gradient of chunk {op.chunk_seq} was counted; its tape is not kept any more"
    else:
        text = (
            f"chunk {op.chunk_seq} has no tape: it ran in INFER mode, or its tape has expired, "
            "was discarded or pushed out"
        )
    return FailedPrecondition("TAPE_MISSING", text, **_counted_metadata(op, counted))


def _counted_metadata(op: Backward, counted: ContributionState | None) -> dict[str, Any]:
    """Say whether the gradient was counted, and whether it still waits: then an Update may take it."""
    found: dict[str, Any] = {"counted": counted is not None, "chunk_seq": op.chunk_seq}
    if counted is ContributionState.WAITING:
        found["recorded"] = True
    return found


def _finite_norm(made: ChunkGradients) -> float:
    norm = global_norm(made.grads)
    if not (math.isfinite(norm) and is_finite(made.dxs) and is_finite(made.dh0)):
        text = "the gradients are not finite; nothing was counted"
        raise FailedPrecondition("NON_FINITE_RESULT", text)
    return norm


def _fits(op: Backward, stored: StoredTape) -> bool:
    """Tell whether a Backward's gradients are of its tape's shape and type."""
    (n, t, _), (_, h), dtype = stored.xs.shape, stored.h0.shape, stored.xs.dtype
    fits = op.dhs.shape == (n, t, h) and op.dhs.dtype == dtype
    arriving = op.dh_next
    return fits and (arriving is None or (arriving.shape == (n, h) and arriving.dtype == dtype))


def _differentiate(params: Params, stored: StoredTape, op: Backward) -> ChunkGradients:
    return rnn_backward(params, stored.complete(params), op.dhs, op.dh_next)


def _work(stored: StoredTape) -> int:
    """Return the multiply-adds of a Backward: twice those of its Forward."""
    n, t, d = stored.xs.shape
    h = stored.h0.shape[1]
    return int(2 * n * t * h * (d + h))


def _update_result(model_id: str, answer: StepAnswer) -> UpdateResult:
    return UpdateResult(
        model_id,
        answer.version,
        answer.gradient_norm,
        answer.clipped,
        answer.contribution_count,
        answer.replayed,
    )
