"""Applies chunks: exactly once, in order, by whichever replica.

A chunk takes three steps: find the state that it continues (cached, else read), compute, commit. The
commit is a compare-and-swap: it compares the token of the state that was computed from. If the session
has another by now, it is read again, and the rules below decide from what was read. A chunk that was
applied before is replayed: computed again from the state before it, with the weights of the first time.

The chunks of one session run one after another in the order in which they were submitted: each session
that is busy has a first-in-first-out queue. A caller's cancellation does not reach a chunk that runs, so
a commit that was begun is carried to its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from service.compute.scheduler import Chunk, hash_work
from service.domain.commits import Committer
from service.domain.digests import chunk_digest, next_token
from service.domain.errors import (
    FailedPrecondition,
    NotFound,
    UnsupportedLayout,
    bad_tensor,
)
from service.domain.finite import is_finite
from service.domain.model_cache import is_at_least
from service.domain.ports import (
    AbsentSession,
    ChunkCommit,
    ChunkOutcome,
    StoredState,
)
from service.domain.refusals import (
    STORE_FAILURES,
    answer_too_large,
    cancelled_midway,
    check_epoch,
    check_state,
    check_tensor,
    contended,
    history_forked,
    replay_window_passed,
    seq_gap,
    seq_reused,
    session_absent,
    tape_quota,
    tenant_tape_quota,
)
from service.domain.retries import CHUNK_TRIES
from service.domain.session_cache import cached_from_snapshot, state_from_bytes
from service.domain.tapes import StoredTape, tape_to_bytes
from service.domain.types import ForwardResult, ModelKey, ReturnHs, SessionKey
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from rnn_engine import Array, Network, Step
    from service.compute.scheduler import Scheduler
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.model_cache import KnownModel, LoadedWeights, ModelCache
    from service.domain.ports import (
        SessionSnapshot,
        SessionStore,
    )
    from service.domain.rules import InputRules
    from service.domain.session_cache import CachedSession, SessionCache
    from service.domain.tapes import TapeCache
    from service.domain.types import Forward, ModelSpec, Version
    from service.telemetry import Observer

    OnDone = Callable[[ForwardResult | Exception], None]

_RESPONSE_OVERHEAD = 1024  # bytes of an answer beside its tensors, at most
_BIG_CHUNK_BYTES = 1 << 20  # hashed in a thread


@dataclass(slots=True, eq=False)
class _PendingChunk:
    """A chunk from its arrival until its answer.

    Attributes:
        key: Its session.
        op: What was asked for.
        on_done: Called once with the answer; None afterwards.
        digest: The digest of its content.
        base: The state that it is computed from.
        version: The weights that it is computed with.
        token: The state token after it.
        step: What was computed.
        state: The state after it, (N, state size).
        tries: How often the session was read again because its commit failed.
        context: In which it arrived.
    """

    key: SessionKey
    op: Forward
    on_done: OnDone | None
    digest: bytes = b""
    base: CachedSession | None = None
    version: Version | None = None
    token: bytes = b""
    step: Step | None = None
    state: Array | None = None
    tries: int = 0
    context: Context = field(default_factory=copy_context)


class Recurrence:
    """The Forward operation."""

    def __init__(
        self,
        store: SessionStore,
        *,
        model_cache: ModelCache,
        session_cache: SessionCache,
        tapes: TapeCache,
        scheduler: Scheduler,
        rules: InputRules,
        policy: LimitsPolicy,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Keep the parts that a chunk passes through."""
        self._store = store
        self._model_cache = model_cache
        self._session_cache = session_cache
        self._tapes = tapes
        self._scheduler = scheduler
        self._rules = rules
        self._policy = policy
        self._observer = observer
        self._committer = Committer(store)
        # Of each session with a chunk that runs: the chunks that wait behind it, first in first out.
        # None while none waits, which is most of the time and then needs no deque.
        self._queues: dict[SessionKey, deque[_PendingChunk] | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()

    async def forward(self, tenant: str, op: Forward) -> ForwardResult:
        """Apply one chunk, or run one without a session.

        Raises:
            DomainError: As the table of errors says.
        """
        answer: asyncio.Future[ForwardResult] = asyncio.get_running_loop().create_future()
        self.begin_forward(tenant, op, callback_of(answer))
        return await answer

    def begin_forward(self, tenant: str, op: Forward, on_done: OnDone) -> None:
        """Queue a chunk behind those of its session that were submitted before.

        Args:
            tenant: The caller's tenant.
            op: The chunk.
            on_done: Called on the event loop, once, with the result or the error; not if this raises.

        Raises:
            InvalidArgument: If the request can never be right.
        """
        self._rules.check_forward(op)
        pending = _PendingChunk(SessionKey(tenant, op.session_id), op, on_done)
        if not op.session_id:
            self._spawn(pending, self._run_stateless(pending))
            return
        queues = self._queues
        if pending.key not in queues:
            queues[pending.key] = None
            self._start(pending)
            return
        queue = queues[pending.key]
        if queue is None:
            queues[pending.key] = deque((pending,))
        else:
            queue.append(pending)

    def sizes(self, key: SessionKey, model_id: str) -> tuple[int, int]:
        """Return D and H of the model that a request would run; their limits if it is not cached."""
        cached = self._session_cache.peek(key) if key.session_id else None
        spec = self._model_cache.spec(
            ModelKey(key.tenant, model_id) if cached is None else cached.model_key
        )
        if spec is None:
            return self._rules.limits.input_size, self._rules.limits.hidden_size
        return spec.network.input.size, spec.network.output_size

    async def drain(self) -> None:
        """Wait until every chunk submitted has its answer."""
        while self._queues or self._tasks:
            self._idle.clear()
            await self._idle.wait()
        await self._committer.drain()

    # --- the way of a chunk -------------------------------------------------------------------

    def _start(self, pending: _PendingChunk) -> None:
        """Compute at once if all that is needed is cached; else read what is missing first."""
        cached = self._session_cache.get(pending.key)
        if cached is None or not _is_next(pending.op, cached):
            self._spawn(pending, self._fetch(pending))
            return
        model = self._model_cache.get_cached(cached.model_key)
        if model is not None:
            self._start_from(pending, cached, model)
            return
        # On a busy replica many chunks wait for one read: a callback for each is cheaper than a task.
        reading = self._model_cache.start_reading(cached.model_key)
        reading.add_done_callback(lambda done: self._start_from(pending, cached, _result_of(done)))

    def _start_from(
        self, pending: _PendingChunk, cached: CachedSession, model: KnownModel | None
    ) -> None:
        try:
            is_started = model is not None and self._start_cached(pending, cached, model)
        except Exception as error:  # noqa: BLE001 - it becomes the answer
            # Not called from here: the next chunk of the queue may fail as well, and so on, each a
            # call deeper.
            asyncio.get_running_loop().call_soon(self._end, pending, error)
            return
        if not is_started:
            self._spawn(pending, self._continue(pending, cached))

    def _start_cached(
        self, pending: _PendingChunk, cached: CachedSession, model: KnownModel
    ) -> bool:
        op = pending.op
        if model.incarnation != cached.incarnation or op.pinned is not None:
            return False
        weights = self._model_cache.cached_weights(model.incarnation, model.head)
        if weights is None or op.xs.nbytes > _BIG_CHUNK_BYTES:
            return False
        if op.minimum is not None and not is_at_least(model.head, op.minimum):
            return False
        self._check_chunk(op, model.spec, cached.state.shape[0])
        pending.digest = chunk_digest(op.xs, train=op.train)
        self._compute(pending, cached, (model.head, weights))
        return True

    async def _continue(self, pending: _PendingChunk, cached: CachedSession) -> None:
        """Continue a cached state with weights that are not cached, or hash a big chunk in a thread."""
        op = pending.op
        try:
            model = await self._model_cache.get_incarnation(cached.model_key, cached.incarnation)
            weights = await self._choose_weights(op, model)
        except (NotFound, FailedPrecondition):
            # The cached state may be old. Whether the session still exists, and whether another replica
            # has applied this chunk, is decided before what became of the weights.
            await self._fetch(pending)
            return
        self._check_chunk(op, model.spec, cached.state.shape[0])
        pending.digest = await self._scheduler.run(hash_work(op.xs.nbytes), _digest, op)
        self._compute(pending, cached, weights)

    async def _fetch(self, pending: _PendingChunk) -> None:
        """Read the session and decide: continue, replay, or refuse."""
        op, key = pending.op, pending.key
        snapshot = await self._store.read_session(key, op.chunk_seq)
        if isinstance(snapshot, AbsentSession):
            self._session_cache.drop(pending.key)
            raise session_absent(key.session_id, snapshot)
        check_epoch(op.epoch, snapshot.head.epoch, snapshot.head.chunk_seq)
        model = await self._model_cache.get_incarnation(
            ModelKey(key.tenant, snapshot.head.model_id), snapshot.head.incarnation
        )
        self._check_chunk(op, model.spec, snapshot.head.batch_size)
        pending.digest = await self._scheduler.run(hash_work(op.xs.nbytes), _digest, op)
        cached = cached_from_snapshot(key.tenant, snapshot)
        self._session_cache.put(pending.key, cached)
        if op.chunk_seq <= cached.chunk_seq:
            result = await self._replay(pending, snapshot, model)
            await self._extend(key, cached)
            self._observer.chunk_replayed()
            self._end(pending, result)
            return
        if op.chunk_seq > cached.chunk_seq + 1:
            raise seq_gap(cached.chunk_seq, cached.epoch)
        if op.previous_token not in (b"", cached.token):
            raise history_forked(op.chunk_seq - 1)
        weights = await self._choose_weights(op, model)
        self._compute(pending, cached, weights)

    async def _choose_weights(
        self, op: Forward, model: KnownModel
    ) -> tuple[Version, LoadedWeights]:
        if op.pinned is not None:
            return await self._model_cache.weights(model, op.pinned)
        if op.minimum is not None:
            model = await self._model_cache.head_at_least(model, op.minimum)
        try:
            return await self._model_cache.weights(model, model.head)
        except (NotFound, FailedPrecondition):
            # The head was superseded meanwhile, or the store lost it and it was made anew.
            model = await self._model_cache.renew(model)
            if op.minimum is not None:
                model = await self._model_cache.head_at_least(model, op.minimum)
            return await self._model_cache.weights(model, model.head)

    def _compute(
        self, pending: _PendingChunk, base: CachedSession, weights: tuple[Version, LoadedWeights]
    ) -> None:
        pending.base, (pending.version, loaded) = base, weights
        pending.token = next_token(base.token, pending.digest, pending.version)
        self._scheduler.submit(
            Chunk(
                loaded.network,
                loaded.prepared,
                pending.op.xs,
                loaded.network.state_spec.split_rows(base.state),
                alone=pending.op.train,
                deliver=partial(self._commit, pending),
            )
        )

    def _commit(self, pending: _PendingChunk, computed: Chunk) -> None:
        if computed.step is None or pending.base is None or pending.version is None:
            self._end(pending, computed.error or RuntimeError("a chunk was not computed"))
            return
        pending.step = computed.step
        pending.state = computed.network.state_spec.join_rows(computed.step.state)
        try:
            check_state(pending.state)
        except FailedPrecondition as error:
            self._end(pending, error)
            return
        op, key = pending.op, pending.key
        state = StoredState(
            op.chunk_seq, pending.digest, pending.token, pending.version, pending.state.tobytes()
        )
        commit = ChunkCommit(
            key,
            op.epoch,
            pending.base.token,
            state,
            min(op.acknowledged_seq, op.chunk_seq - 1),
            tape_to_bytes(pending.version, op.xs, pending.base.state) if op.train else None,
            pending.base.ttl_ms,
        )
        self._committer.submit(commit, partial(self._committed, pending))

    def _committed(self, pending: _PendingChunk, outcome: ChunkOutcome | Exception) -> None:
        if outcome is ChunkOutcome.OK or outcome is ChunkOutcome.TOUCH:
            self._applied(pending, is_touch_due=outcome is ChunkOutcome.TOUCH)
            return
        self._session_cache.drop(pending.key)
        if outcome is ChunkOutcome.QUOTA:
            self._end(pending, tape_quota(self._policy.of(pending.key.tenant).tapes_per_session))
        elif outcome is ChunkOutcome.TENANT_QUOTA:
            most = self._policy.of(pending.key.tenant).tape_bytes_per_tenant
            self._end(pending, tenant_tape_quota(most))
        elif isinstance(outcome, Exception):
            self._end(pending, outcome)
        elif pending.tries + 1 < CHUNK_TRIES:
            pending.tries += 1
            self._spawn(pending, self._fetch(pending))
        else:
            self._end(pending, contended())

    def _applied(self, pending: _PendingChunk, *, is_touch_due: bool) -> None:
        base, op = pending.base, pending.op
        assert base is not None and pending.state is not None and pending.step is not None  # noqa: S101, PT018
        assert pending.version is not None  # noqa: S101
        tape_bytes = 0
        if op.train:
            tape = StoredTape(
                pending.version, op.xs, base.state, pending.step.tape, base.incarnation
            )
            self._tapes.put(pending.token, tape)
            tape_bytes = op.xs.nbytes + base.state.nbytes
        base.advance(op.chunk_seq, pending.token, pending.state)
        self._observer.chunk_applied(tape_bytes=tape_bytes)
        if is_touch_due or not base.is_listed:
            self._touch(pending.key, base)
        result = self._result(
            op,
            pending.step.outputs,
            pending.state,
            version=pending.version,
            token=pending.token,
            replayed=False,
        )
        self._end(pending, result)

    # --- a chunk that was applied before ----------------------------------------------------------

    async def _replay(
        self, pending: _PendingChunk, snapshot: SessionSnapshot, model: KnownModel
    ) -> ForwardResult:
        """Return the answer again: the state as committed, the outputs computed again from the state before."""
        op = pending.op
        at = _applied_state(pending, snapshot)
        state = state_from_bytes(at.state, snapshot.head.dtype, snapshot.head.batch_size)
        outputs = last = _last_output(model.spec.network, state)
        if op.return_hs is ReturnHs.ALL:
            outputs = await self._recompute(op, snapshot, model)
            outputs[:, -1:] = last
        return self._result(op, outputs, state, version=at.version, token=at.token, replayed=True)

    async def _recompute(self, op: Forward, snapshot: SessionSnapshot, model: KnownModel) -> Array:
        """Compute the outputs of an applied chunk again, (N, T, output size)."""
        too_late = replay_window_passed(op.chunk_seq, snapshot.last.chunk_seq)
        at, before = snapshot.at, snapshot.before
        if at is None or before is None:
            raise too_late
        state = state_from_bytes(before.state, snapshot.head.dtype, snapshot.head.batch_size)
        try:
            _, weights = await self._model_cache.weights(model, at.version)
            outputs = np.array((await self._run_alone(weights, op.xs, state)).outputs)
        except UnsupportedLayout:
            raise
        except (NotFound, FailedPrecondition) as error:
            raise too_late from error
        # Computed alone the products are summed in another order than in the batch of the first time,
        # and may overflow where they did not.
        if not is_finite(outputs[:, -1]):
            raise too_late
        return outputs

    async def _run_alone(self, weights: LoadedWeights, inputs: Array, state: Array) -> Step:
        computed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        chunk = Chunk(
            weights.network,
            weights.prepared,
            inputs,
            weights.network.state_spec.split_rows(state),
            alone=True,
            # With the chunk as its result the future would be in a cycle, which keeps the arrays.
            deliver=lambda _: computed.set_result(None),
        )
        self._scheduler.submit(chunk)
        await computed
        if chunk.step is None:
            raise chunk.error or RuntimeError("a chunk was not computed")
        return chunk.step

    async def _extend(self, key: SessionKey, cached: CachedSession) -> None:
        # A replay is answered also where the store takes no writes at all.
        with suppress(*STORE_FAILURES):
            if await self._store.extend_session(key, cached.epoch) is ChunkOutcome.TOUCH:
                self._touch(key, cached)

    # --- without a session --------------------------------------------------------------------------

    async def _run_stateless(self, pending: _PendingChunk) -> None:
        op = pending.op
        model = await self._model_cache.get(ModelKey(pending.key.tenant, op.model_id))
        n, network = op.xs.shape[0], model.spec.network
        self._check_chunk(op, model.spec, n)
        shape, dtype = (n, network.state_spec.size), model.spec.dtype
        state = np.zeros(shape, dtype) if op.state is None else op.state
        check_tensor("h0", state, shape, dtype)
        version, weights = await self._choose_weights(op, model)
        step = await self._run_alone(weights, op.xs, state)
        last = network.state_spec.join_rows(step.state)
        check_state(last)
        self._end(
            pending,
            self._result(op, step.outputs, last, version=version, token=b"", replayed=False),
        )

    # --- common -------------------------------------------------------------------------------------

    def _result(
        self,
        op: Forward,
        outputs: Array,
        state: Array,
        *,
        version: Version,
        token: bytes,
        replayed: bool,
    ) -> ForwardResult:
        shown = outputs if op.return_hs is ReturnHs.ALL else None
        if op.return_hs is ReturnHs.LAST:
            shown = outputs[:, -1:]
        return ForwardResult(
            op.session_id, op.epoch, op.chunk_seq, shown, state, version, token, replayed
        )

    def _check_chunk(self, op: Forward, spec: ModelSpec, batch_size: int) -> None:
        n, t, d = op.xs.shape
        if op.xs.dtype != spec.dtype:
            raise bad_tensor("xs.dtype", f"expected {spec.dtype}, got {op.xs.dtype}")
        if d != spec.network.input.size:
            raise bad_tensor("xs.shape[2]", f"expected D={spec.network.input.size}, got {d}")
        if n != batch_size:
            raise bad_tensor("xs.shape[0]", f"expected N={batch_size}, got {n}")
        if t < 1:
            raise bad_tensor("xs.shape[1]", f"expected T >= 1, got {t}")
        # All outputs count, whatever of them is returned: they are computed, and a Backward sends as
        # much. A few inputs a row could otherwise ask for gigabytes.
        numbers = n * (t * spec.network.output_size + spec.network.state_spec.size)
        size = numbers * op.xs.itemsize + _RESPONSE_OVERHEAD
        if size > self._rules.limits.message_bytes:
            raise answer_too_large(size, self._rules.limits.message_bytes)

    def _touch(self, key: SessionKey, cached: CachedSession) -> None:
        async def touch() -> None:
            try:
                await self._store.touch_session(key, cached.ttl_ms)
            except STORE_FAILURES:
                cached.is_listed = False  # the next chunk tries again
            else:
                cached.is_listed = True

        task = asyncio.get_running_loop().create_task(touch())
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _spawn(self, pending: _PendingChunk, steps: Coroutine[None, None, None]) -> None:
        async def run() -> None:
            try:
                await steps
            except Exception as error:  # noqa: BLE001 - it becomes the answer
                self._end(pending, error)
            except asyncio.CancelledError:  # the session must not stay blocked, whoever cancelled
                self._end(pending, cancelled_midway())
                raise

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._idle.set()

    def _end(self, pending: _PendingChunk, outcome: ForwardResult | Exception) -> None:
        """Give the answer, once, and let the session's next chunk start."""
        on_done, pending.on_done = pending.on_done, None
        if on_done is not None:
            try:
                on_done(outcome)
            except Exception as error:  # noqa: BLE001 - the session and its batch must go on
                context = {"message": "the callback of a chunk failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        queues = self._queues
        if pending.key not in queues:
            return
        queue = queues[pending.key]
        if queue:
            following = queue.popleft()
            following.context.run(self._start, following)
        else:
            del queues[pending.key]
            self._idle.set()


def callback_of(answer: asyncio.Future[ForwardResult]) -> OnDone:
    """Return a callback that sets a future's result or exception, unless it was cancelled."""

    def on_done(outcome: ForwardResult | Exception) -> None:
        if answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    return on_done


def _result_of(reading: asyncio.Task[KnownModel]) -> KnownModel | None:
    """Return what was read; None if it failed: then it is read again where errors become answers."""
    return None if reading.cancelled() or reading.exception() else reading.result()


def _last_output(network: Network, state: Array) -> Array:
    """Return the output of the step that left a state, (N, 1, output size)."""
    return network.last_output(network.state_spec.split_rows(state))[:, None]


def _applied_state(pending: _PendingChunk, snapshot: SessionSnapshot) -> StoredState:
    """Return the state after a chunk that was applied before, if it was this very chunk."""
    op, at = pending.op, snapshot.at
    if at is None:
        raise replay_window_passed(op.chunk_seq, snapshot.last.chunk_seq)
    if at.digest != pending.digest:
        raise seq_reused(op.chunk_seq)
    if op.previous_token and next_token(op.previous_token, at.digest, at.version) != at.token:
        raise history_forked(op.chunk_seq - 1)
    if op.pinned is not None and not op.pinned.names(at.version):
        raise history_forked(op.chunk_seq)
    return at


def _is_next(op: Forward, cached: CachedSession) -> bool:
    """Return whether a chunk continues a cached state."""
    return (
        cached.epoch == op.epoch
        and cached.chunk_seq + 1 == op.chunk_seq
        and op.previous_token in (b"", cached.token)
    )


def _digest(op: Forward) -> bytes:
    return chunk_digest(op.xs, train=op.train)
