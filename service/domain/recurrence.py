"""Applies chunks: exactly once, in order, by whichever replica.

The way of a chunk: find the state it continues (in hand, else read), compute, commit. The commit
compares the token of the state that was computed from; when it does not match, the session is read
again and the rules below decide from what is there. A chunk that had been applied before is computed
again from the state before it with the weights it used the first time.

One session's chunks run one after another in the order they were submitted. Nobody's cancellation
reaches a chunk once it runs: a commit that was begun is carried to its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.compute.scheduler import Chunk, hash_work
from service.domain.commits import Committer
from service.domain.digests import chunk_digest, next_token
from service.domain.errors import (
    FailedPrecondition,
    NotFound,
    UnsupportedLayout,
    bad_field,
    bad_tensor,
    quoted,
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
)
from service.domain.session_cache import cached_from_snapshot, state_from_bytes
from service.domain.tapes import StoredTape, tape_to_bytes
from service.domain.types import ForwardResult, ModelKey, ReturnHs, SessionKey
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from rnn_engine import Array, Params, Tape
    from service.compute.scheduler import Scheduler
    from service.domain.model_cache import KnownModel, ModelCache
    from service.domain.ports import (
        SessionSnapshot,
        SessionStore,
    )
    from service.domain.session_cache import CachedSession, SessionCache
    from service.domain.tapes import TapeCache
    from service.domain.types import Forward, ModelSpec, Version
    from service.settings import Limits
    from service.telemetry import Observer

    Told = Callable[[ForwardResult | Exception], None]

MAX_TRIES = 5
_RESPONSE_OVERHEAD = 1024  # bytes of an answer beside its tensors, at most
_BIG_CHUNK_BYTES = 1 << 20  # hashed in a thread


@dataclass(slots=True, eq=False)
class _Call:
    """A chunk on its way."""

    key: SessionKey
    op: Forward
    told: Told | None  # None once it was
    digest: bytes = b""
    base: CachedSession | None = None
    version: Version | None = None
    token: bytes = b""
    tape: Tape | None = None
    h: Array | None = None
    tries: int = 0


class Recurrence:
    """The Forward operation."""

    def __init__(
        self,
        store: SessionStore,
        model_cache: ModelCache,
        session_cache: SessionCache,
        tapes: TapeCache,
        scheduler: Scheduler,
        limits: Limits,
        *,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Keep the parts that a chunk passes through."""
        self._store = store
        self._model_cache = model_cache
        self._session_cache = session_cache
        self._tapes = tapes
        self._scheduler = scheduler
        self._limits = limits
        self._observer = observer
        self._committer = Committer(store)
        self._lanes: dict[SessionKey, deque[_Call] | None] = {}  # in work; behind it, what waits
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()

    async def forward(self, tenant: str, op: Forward) -> ForwardResult:
        """Apply one chunk, or run one without a session.

        Raises:
            DomainError: As the table of errors says.
        """
        answer: asyncio.Future[ForwardResult] = asyncio.get_running_loop().create_future()
        self.begin_forward(tenant, op, teller_of(answer))
        return await answer

    def begin_forward(self, tenant: str, op: Forward, told: Told) -> None:
        """Begin to apply a chunk, in the order of its session; `told` is called with what came of it."""
        call = _Call(SessionKey(tenant, op.session_id), op, told)
        if not op.session_id:
            self._spawn(call, self._run_stateless(call))
            return
        lanes = self._lanes
        if call.key not in lanes:
            lanes[call.key] = None
            self._start(call)
            return
        lane = lanes[call.key]
        if lane is None:
            lanes[call.key] = deque((call,))
        else:
            lane.append(call)

    def sizes(self, key: SessionKey, model_id: str) -> tuple[int, int]:
        """Return D and H of what a request would run; the limits where that is not in hand."""
        live = self._session_cache.get(key) if key.session_id else None
        spec = self._model_cache.spec(
            ModelKey(key.tenant, model_id) if live is None else live.model_key
        )
        if spec is None:
            return self._limits.input_size, self._limits.hidden_size
        return spec.input_size, spec.hidden_size

    async def drain(self) -> None:
        """Wait until every chunk submitted has its answer."""
        while self._lanes or self._tasks:
            self._idle.clear()
            await self._idle.wait()
        await self._committer.drain()

    # --- the way of a chunk -------------------------------------------------------------------

    def _start(self, call: _Call) -> None:
        """Compute at once when all that is needed is in hand; else fetch what is missing first."""
        live = self._session_cache.get(call.key)
        if live is None or not _is_next(call.op, live):
            self._spawn(call, self._fetch(call))
            return
        model = self._model_cache.get_cached(live.model_key)
        if model is not None:
            self._start_from(call, live, model)
            return
        # A busy replica has many chunks waiting for one read: a callback each, not a task.
        reading = self._model_cache.start_reading(live.model_key)
        reading.add_done_callback(lambda done: self._start_from(call, live, _result_of(done)))

    def _start_from(self, call: _Call, live: CachedSession, model: KnownModel | None) -> None:
        try:
            is_started = model is not None and self._start_in_hand(call, live, model)
        except Exception as error:  # noqa: BLE001 - it becomes the answer
            # Not here: the next chunk of the lane may fail as well, and so on, each a call deeper.
            asyncio.get_running_loop().call_soon(self._end, call, error)
            return
        if not is_started:
            self._spawn(call, self._continue(call, live))

    def _start_in_hand(self, call: _Call, live: CachedSession, model: KnownModel) -> bool:
        op = call.op
        if model.incarnation != live.incarnation or op.pinned is not None:
            return False
        params = self._model_cache.cached_params(model.incarnation, model.head)
        if params is None or op.xs.nbytes > _BIG_CHUNK_BYTES:
            return False
        if op.minimum is not None and not is_at_least(model.head, op.minimum):
            return False
        self._check_chunk(op, model.spec, live.h.shape[0])
        call.digest = chunk_digest(op.xs, train=op.train)
        self._compute(call, live, model.head, params)
        return True

    async def _continue(self, call: _Call, live: CachedSession) -> None:
        """Continue a state in hand with weights that are not, or hash a big chunk in a thread."""
        op = call.op
        try:
            model = await self._model_cache.get_incarnation(live.model_key, live.incarnation)
            version, params = await self._choose_weights(op, model)
        except (NotFound, FailedPrecondition):
            # The state in hand may be old: whether the session still is there, and whether this chunk
            # was applied by another replica, comes before what became of the weights.
            await self._fetch(call)
            return
        self._check_chunk(op, model.spec, live.h.shape[0])
        call.digest = await self._scheduler.run(hash_work(op.xs.nbytes), _digest, op)
        self._compute(call, live, version, params)

    async def _fetch(self, call: _Call) -> None:
        """Read the session and decide: continue, replay, or refuse."""
        op, key = call.op, call.key
        snapshot = await self._store.read_session(key, op.chunk_seq)
        if isinstance(snapshot, AbsentSession):
            self._session_cache.drop(call.key)
            raise session_absent(key.session_id, snapshot)
        check_epoch(op.epoch, snapshot.head.epoch, snapshot.head.chunk_seq)
        model = await self._model_cache.get_incarnation(
            ModelKey(key.tenant, snapshot.head.model_id), snapshot.head.incarnation
        )
        if op.model_id and op.model_id != model.spec.model_id:
            raise bad_field("model_id", f"the session runs {quoted(model.spec.model_id)}")
        self._check_chunk(op, model.spec, snapshot.head.batch_size)
        call.digest = await self._scheduler.run(hash_work(op.xs.nbytes), _digest, op)
        live = cached_from_snapshot(key.tenant, snapshot)
        self._session_cache.put(call.key, live)
        if op.chunk_seq <= live.chunk_seq:
            await self._replay(call, snapshot, live, model)
            return
        if op.chunk_seq > live.chunk_seq + 1:
            raise seq_gap(live.chunk_seq, live.epoch)
        if op.previous_token not in (b"", live.token):
            raise history_forked(op.chunk_seq - 1)
        version, params = await self._choose_weights(op, model)
        self._compute(call, live, version, params)

    async def _choose_weights(self, op: Forward, model: KnownModel) -> tuple[Version, Params]:
        if op.pinned is not None:
            return await self._model_cache.params(model, op.pinned)
        if op.minimum is not None:
            model = await self._model_cache.head_at_least(model, op.minimum)
        try:
            return await self._model_cache.params(model, model.head)
        except (
            NotFound,
            FailedPrecondition,
        ):  # the head went on, or came back otherwise, meanwhile
            model = await self._model_cache.renew(model)
            if op.minimum is not None:
                model = await self._model_cache.head_at_least(model, op.minimum)
            return await self._model_cache.params(model, model.head)

    def _compute(self, call: _Call, base: CachedSession, version: Version, params: Params) -> None:
        call.base, call.version = base, version
        call.token = next_token(base.token, call.digest, version)
        self._scheduler.submit(
            Chunk(params, call.op.xs, base.h, call.op.train, lambda done: self._commit(call, done))
        )

    def _commit(self, call: _Call, done: Chunk) -> None:
        if done.tape is None or call.base is None or call.version is None:
            self._end(call, done.error or RuntimeError("a chunk was not computed"))
            return
        call.tape = done.tape
        call.h = done.tape.hs[:, -1].copy()  # a view would keep all of hs while h is in hand
        try:
            check_state(call.h)
        except FailedPrecondition as error:
            self._end(call, error)
            return
        op, key = call.op, call.key
        state = StoredState(op.chunk_seq, call.digest, call.token, call.version, call.h.tobytes())
        commit = ChunkCommit(
            key,
            op.epoch,
            call.base.token,
            state,
            min(op.acknowledged_seq, op.chunk_seq - 1),
            tape_to_bytes(call.version, done.tape.xs, done.tape.h0) if op.train else None,
        )
        self._committer.submit(commit, lambda outcome: self._committed(call, outcome))

    def _committed(self, call: _Call, outcome: ChunkOutcome | Exception) -> None:
        if outcome is ChunkOutcome.OK or outcome is ChunkOutcome.TOUCH:
            self._applied(call, is_touch_due=outcome is ChunkOutcome.TOUCH)
            return
        self._session_cache.drop(call.key)
        if outcome is ChunkOutcome.QUOTA:
            self._end(call, tape_quota(self._limits.tapes_per_session))
        elif isinstance(outcome, Exception):
            self._end(call, outcome)
        elif call.tries < MAX_TRIES:
            call.tries += 1
            self._spawn(call, self._fetch(call))
        else:
            self._end(call, contended())

    def _applied(self, call: _Call, *, is_touch_due: bool) -> None:
        base, op = call.base, call.op
        assert base is not None and call.h is not None and call.tape is not None  # noqa: S101, PT018
        assert call.version is not None  # noqa: S101
        base.advance(op.chunk_seq, call.token, call.h)
        tape_bytes = 0
        if op.train:
            xs, h0, hs = call.tape.xs, call.tape.h0, call.tape.hs
            self._tapes.put(call.token, StoredTape(call.version, xs, h0, hs, base.incarnation))
            tape_bytes = xs.nbytes + h0.nbytes
        self._observer.chunk_applied(tape_bytes=tape_bytes)
        if is_touch_due or not base.is_listed:
            self._touch(call.key, base)
        result = self._result(op, call.tape.hs, call.h, call.version, call.token, replayed=False)
        self._end(call, result)

    # --- a chunk that was applied before ----------------------------------------------------------

    async def _replay(
        self, call: _Call, snapshot: SessionSnapshot, live: CachedSession, model: KnownModel
    ) -> None:
        """Answer again: h as committed, hs computed again from the state before."""
        op, at, before = call.op, snapshot.at, snapshot.before
        if at is None:
            raise replay_window_passed(op.chunk_seq, snapshot.last.chunk_seq)
        if at.digest != call.digest:
            raise seq_reused(op.chunk_seq)
        if op.previous_token and next_token(op.previous_token, at.digest, at.version) != at.token:
            raise history_forked(op.chunk_seq - 1)
        if op.pinned is not None and not op.pinned.names(at.version):
            raise history_forked(op.chunk_seq)
        h = state_from_bytes(at.h, snapshot.head.dtype, snapshot.head.batch_size)
        hs: Array | None = None
        if op.return_hs is ReturnHs.ALL:
            if before is None:
                raise replay_window_passed(op.chunk_seq, snapshot.last.chunk_seq)
            h0 = state_from_bytes(before.h, snapshot.head.dtype, snapshot.head.batch_size)
            try:
                hs = await self._recompute(op, model, at.version, h0)
            except UnsupportedLayout:
                raise
            except (NotFound, FailedPrecondition) as error:
                raise replay_window_passed(op.chunk_seq, snapshot.last.chunk_seq) from error
            if not is_finite(
                hs[:, -1]
            ):  # sums of another batch's shape may overflow where its did not
                raise replay_window_passed(op.chunk_seq, snapshot.last.chunk_seq)
            hs[:, -1] = h
        await self._extend(call.key, live)
        shown = h[:, None] if hs is None else hs
        self._observer.chunk_replayed()
        self._end(call, self._result(op, shown, h, at.version, at.token, replayed=True))

    async def _recompute(
        self, op: Forward, model: KnownModel, version: Version, h0: Array
    ) -> Array:
        _, params = await self._model_cache.params(model, version)
        return np.array((await self._run_alone(params, op.xs, h0)).hs)

    async def _run_alone(self, params: Params, xs: Array, h0: Array) -> Tape:
        computed: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        self._scheduler.submit(Chunk(params, xs, h0, alone=True, deliver=computed.set_result))
        done = await computed
        if done.tape is None:
            raise done.error or RuntimeError("a chunk was not computed")
        return done.tape

    async def _extend(self, key: SessionKey, live: CachedSession) -> None:
        # A replay is answered also where the store takes no writes at all.
        with suppress(*STORE_FAILURES):
            if await self._store.extend_session(key, live.epoch) is ChunkOutcome.TOUCH:
                self._touch(key, live)

    # --- without a session --------------------------------------------------------------------------

    async def _run_stateless(self, call: _Call) -> None:
        op = call.op
        model = await self._model_cache.get(ModelKey(call.key.tenant, op.model_id))
        n, h = op.xs.shape[0], model.spec.hidden_size
        self._check_chunk(op, model.spec, n)
        h0 = np.zeros((n, h), model.spec.dtype) if op.h0 is None else op.h0
        check_tensor("h0", h0, (n, h), model.spec.dtype)
        version, params = await self._choose_weights(op, model)
        tape = await self._run_alone(params, op.xs, h0)
        last = np.ascontiguousarray(tape.hs[:, -1])
        check_state(last)
        self._end(call, self._result(op, tape.hs, last, version, b"", replayed=False))

    # --- common -------------------------------------------------------------------------------------

    def _result(
        self, op: Forward, hs: Array, h: Array, version: Version, token: bytes, *, replayed: bool
    ) -> ForwardResult:
        shown = hs if op.return_hs is ReturnHs.ALL else None
        if op.return_hs is ReturnHs.LAST:
            shown = h[:, None]
        return ForwardResult(
            op.session_id, op.epoch, op.chunk_seq, shown, h, version, token, replayed
        )

    def _check_chunk(self, op: Forward, spec: ModelSpec, batch_size: int) -> None:
        n, t, d = op.xs.shape
        if op.xs.dtype != spec.dtype:
            raise bad_tensor("xs.dtype", f"expected {spec.dtype}, got {op.xs.dtype}")
        if d != spec.input_size:
            raise bad_tensor("xs.shape[2]", f"expected D={spec.input_size}, got {d}")
        if n != batch_size:
            raise bad_tensor("xs.shape[0]", f"expected N={batch_size}, got {n}")
        if t < 1:
            raise bad_tensor("xs.shape[1]", f"expected T >= 1, got {t}")
        # All of hs counts, whatever of it is returned: it is computed, and a Backward sends as much. A
        # few inputs a row could otherwise ask for gigabytes.
        size = n * (t + 1) * spec.hidden_size * op.xs.itemsize + _RESPONSE_OVERHEAD
        if size > self._limits.message_bytes:
            raise answer_too_large(size, self._limits.message_bytes)

    def _touch(self, key: SessionKey, live: CachedSession) -> None:
        async def touch() -> None:
            try:
                await self._store.touch_session(key, live.ttl_ms)
            except STORE_FAILURES:
                live.is_listed = False  # the next chunk tries again
            else:
                live.is_listed = True

        task = asyncio.get_running_loop().create_task(touch())
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _spawn(self, call: _Call, steps: Coroutine[None, None, None]) -> None:
        async def run() -> None:
            try:
                await steps
            except Exception as error:  # noqa: BLE001 - it becomes the answer
                self._end(call, error)
            except asyncio.CancelledError:  # whoever cancelled, the session must not stay blocked
                self._end(call, cancelled_midway())
                raise

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._idle.set()

    def _end(self, call: _Call, outcome: ForwardResult | Exception) -> None:
        """Give the answer, once, and let the session's next chunk start."""
        told, call.told = call.told, None
        if told is not None:
            try:
                told(outcome)
            except Exception as error:  # noqa: BLE001 - the session and its batch must go on
                context = {"message": "an answer could not be told", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        lanes = self._lanes
        if call.key not in lanes:
            return
        lane = lanes[call.key]
        if lane:
            self._start(lane.popleft())
        else:
            del lanes[call.key]
            self._idle.set()


def teller_of(answer: asyncio.Future[ForwardResult]) -> Told:
    """Return what settles a future with a chunk's outcome, unless nobody waits any more."""

    def told(outcome: ForwardResult | Exception) -> None:
        if answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    return told


def _result_of(reading: asyncio.Task[KnownModel]) -> KnownModel | None:
    """Return what was read; None when it failed: then it is tried again where errors are told."""
    return None if reading.cancelled() or reading.exception() else reading.result()


def _is_next(op: Forward, live: CachedSession) -> bool:
    """Tell whether a chunk continues a state in hand."""
    return (
        live.epoch == op.epoch
        and live.chunk_seq + 1 == op.chunk_seq
        and op.previous_token in (b"", live.token)
    )


def _digest(op: Forward) -> bytes:
    return chunk_digest(op.xs, train=op.train)
