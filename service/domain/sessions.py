"""Opens, inspects, moves and closes sessions."""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from service.domain import pages
from service.domain.digests import first_token, request_digest
from service.domain.errors import (
    Aborted,
    AlreadyExists,
    DomainError,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    UnsupportedLayout,
    bad_field,
    quoted,
)
from service.domain.ports import (
    Absence,
    AbsentSession,
    ChunkOutcome,
    CloseOutcome,
    EpochMode,
    EpochOutcome,
    EpochStart,
    SessionHead,
    SessionSnapshot,
    StoredState,
)
from service.domain.refusals import (
    STORE_FAILURES,
    after_decision,
    check_tensor,
    contended,
    request_id_reused,
    session_absent,
)
from service.domain.retries import EPOCH_TRIES
from service.domain.rules import (
    check_id,
    check_number,
    check_optional_id,
    checked_page_size,
)
from service.domain.session_cache import cached_from_snapshot, state_from_bytes
from service.domain.types import (
    DIGEST_BYTES,
    ModelKey,
    OnExists,
    OpenedSession,
    SessionKey,
    SessionView,
    Version,
)

if TYPE_CHECKING:
    from rnn_engine import Array
    from service.domain.carrying import Carrier
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.model_cache import ModelCache
    from service.domain.ports import (
        EpochDecision,
        SessionStore,
    )
    from service.domain.rules import InputRules
    from service.domain.session_cache import SessionCache
    from service.domain.types import (
        ForkSession,
        ModelSpec,
        NewEpoch,
        OpenSession,
    )

SERVER_ID_BYTES = 16
_NO_VERSION = Version(0, bytes(DIGEST_BYTES))
_ANSWER_OVERHEAD = 1024


