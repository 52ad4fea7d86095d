"""Session scripts: commits, the ring, epochs, markers, tapes, the tenant's list."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from instruments.replicas import patient
from service.domain.digests import request_digest
from service.domain.limits_policy import TenantLimits
from service.domain.ports import (
    Absence,
    AbsentSession,
    ChunkCommit,
    ChunkOutcome,
    CloseDecision,
    CloseOutcome,
    EpochMode,
    EpochOutcome,
    EpochStart,
    SessionHead,
    SessionSnapshot,
    StoredState,
)
from service.domain.types import ChunkKey, RequestDigest, SessionKey, Version
from service.settings import DAY_MS, HOUR_MS, Limits
from service.store import keys, layouts
from service.store.connect import open_store

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from service.store.connect import Store

VERSION = Version(1, b"v" * 16)
STATE = bytes(32)
HEAD = SessionHead("m", b"i" * 16, "float32", 2, 0, 0, HOUR_MS)


def token(number: int) -> bytes:
    """Return the token of chunk `number`."""
    return b"token" + number.to_bytes(11, "big")


def start(mode: EpochMode = EpochMode.FAIL, **facts: object) -> EpochStart:
    """Lay out the beginning of an epoch."""
    first = StoredState(0, bytes(16), token(0), Version(0, bytes(16)), STATE)
    made = EpochStart(mode, HEAD, first, request_digest(""))
    return replace(made, **facts)  # type: ignore[arg-type]


class Writer:
    """Commits chunks of one session without asking what the store holds."""

    def __init__(self, store: Store, tenant: str, session_id: str = "s") -> None:
        self.store, self.key = store.sessions, SessionKey(tenant, session_id)
        self.epoch = 0

    async def begin(self, mode: EpochMode = EpochMode.FAIL, **facts: object) -> EpochOutcome:
        """Begin an epoch."""
        decided = await self.store.begin_epoch(self.key, start(mode, **facts))
        assert not isinstance(decided, AbsentSession)
        if decided.outcome is EpochOutcome.BEGUN:
            self.epoch = decided.epoch
        return decided.outcome

    async def absent(self, mode: EpochMode, **facts: object) -> Absence:
        """Ask for an epoch of a session that must be there, and is not."""
        decided = await self.store.begin_epoch(self.key, start(mode, **facts))
        assert isinstance(decided, AbsentSession), decided
        return decided.why

    def chunk(self, number: int, **facts: object) -> ChunkCommit:
        """Build chunk `number`, whose digest, token and state name it."""
        state = StoredState(number, b"d" * 16, token(number), VERSION, bytes([number]) * 32)
        made = ChunkCommit(self.key, self.epoch, token(number - 1), state, number - 1)
        return replace(made, **facts)  # type: ignore[arg-type]

    async def commit(self, number: int, **facts: object) -> ChunkOutcome:
        """Apply chunk `number`."""
        (outcome,) = await self.store.commit_chunks([self.chunk(number, **facts)])
        assert isinstance(outcome, ChunkOutcome), outcome
        return outcome

    async def read(self, number: int = 0) -> SessionSnapshot:
        """Read the session with one script."""
        found = await self.store.read_session(self.key, number)
        assert isinstance(found, SessionSnapshot), found
        return found

    async def absence(self) -> AbsentSession:
        """Read why it is not there."""
        found = await self.store.read_session(self.key)
        assert isinstance(found, AbsentSession), found
        return found


@pytest.fixture
def writer(opened: Store, tenant: str) -> Writer:
    """A writer of the session "s"."""
    return Writer(opened, tenant)


async def test_a_commit_replaces_the_state(writer: Writer) -> None:
    """Epoch, numbers, token and state are read as they were written."""
    assert await writer.begin() is EpochOutcome.BEGUN
    assert await writer.commit(1) is ChunkOutcome.OK
    found = await writer.read(1)
    assert (found.head.epoch, found.head.chunk_seq, found.head.model_id) == (writer.epoch, 1, "m")
    assert found.last == found.at == writer.chunk(1).state
    assert found.before is not None
    assert found.before.token == token(0)


@pytest.mark.parametrize(
    ("number", "facts"),
    [
        (1, {}),
        (3, {}),
        (2, {"base_token": b"x" * 16}),
        (2, {"epoch": 1}),
        (2, {"epoch": 1 << 60}),
        (2, {"key": SessionKey("other", "s")}),
    ],
)
async def test_anything_but_a_match_is_stale_and_changes_nothing(
    writer: Writer, number: int, facts: dict[str, object]
) -> None:
    """A used number, a hole, another state, epoch or session."""
    await writer.begin()
    await writer.commit(1)
    before = await writer.read()
    assert await writer.commit(number, **facts) is ChunkOutcome.STALE
    after = await writer.read()
    assert (after.head, after.last) == (before.head, before.last)


async def test_a_state_of_another_size_is_stale(writer: Writer) -> None:
    """A record's slots have one size; nothing else is ever written into them."""
    await writer.begin()
    state = replace(writer.chunk(1).state, state=bytes(33))
    assert await writer.commit(1, state=state) is ChunkOutcome.STALE