class Sessions:
    """The session operations."""

    def __init__(
        self,
        store: SessionStore,
        model_cache: ModelCache,
        session_cache: SessionCache,
        *,
        carrier: Carrier,
        rules: InputRules,
        policy: LimitsPolicy,
    ) -> None:
        """Keep the parts that the operations use."""
        self._store = store
        self._model_cache = model_cache
        self._session_cache = session_cache
        self._rules = rules
        self._policy = policy
        self._carrier = carrier

    async def open(self, tenant: str, op: OpenSession) -> OpenedSession:
        """Open a session, or resume or reset a live one.

        MUST_EXIST reserves no entry: a live session is on the tenant's list already.
        """
        self._rules.check_open(op)
        model = await self._model_cache.get(ModelKey(tenant, op.model_id), fresh=True)
        key = SessionKey(tenant, op.session_id or new_session_id())
        state = self._first_state(
            model.spec, op.batch_size, op.initial_state, field="initial_state"
        )
        ttl_ms = self._rules.limits.default_ttl_ms if op.ttl_ms is None else op.ttl_ms
        start = EpochStart(
            mode=EpochMode(op.on_exists.value),
            head=SessionHead(
                op.model_id, model.incarnation, model.spec.dtype, op.batch_size, 0, 0, ttl_ms
            ),
            first=_first(state),
            request=request_digest(
                op.request_id,
                b"open",
                op.model_id.encode(),
                op.batch_size.to_bytes(4, "big"),
                state.tobytes(),
            ),
            restored_epoch=op.restored_epoch,
        )
        if op.on_exists is OnExists.MUST_EXIST:
            return await self._begin(key, start)
        return await self._create(key, start)

    async def get(self, key: SessionKey) -> SessionView:
        """Return one session."""
        check_id("session_id", key.session_id)
        return _view(key.session_id, await self._read(key))

    async def list_page(
        self, tenant: str, page_size: int, page_token: str, *, model_id: str
    ) -> tuple[list[SessionView], str]:
        """Return a page of live sessions and the token of the next page."""
        check_optional_id("model_id", model_id)
        page_size = checked_page_size(page_size, page_token)
        after = pages.position_from_token(page_token)
        listed = await self._store.list_sessions(tenant, after, page_size)
        views = []
        for session_id, _ in listed:
            found = await self._store.read_session(SessionKey(tenant, session_id))
            if isinstance(found, SessionSnapshot) and model_id in ("", found.head.model_id):
                views.append(_view(session_id, found))
        return views, pages.token_from_position(listed[-1]) if len(listed) == page_size else ""

    async def get_state(self, key: SessionKey, *, extend_ttl: bool) -> OpenedSession:
        """Return a session with its state; extend its time to live only when asked."""
        check_id("session_id", key.session_id)
        snapshot = await self._read(key)
        if extend_ttl:
            head = snapshot.head
            outcome = await self._store.extend_session(key, head.epoch)
            if outcome is ChunkOutcome.TOUCH:
                await self._touch(key, head.ttl_ms)
            snapshot = await self._read(key)
        return _opened(key.session_id, snapshot, resumed=False, replayed=False)

    async def begin_epoch(self, tenant: str, op: NewEpoch) -> tuple[SessionView, bool]:
        """Give a live session a new state and fence off the writers of the old epoch."""
        self._rules.check_new_epoch(op)
        key = SessionKey(tenant, op.session_id)
        for _ in range(EPOCH_TRIES):
            head = (await self._read(key)).head
            model = await self._model_cache.get_incarnation(
                ModelKey(tenant, head.model_id), head.incarnation
            )
            state = self._first_state(model.spec, head.batch_size, op.state, field="state")
            start = EpochStart(
                mode=EpochMode.LIVE,
                head=head,
                first=_first(state),
                request=request_digest(op.request_id, b"state", state.tobytes()),
                # What was read may belong to a session that has been closed and opened otherwise since.
                expected_epoch=op.expected_epoch or head.epoch,
                expected_chunk_seq=op.expected_chunk_seq,
                restored_epoch=op.restored_epoch,
            )
            decision = await self._begin_epoch(key, start)
            is_overtaken = decision.outcome is EpochOutcome.FENCED and decision.epoch != head.epoch
            if is_overtaken and not op.expected_epoch:
                continue
            opened = await self._began(key, start, decision)
            return opened.session, opened.replayed
        raise contended()

    async def fork(self, tenant: str, op: ForkSession) -> OpenedSession:
        """Open another session from this one's present state."""
        self._rules.check_fork(op)
        source = await self._read(SessionKey(tenant, op.session_id))
        head = source.head
        model = await self._model_cache.get_incarnation(
            ModelKey(tenant, head.model_id), head.incarnation
        )
        new_id = op.new_session_id or new_session_id()
        ttl_ms = head.ttl_ms if op.ttl_ms is None else op.ttl_ms
        start = EpochStart(
            mode=EpochMode.FAIL,
            head=SessionHead(
                head.model_id, model.incarnation, head.dtype, head.batch_size, 0, 0, ttl_ms
            ),
            first=StoredState(
                0,
                bytes(DIGEST_BYTES),
                first_token(source.last.state),
                _NO_VERSION,
                source.last.state,
            ),
            request=request_digest(op.request_id, b"fork", op.session_id.encode()),
        )
        return await self._create(SessionKey(tenant, new_id), start)

    async def close(self, key: SessionKey, expected_epoch: int) -> bool:
        """End a session; return whether this call ended it."""
        check_id("session_id", key.session_id)
        check_number("expected_epoch", expected_epoch, 0)
        decision = await self._store.close_session(key, expected_epoch)
        self._session_cache.drop(key)
        if isinstance(decision, AbsentSession):
            if decision.why is Absence.NEVER:
                raise session_absent(key.session_id, decision)
        elif decision.outcome is CloseOutcome.FENCED:
            text = f"expected epoch {expected_epoch}, the present is {decision.epoch}"
            raise Aborted("EPOCH_FENCED", text, epoch=decision.epoch)
        # Else its entry in the tenant's list lapses in time. Another release may have begun a session there meanwhile.
        with suppress(*STORE_FAILURES, UnsupportedLayout):
            await self._release_listing(key, await self._store.find_listing(key))
        return not isinstance(decision, AbsentSession)

    async def _create(self, key: SessionKey, start: EpochStart) -> OpenedSession:
        """Reserve an entry in the tenant's list and begin an epoch, even if the caller gives up waiting.

        So an entry that was reserved is always used or released.
        """
        return await self._carrier.carry(self._reserve_and_begin(key, start))

    async def _reserve_and_begin(self, key: SessionKey, start: EpochStart) -> OpenedSession:
        reserved = await self._reserve(key, start.head.ttl_ms)
        try:
            return await self._begin(key, start)
        except Unavailable:  # it may have begun; if not, the entry expires by itself
            raise
        except DomainError:
            with suppress(*STORE_FAILURES, UnsupportedLayout):
                await self._release_listing(key, reserved)
            raise

    async def _release_listing(self, key: SessionKey, listed_end: int | None) -> None:
        """Release an entry that was read before this began; a session that lives now keeps its own.

        One that begins meanwhile changes the entry, or makes it again once it has begun.
        """
        if listed_end is None:
            return
        found = await self._store.read_session(key)
        live = found if isinstance(found, SessionSnapshot) else None
        await self._store.release_listing(key, listed_end, live)

    async def _begin(self, key: SessionKey, start: EpochStart) -> OpenedSession:
        return await self._began(key, start, await self._begin_epoch(key, start))

    async def _begin_epoch(self, key: SessionKey, start: EpochStart) -> EpochDecision:
        """Have the store decide; raise where there must be a session and is none."""
        decided = await self._store.begin_epoch(key, start)
        if isinstance(decided, AbsentSession):
            self._session_cache.drop(key)
            raise session_absent(key.session_id, decided)
        return decided

    async def _began(
        self, key: SessionKey, start: EpochStart, decision: EpochDecision
    ) -> OpenedSession:
        """Refuse what did not begin, and return the session as it now is."""
        self._session_cache.drop(key)
        self._refuse(key, start, decision)
        with after_decision():
            snapshot = await self._read(key)
        resumed = decision.outcome is EpochOutcome.RESUMED
        if resumed:
            _check_resumable(snapshot.head, start.head)
            with suppress(
                *STORE_FAILURES
            ):  # it is resumed all the same, until the expiry that it has
                await self._store.extend_session(key, decision.epoch)
                snapshot = await self._read(key)
        elif snapshot.head.epoch != decision.epoch:
            ended = _ended_epoch(start, decision, snapshot)
            return _opened(key.session_id, ended, resumed=False, replayed=False)
        live = cached_from_snapshot(key.tenant, snapshot)
        # This Open has listed the session already, but perhaps with another end than it now has, and another
        # Open that was refused may have released the entry since.
        live.is_listed = await self._touch(key, snapshot.head.ttl_ms)
        self._session_cache.put(key, live)
        replayed = decision.outcome is EpochOutcome.REPLAYED
        return _opened(key.session_id, snapshot, resumed=resumed, replayed=replayed)

    def _refuse(self, key: SessionKey, start: EpochStart, decision: EpochDecision) -> None:
        """Raise unless an epoch has begun, or goes on."""
        outcome, epoch = decision.outcome, decision.epoch
        if outcome is EpochOutcome.EXISTS:
            text = f"session {quoted(key.session_id)} is live: use RESUME or RESET, or another name"
            raise AlreadyExists("SESSION_EXISTS", text, session_id=key.session_id, epoch=epoch)
        if outcome is EpochOutcome.REUSED:
            raise request_id_reused()
        if outcome is EpochOutcome.FENCED:
            asked = start.restored_epoch or start.expected_epoch
            text = f"expected epoch {asked}, the present or last one is {epoch}"
            raise Aborted("EPOCH_FENCED", text, epoch=epoch)
        if outcome is EpochOutcome.GAP:
            last = decision.chunk_seq
            text = f"expected the last chunk to be {start.expected_chunk_seq}, it is {last}"
            raise Aborted("SEQ_GAP", text, expected_seq=last + 1)

    async def _read(self, key: SessionKey) -> SessionSnapshot:
        found = await self._store.read_session(key)
        if isinstance(found, AbsentSession):
            self._session_cache.drop(key)
            raise session_absent(key.session_id, found)
        return found

    async def _touch(self, key: SessionKey, ttl_ms: int) -> bool:
        """Write a session's new expiry to the tenant's list; if that fails, its next chunk does it."""
        with suppress(*STORE_FAILURES):
            await self._store.touch_session(key, ttl_ms)
            return True
        return False

    async def _reserve(self, key: SessionKey, ttl_ms: int) -> int | None:
        """Reserve an entry in the tenant's list; return the end that it has there, None without one."""
        try:
            reserved = await self._store.reserve_session(key, ttl_ms)
        except STORE_FAILURES as error:
            if error.reason == "UNKNOWN_OUTCOME":
                raise
            # If the store refuses writes, no session can begin either, so that none needs an entry; but
            # a live one can go on, and a retry of an Open that was carried out gets its answer.
            return None
        if reserved is not None:
            return reserved
        limit = self._policy.of(key.tenant).sessions_per_tenant
        text = (
            f"the open sessions have reached their limit of {limit}; close some or let them expire"
        )
        raise ResourceExhausted(
            "MAX_SESSIONS", text, retry_after_s=1.0, quota="sessions_per_tenant", limit=limit
        )

    def _first_state(
        self, spec: ModelSpec, batch_size: int, given: Array | None, *, field: str
    ) -> Array:
        shape = (batch_size, spec.network.state_spec.size)
        size = shape[0] * shape[1] * np.dtype(spec.dtype).itemsize
        if 2 * size + _ANSWER_OVERHEAD > self._rules.limits.message_bytes:
            text = f"a state of {size} bytes does not fit twice into a message of at most "
            raise bad_field("batch_size", f"{text}{self._rules.limits.message_bytes}")
        if given is None:
            return np.zeros(shape, spec.dtype)
        check_tensor(field, given, shape, spec.dtype)
        return given


def new_session_id() -> str:
    """Make a session's name from 128 random bits; it begins with a letter or digit."""
    while True:
        name = secrets.token_urlsafe(SERVER_ID_BYTES)
        if name[0] not in "-_":
            return name


def _first(state: Array) -> StoredState:
    data = state.tobytes()
    return StoredState(0, bytes(DIGEST_BYTES), first_token(data), _NO_VERSION, data)


def _check_resumable(live: SessionHead, asked: SessionHead) -> None:
    if (live.model_id, live.incarnation) != (asked.model_id, asked.incarnation):
        text = f"the live session runs {quoted(live.model_id)}"
        if live.model_id == asked.model_id:
            text += " of before it was deleted and created again; use RESET, or another name"
        raise FailedPrecondition("SESSION_MISMATCH", f"model_id: {text}", field="model_id")
    if live.batch_size != asked.batch_size:
        raise bad_field(
            "batch_size", f"the live session has N={live.batch_size}, got {asked.batch_size}"
        )


def _view(session_id: str, snapshot: SessionSnapshot) -> SessionView:
    head, last = snapshot.head, snapshot.last
    return SessionView(
        session_id=session_id,
        model_id=head.model_id,
        epoch=head.epoch,
        chunk_seq=head.chunk_seq,
        token=last.token,
        batch_size=head.batch_size,
        ttl_ms=head.ttl_ms,
        expire_time_ms=snapshot.expire_time_ms,
        version=last.version if head.chunk_seq else None,
    )


def _opened(
    session_id: str, snapshot: SessionSnapshot, *, resumed: bool, replayed: bool
) -> OpenedSession:
    head = snapshot.head
    state = state_from_bytes(snapshot.last.state, head.dtype, head.batch_size)
    return OpenedSession(_view(session_id, snapshot), state, resumed, replayed)


def _ended_epoch(
    start: EpochStart, decision: EpochDecision, now: SessionSnapshot
) -> SessionSnapshot:
    """Return the beginning of an epoch that another writer has ended since.

    It did begin, so this is no refusal; the next call that names it is fenced.

    Raises:
        Aborted: EPOCH_FENCED if an earlier call began it: chunks may have followed.
    """
    if decision.outcome is not EpochOutcome.BEGUN:
        text = f"epoch {decision.epoch} began and was ended by another writer"
        raise Aborted("EPOCH_FENCED", text, epoch=now.head.epoch)
    head = replace(start.head, epoch=decision.epoch, chunk_seq=0)
    return replace(now, head=head, last=start.first)