async def test_commits_of_many_sessions_are_decided_each_by_itself(
    opened: Store, tenant: str
) -> None:
    """One call of the script carries chunks that match beside one that does not."""
    writers = [Writer(opened, tenant, name) for name in "abcd"]
    for one in writers:
        await one.begin()
    chunks = [one.chunk(2 if one.key.session_id == "b" else 1) for one in writers]
    outcomes = await opened.sessions.commit_chunks(chunks)
    ok, stale = ChunkOutcome.OK, ChunkOutcome.STALE
    assert outcomes == [ok, stale, ok, ok]
    assert [(await one.read()).head.chunk_seq for one in writers] == [1, 0, 1, 1]


@pytest.mark.parametrize(("waits", "slots"), [(True, 2), (False, 5)])
async def test_the_ring_grows_only_for_chunks_in_flight(
    writer: Writer, tenant: str, raw: Redis, *, waits: bool, slots: int
) -> None:
    """A client that acknowledges each answer costs two states, one that does not W+1."""
    await writer.begin()
    for number in range(1, 12):
        await writer.commit(number, acknowledged_seq=number - 1 if waits else 0)
        assert (await writer.read()).last.state == bytes([number]) * 32
    record = await raw.get(keys.session_tag(SessionKey(tenant, "s")))
    assert record is not None
    assert record[1] == slots
    assert len(record) == layouts.HEAD.size + 1 + slots * (layouts.SLOT.size + len(STATE))
    for number in range(1, 12):
        found = await writer.read(number)
        assert (found.at is not None) is (number > 11 - slots)
        assert (found.before is not None) is (number - 1 > 11 - slots)
        assert found.at in (None, writer.chunk(number).state)


@pytest.mark.parametrize("when", range(1, 9))
async def test_the_ring_keeps_what_it_held_when_it_grows(writer: Writer, when: int) -> None:
    """Whenever a client stops acknowledging, no state that may be asked for is lost."""
    await writer.begin()
    for number in range(1, when + 4):
        await writer.commit(number, acknowledged_seq=min(number - 1, when - 1))
    for number in range(when, when + 4):
        found = await writer.read(number)
        assert found.at == writer.chunk(number).state
        assert found.before is not None
        assert found.before.token == token(number - 1)


async def test_a_chunk_that_never_was_is_not_found(writer: Writer) -> None:
    """Numbers beyond the session's, up to what a message can carry, have no state."""
    await writer.begin()
    await writer.commit(1)
    for number in (2, 3, 100, (1 << 53) - 1, 1 << 53, (1 << 53) + 1):
        assert (await writer.read(number)).at is None


@pytest.mark.parametrize("stay_ms", [0, HOUR_MS // 4 + 1])
async def test_the_list_is_to_be_updated_when_a_quarter_has_passed(
    writer: Writer, tenant: str, raw: Redis, stay_ms: int
) -> None:
    """TOUCH comes once a quarter of the ttl, and extends the marker."""
    await writer.begin()
    tag = keys.session_tag(SessionKey(tenant, "s"))
    record = await raw.get(tag)
    assert isinstance(record, bytes)
    touched = int.from_bytes(record[32:40], "big") - stay_ms
    await raw.execute_command("SETRANGE", tag, 32, touched.to_bytes(8, "big"))
    await raw.pexpire(keys.marker_key(tag), 1000)
    due = stay_ms > 0
    expected = ChunkOutcome.TOUCH if due else ChunkOutcome.OK
    assert await writer.commit(1) is expected
    assert (await raw.pttl(keys.marker_key(tag)) > DAY_MS) is due
    assert await writer.commit(2) is ChunkOutcome.OK


async def test_an_epoch_is_greater_than_any_before_and_than_the_clock(
    writer: Writer, tenant: str, raw: Redis
) -> None:
    """max(marker, time in ms) + 1: by the clock first, by the marker when it is ahead."""
    seconds, micros = await raw.time()
    await writer.begin()
    assert writer.epoch > seconds * 1000 + micros // 1000
    far = writer.epoch + 10 * HOUR_MS
    await raw.set(
        keys.marker_key(keys.session_tag(SessionKey(tenant, "s"))), layouts.MARKER.pack(far, b"L")
    )
    await writer.begin(EpochMode.RESET)
    assert writer.epoch == far + 1


async def test_a_live_session_is_left_resumed_or_begun_anew(writer: Writer) -> None:
    """fail, resume and reset."""
    await writer.begin()
    await writer.commit(1)
    first = writer.epoch
    assert await writer.begin(EpochMode.FAIL) is EpochOutcome.EXISTS
    assert await writer.begin(EpochMode.RESUME) is EpochOutcome.RESUMED
    assert await writer.begin(EpochMode.MUST_EXIST) is EpochOutcome.RESUMED
    assert (await writer.read()).head.chunk_seq == 1
    assert await writer.begin(EpochMode.RESET) is EpochOutcome.BEGUN
    assert writer.epoch > first
    assert (await writer.read()).head.chunk_seq == 0


async def test_only_a_live_session_gets_a_new_state(writer: Writer) -> None:
    """The mode of SetState and ResetState needs a session, at the place expected."""
    assert await writer.absent(EpochMode.LIVE) is Absence.NEVER
    await writer.begin()
    await writer.commit(1)
    assert await writer.begin(EpochMode.LIVE, expected_epoch=1) is EpochOutcome.FENCED
    assert await writer.begin(EpochMode.LIVE, expected_chunk_seq=0) is EpochOutcome.GAP
    here = {"expected_epoch": writer.epoch, "expected_chunk_seq": 1}
    assert await writer.begin(EpochMode.LIVE, **here) is EpochOutcome.BEGUN


async def test_a_session_that_must_exist_is_never_begun(writer: Writer, raw: Redis) -> None:
    """Never opened, expired and closed are distinguished, and nothing is written."""
    assert await writer.absent(EpochMode.MUST_EXIST) is Absence.NEVER
    assert await writer.absent(EpochMode.MUST_EXIST, restored_epoch=1) is Absence.NEVER
    await writer.begin()
    await raw.pexpireat(keys.session_tag(writer.key), 1)
    assert await writer.absent(EpochMode.MUST_EXIST) is Absence.EXPIRED
    await writer.begin()
    await writer.store.close_session(writer.key, 0)
    assert await writer.absent(EpochMode.MUST_EXIST) is Absence.CLOSED


async def test_a_request_is_known_by_its_name_and_its_content(writer: Writer) -> None:
    """The same 16 bytes replay, the same first 8 with others are REUSED, none are never known."""
    request = RequestDigest(b"r" * 16, b"c" * 16)
    other = RequestDigest(b"r" * 16, b"d" * 16)
    assert await writer.begin(request=request) is EpochOutcome.BEGUN
    assert await writer.begin(request=request) is EpochOutcome.REPLAYED
    assert await writer.begin(request=other) is EpochOutcome.REUSED
    assert await writer.begin(EpochMode.RESET) is EpochOutcome.BEGUN
    assert await writer.begin(EpochMode.FAIL) is EpochOutcome.EXISTS


async def test_a_restored_epoch_must_be_newer_than_what_is_there(writer: Writer) -> None:
    """It may be ahead of the clock by a day, no more, and never again one that was."""
    await writer.begin()
    first = writer.epoch
    assert await writer.begin(EpochMode.RESET, restored_epoch=first) is EpochOutcome.FENCED
    assert await writer.begin(EpochMode.RESET, restored_epoch=first - 1) is EpochOutcome.FENCED
    too_far = first + DAY_MS + HOUR_MS
    assert await writer.begin(EpochMode.RESET, restored_epoch=too_far) is EpochOutcome.FENCED
    assert await writer.begin(EpochMode.RESET, restored_epoch=first + 5) is EpochOutcome.BEGUN
    assert writer.epoch == first + 5


async def test_never_expired_and_closed_are_distinguished(
    writer: Writer, tenant: str, raw: Redis
) -> None:
    """The marker says which, with the last epoch, until it expires itself."""
    assert (await writer.absence()).why is Absence.NEVER
    await writer.begin()
    tag = keys.session_tag(SessionKey(tenant, "s"))
    await raw.pexpireat(tag, 1)
    expired = await writer.absence()
    assert expired.expired_at_ms > 0
    assert replace(expired, expired_at_ms=0) == AbsentSession(Absence.EXPIRED, writer.epoch)
    await writer.begin()
    closed = CloseDecision(CloseOutcome.CLOSED, writer.epoch)
    assert await writer.store.close_session(writer.key, 0) == closed
    was_closed = AbsentSession(Absence.CLOSED, writer.epoch)
    assert await writer.absence() == was_closed
    assert await writer.store.close_session(writer.key, 0) == was_closed
    await raw.pexpireat(keys.marker_key(tag), 1)
    assert (await writer.absence()).why is Absence.NEVER


async def test_a_marker_outlives_its_session_by_a_day(
    writer: Writer, tenant: str, raw: Redis
) -> None:
    """Also when nothing more is done with the session."""
    await writer.begin()
    tag = keys.session_tag(SessionKey(tenant, "s"))
    assert await raw.pttl(keys.marker_key(tag)) - await raw.pttl(tag) > DAY_MS - 1000


@pytest.mark.parametrize("ends", ["closed", "reset", "extended"])
async def test_a_marker_outlives_every_ttl_that_was_promised(
    writer: Writer, tenant: str, raw: Redis, ends: str
) -> None:
    """Closed, or begun again for a shorter time: within the first time to live the end is known."""
    week_ms = 7 * DAY_MS
    await writer.begin(head=replace(HEAD, ttl_ms=week_ms))
    if ends == "closed":
        await writer.store.close_session(SessionKey(tenant, "s"), 0)
    else:
        await writer.begin(EpochMode.RESET, head=replace(HEAD, ttl_ms=1))
    if ends == "extended":
        await writer.begin(EpochMode.RESET, head=replace(HEAD, ttl_ms=1000))
        await writer.store.extend_session(SessionKey(tenant, "s"), writer.epoch)
    marker = keys.marker_key(keys.session_tag(SessionKey(tenant, "s")))
    assert await raw.pttl(marker) > week_ms + DAY_MS - 1000


async def test_a_close_minds_the_epoch_expected(writer: Writer, tenant: str) -> None:
    """Another epoch is FENCED and closes nothing."""
    await writer.begin()
    decision = await writer.store.close_session(writer.key, writer.epoch + 1)
    assert decision == CloseDecision(CloseOutcome.FENCED, writer.epoch)
    assert (await writer.read()).head.epoch == writer.epoch


async def test_tapes_wait_count_and_are_pushed_out(store_url: str, tenant: str, raw: Redis) -> None:
    """Too many that wait are QUOTA; counted ones make room by number, the oldest first."""
    tight = Limits(tapes_per_session=2, counted_tapes_per_session=1)
    store = await open_store(store_url, patient(tight))
    writer = Writer(store, tenant)
    await writer.begin()
    for number in (1, 2):
        assert await writer.commit(number, tape=b"tape") is ChunkOutcome.OK
    assert await writer.commit(3, tape=b"tape") is ChunkOutcome.QUOTA
    assert (await writer.read()).head.chunk_seq == 2
    for number in (1, 2):
        await writer.store.mark_tape_consumed(
            ChunkKey(SessionKey(tenant, "s"), writer.epoch, number), token(number)
        )
    assert await writer.commit(3, tape=b"tape") is ChunkOutcome.OK
    there = [
        (await writer.store.read_tape(ChunkKey(SessionKey(tenant, "s"), writer.epoch, number))).data
        is not None
        for number in (1, 2, 3)
    ]
    assert there == [False, True, True]
    index = keys.tape_index_key(keys.session_tag(SessionKey(tenant, "s")))
    assert await raw.hlen(index) == 2
    await store.close()


class ByTenant:
    """A policy that gives each tenant named what it says, and everyone else what is usual."""

    def __init__(self, quotas: dict[str, TenantLimits]) -> None:
        self._quotas = quotas

    def of(self, tenant: str) -> TenantLimits:
        """Return the quotas of a tenant."""
        return self._quotas.get(tenant, TenantLimits.from_limits(Limits()))


async def test_one_call_carries_commits_under_different_quotas(store_url: str, tenant: str) -> None:
    """Chunks with and without a tape, of several tenants, are each decided by their own numbers."""
    one_tape = TenantLimits.from_limits(Limits(tapes_per_session=1))
    policy = ByTenant({f"{tenant}-tight": one_tape})
    store = await open_store(store_url, patient(Limits()), policy=policy)
    tight, plain, usual, last = (
        Writer(store, f"{tenant}-{kind}", name)
        for kind, name in (("tight", "a"), ("tight", "b"), ("usual", "c"), ("usual", "d"))
    )
    for one in (tight, plain, usual, last):
        await one.begin()
        assert await one.commit(1, tape=b"tape") is ChunkOutcome.OK
    chunks = [
        tight.chunk(2, tape=b"tape"),
        plain.chunk(2),
        usual.chunk(2, tape=b"tape"),
        last.chunk(2),
    ]
    outcomes = await store.sessions.commit_chunks(chunks)
    ok = ChunkOutcome.OK
    assert outcomes == [ChunkOutcome.QUOTA, ok, ok, ok]
    await store.close()


async def test_consumed_tapes_are_bounded_in_bytes(store_url: str, tenant: str) -> None:
    """However few, they go when they hold more than they may."""
    store = await open_store(store_url, patient(Limits(counted_tape_bytes_per_session=10)))
    writer = Writer(store, tenant)
    await writer.begin()
    for number in (1, 2, 3):
        await writer.commit(number, tape=bytes(8))
        await writer.store.mark_tape_consumed(
            ChunkKey(SessionKey(tenant, "s"), writer.epoch, number), token(number)
        )
    await writer.commit(4, tape=bytes(8))
    there = [
        (await writer.store.read_tape(ChunkKey(SessionKey(tenant, "s"), writer.epoch, number))).data
        is not None
        for number in (1, 2, 3, 4)
    ]
    assert there == [False, False, True, True]
    await store.close()


async def test_a_tape_is_settled_by_its_token_alone(writer: Writer, tenant: str) -> None:
    """A late word about a tape that was replaced since does not make the new one count."""
    await writer.begin()
    await writer.commit(1, tape=b"tape")
    await writer.store.mark_tape_consumed(
        ChunkKey(SessionKey(tenant, "s"), writer.epoch, 1), b"x" * 16
    )
    assert await writer.store.discard_tapes(SessionKey(tenant, "s"), writer.epoch, [1]) == 1
    await writer.commit(2, tape=b"tape")
    await writer.store.mark_tape_consumed(
        ChunkKey(SessionKey(tenant, "s"), writer.epoch, 2), token(2)
    )
    assert await writer.store.discard_tapes(SessionKey(tenant, "s"), 0, []) == 0


async def test_a_tapes_time_is_at_most_the_sessions(
    writer: Writer, tenant: str, raw: Redis
) -> None:
    """A session of a second has tapes of a second."""
    await writer.begin(head=replace(HEAD, ttl_ms=1000))
    await writer.commit(1, tape=b"tape")
    tag = keys.session_tag(SessionKey(tenant, "s"))
    name = layouts.TAPE_NAME.pack(writer.epoch, 1)
    for key in (tag, keys.tape_index_key(tag), keys.tape_key(tag, name)):
        assert 0 < await raw.pttl(key) <= 1000


async def test_the_list_has_a_place_for_each_session_but_no_more(
    store_url: str, tenant: str, raw: Redis
) -> None:
    """A session that is listed is never refused; lapsed ones make room by themselves."""
    store = await open_store(store_url, patient(Limits(sessions_per_tenant=2)))
    sessions = store.sessions
    assert await sessions.reserve_session(SessionKey(tenant, "a"), HOUR_MS)
    assert await sessions.reserve_session(SessionKey(tenant, "b"), HOUR_MS)
    assert not await sessions.reserve_session(SessionKey(tenant, "c"), HOUR_MS)
    assert await sessions.reserve_session(SessionKey(tenant, "a"), HOUR_MS)
    await raw.zadd(keys.tenant_sessions_key(tenant), {"b": 1})
    assert await sessions.reserve_session(SessionKey(tenant, "c"), HOUR_MS)
    end = await sessions.find_listing(SessionKey(tenant, "a"))
    assert end is not None
    await sessions.release_listing(SessionKey(tenant, "a"), end, None)
    assert await sessions.find_listing(SessionKey(tenant, "a")) is None
    assert [name for name, _ in await sessions.list_sessions(tenant, None, 10)] == ["c"]
    await store.close()


async def test_pages_go_on_where_equal_times_were_cut(
    opened: Store, tenant: str, raw: Redis
) -> None:
    """Sessions that expire in the same millisecond are each listed once."""
    seconds, _ = await raw.time()
    at = (seconds + 3600) * 1000
    names = [f"s{i:02}" for i in range(7)]
    await raw.zadd(keys.tenant_sessions_key(tenant), dict.fromkeys(names, at))
    seen: list[str] = []
    after = None
    while page := await opened.sessions.list_sessions(tenant, after, 3):
        seen += [name for name, _ in page]
        after = page[-1]
    assert seen == names
