"""Sessions: opened, resumed, moved, listed, expired, closed."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.replicas import (
    HIDDEN,
    INPUTS,
    ROWS,
    Client,
    draw,
    open_on,
    refusal,
    session_keys,
)
from service.domain.errors import NotFound
from service.domain.sessions import new_session_id
from service.domain.types import ForkSession, Forward, ModelKey, NewEpoch, OnExists, SessionKey
from service.settings import Limits
from service.store import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from instruments.replicas import Replica
    from rnn_engine import Array
    from service.domain.ports import EpochStart
    from service.domain.types import OpenedSession
    from tests.domain.conftest import ClientMaker, ModelMaker, ReplicaMaker

Pair = tuple["Replica", "Replica"]


def new_epoch(state: Array | None = None, session_id: str = "s", **options: object) -> NewEpoch:
    """Lay out a SetState, or a ResetState without a state."""
    facts = {"expected_epoch": 0, "expected_chunk_seq": None, "request_id": "", "restored_epoch": 0}
    return NewEpoch(session_id, state, **(facts | options))  # type: ignore[arg-type]


async def expire(raw: Redis, tenant: str, session_id: str = "s") -> None:
    """Let the time to live of a session's keys pass, all but the marker's."""
    for key in await session_keys(raw, tenant, session_id):
        if key != b"e":
            await raw.pexpireat(keys.session_tag(SessionKey(tenant, session_id)) + key, 1)


async def test_a_session_begins_at_zero_and_at_what_it_is_given(
    replicas: Pair, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """The default state is zero; a given one is taken bit for bit; another replica sees it."""
    await make_model()
    zero = await open_on(replicas[0], tenant, "zero")
    np.testing.assert_array_equal(zero.state, np.zeros((ROWS, HIDDEN), np.float32))
    given = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)
    await open_on(replicas[0], tenant, "given", initial_state=given)
    seen = await replicas[1].sessions.get_state(SessionKey(tenant, "given"), extend_ttl=False)
    np.testing.assert_array_equal(seen.state, given)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((ROWS, HIDDEN + 1), "f4", "BAD_TENSOR"),
        ((1, HIDDEN), "f4", "BAD_FIELD"),
        ((ROWS, HIDDEN), "f8", "BAD_TENSOR"),
    ],
)
async def test_a_first_state_of_another_shape_is_refused(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    shape: tuple[int, ...],
    dtype: str,
    reason: str,
) -> None:
    """A state that is not (N, H) of the model's dtype is refused and is never broadcast."""
    await make_model()
    refused = await refusal(open_on(replicas[0], tenant, initial_state=np.zeros(shape, dtype)))
    assert refused.reason == reason


async def test_opening_a_live_session_fails_resumes_or_resets(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """FAIL leaves it alone, RESUME returns it as it is, RESET begins a greater epoch at zero."""
    await make_model()
    client = await open_session()
    done = await client.forward(draw(rng))
    refused = await refusal(open_on(replicas[1], tenant))
    assert refused.reason == "SESSION_EXISTS"
    resumed = await open_on(replicas[1], tenant, on_exists=OnExists.RESUME)
    assert (resumed.resumed, resumed.session.chunk_seq) == (True, 1)
    np.testing.assert_array_equal(resumed.state, done.state)
    reset = await open_on(replicas[1], tenant, on_exists=OnExists.RESET)
    assert reset.session.epoch > client.epoch
    np.testing.assert_array_equal(reset.state, np.zeros((ROWS, HIDDEN), np.float32))
    fenced = await refusal(client.forward(draw(rng)))
    assert fenced.reason == "EPOCH_FENCED"
    assert fenced.metadata["epoch"] == str(reset.session.epoch)


async def test_a_session_that_must_exist_goes_on_or_leaves_nothing(
    replicas: Pair,
    make_replica: ReplicaMaker,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """MUST_EXIST returns a live session as it is, also twice; a refused one takes nobody's place."""
    await make_model()
    client = await open_session()
    done = await client.forward(draw(rng))
    for replica in replicas:
        resumed = await open_on(replica, tenant, on_exists=OnExists.MUST_EXIST, request_id="r")
        assert (resumed.resumed, resumed.replayed) == (True, False)
        np.testing.assert_array_equal(resumed.state, done.state)
    full = await make_replica(Limits(sessions_per_tenant=2))
    for name in ("x", "y", "z"):
        refused = await refusal(open_on(full, tenant, name, on_exists=OnExists.MUST_EXIST))
        assert refused.reason == "SESSION_NOT_FOUND"
    await open_on(full, tenant, "last")


async def test_resuming_as_something_else_is_refused_and_extends_nothing(
    replicas: Pair, tenant: str, make_model: ModelMaker, raw: Redis
) -> None:
    """Another model or batch size is no resumption, and no reason to live longer."""
    await make_model()
    await make_model("other")
    await open_on(replicas[0], tenant)
    tag = keys.session_tag(SessionKey(tenant, "s"))
    await raw.pexpire(tag, 60_000)
    other = open_on(replicas[0], tenant, "s", "other", on_exists=OnExists.RESUME)
    assert (await refusal(other)).reason == "SESSION_MISMATCH"
    wider = open_on(replicas[0], tenant, batch_size=ROWS + 1, on_exists=OnExists.RESUME)
    assert (await refusal(wider)).reason == "BAD_FIELD"
    assert await raw.pttl(tag) <= 60_000


async def test_resuming_extends_the_marker_with_the_session(
    replicas: Pair, tenant: str, make_model: ModelMaker, raw: Redis
) -> None:
    """The marker outlives a session that is only ever resumed, so that its end is reported as expiry."""
    await make_model()
    await open_on(replicas[0], tenant)
    tag = keys.session_tag(SessionKey(tenant, "s"))
    await raw.pexpire(keys.marker_key(tag), 60_000)
    await open_on(replicas[0], tenant, on_exists=OnExists.RESUME)
    assert await raw.pttl(keys.marker_key(tag)) > await raw.pttl(tag)


async def test_absence_has_four_answers(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Every operation distinguishes never opened, expired, closed and fenced."""
    await make_model()
    expired, closed = await open_session("expired"), await open_session("closed")
    await expire(raw, tenant, "expired")
    assert await replicas[0].sessions.close(SessionKey(tenant, "closed"), 0)
    never = Forward("never", 1, 1, b"", draw(rng))
    assert (await refusal(replicas[0].recurrence.forward(tenant, never))).reason == (
        "SESSION_NOT_FOUND"
    )
    assert (await refusal(expired.forward(draw(rng)))).reason == "SESSION_EXPIRED"
    assert (await refusal(closed.forward(draw(rng)))).reason == "SESSION_CLOSED"
    for name, reason in (("expired", "SESSION_EXPIRED"), ("closed", "SESSION_CLOSED")):
        assert (await refusal(replicas[1].sessions.get(SessionKey(tenant, name)))).reason == reason
        refused = await refusal(replicas[1].sessions.begin_epoch(tenant, new_epoch(None, name)))
        assert refused.reason == reason
        resumed = open_on(replicas[1], tenant, name, on_exists=OnExists.MUST_EXIST)
        assert (await refusal(resumed)).reason == reason


async def test_closing_twice_is_fine_and_closing_the_unknown_is_not(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker
) -> None:
    """Close is idempotent, says whether it ended the session, and checks the expected epoch."""
    await make_model()
    client = await open_session()
    fenced = await refusal(replicas[0].sessions.close(SessionKey(tenant, "s"), client.epoch - 1))
    assert fenced.reason == "EPOCH_FENCED"
    assert await replicas[0].sessions.close(SessionKey(tenant, "s"), client.epoch)
    assert not await replicas[1].sessions.close(SessionKey(tenant, "s"), 0)
    assert (
        await refusal(replicas[0].sessions.close(SessionKey(tenant, "x"), 0))
    ).reason == "SESSION_NOT_FOUND"


async def test_a_session_begun_again_fences_writers_of_the_old_one(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker
) -> None:
    """An id used again after Close has a greater epoch, and old chunks do not answer in it."""
    await make_model()
    first = await open_session()
    xs = np.ones((ROWS, 3, INPUTS), np.float32)
    await first.forward(xs)
    await replicas[0].sessions.close(SessionKey(tenant, "s"), 0)
    second = await open_session()
    assert second.epoch > first.epoch
    assert (await refusal(first.forward(xs, chunk_seq=1))).reason == "EPOCH_FENCED"
    again = await second.forward(xs)
    assert not again.replayed


async def test_all_keys_expire_together_but_the_marker(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """When the record's time has passed nothing but the marker is left of a training session."""
    await make_model()
    client = await open_session(ttl_ms=1_000)
    for _ in range(3):
        await client.forward(draw(rng), train=True)
    present = await session_keys(raw, tenant)
    assert [key[:1] for key in present] == [b"", b"e", b"t", b"t", b"t", b"t"]
    tag = keys.session_tag(SessionKey(tenant, "s"))
    ttls = {key: await raw.pttl(tag + key) for key in present}
    assert all(0 < ttls[key] <= ttls[b""] for key in present if key != b"e")
    assert ttls[b"e"] > ttls[b""]
    await expire(raw, tenant)
    assert await session_keys(raw, tenant) == [b"e"]
    assert (await refusal(client.forward(draw(rng)))).reason == "SESSION_EXPIRED"


async def test_a_shorter_ttl_shortens_the_tapes_too(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """A session opened anew with a smaller ttl leaves no tape that outlives it."""
    await make_model()
    await (await open_session()).forward(draw(rng), train=True)
    await open_on(replicas[0], tenant, ttl_ms=5_000, on_exists=OnExists.RESET)
    tag = keys.session_tag(SessionKey(tenant, "s"))
    tapes = [key for key in await session_keys(raw, tenant) if key.startswith(b"t")]
    assert len(tapes) == 2
    ttls = [await raw.pttl(tag + key) for key in tapes]
    assert all(0 < ttl <= 5_000 for ttl in ttls)


async def test_tapes_of_an_ended_epoch_take_no_place(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """After a reset a session may keep as many tapes as a new one."""
    await make_model()
    client = await open_session()
    most = replicas[0].limits.tapes_per_session
    for _ in range(most):
        await client.forward(draw(rng), train=True)
    assert (await refusal(client.forward(draw(rng), train=True))).reason == "TAPE_QUOTA"
    view, _ = await replicas[1].sessions.begin_epoch(tenant, new_epoch())
    client.epoch, client.chunk_seq, client.token = view.epoch, 0, b""
    for _ in range(most):
        await client.forward(draw(rng), train=True)


async def test_closing_leaves_the_marker_alone(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Close removes record, index and tapes at once."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await replicas[1].sessions.close(SessionKey(tenant, "s"), 0)
    assert await session_keys(raw, tenant) == [b"e"]


async def test_a_rejected_chunk_does_not_extend_and_others_do(
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Only what succeeds lets the time to live start again: a chunk, and its replay."""
    await make_model()
    client = await open_session()
    tag = keys.session_tag(SessionKey(tenant, "s"))
    xs = draw(rng)
    await client.forward(xs)
    await raw.pexpire(tag, 60_000)
    for refused in (
        client.forward(draw(rng, rows=1)),
        client.forward(draw(rng), chunk_seq=5),
        client.forward(xs + 1, chunk_seq=1, previous_token=b""),
        client.forward(draw(rng), previous_token=b"x" * 16),
        client.forward(draw(rng), epoch=client.epoch - 1),
    ):
        await refusal(refused)
    assert await raw.pttl(tag) <= 60_000
    await client.forward(xs, chunk_seq=1, previous_token=b"")
    assert await raw.pttl(tag) > 60_000
    await raw.pexpire(tag, 60_000)
    await client.forward(draw(rng))
    assert await raw.pttl(tag) > 60_000


@pytest.mark.parametrize("extend", [True, False])
async def test_reading_the_state_extends_only_when_asked(
    replicas: Pair, tenant: str, make_model: ModelMaker, raw: Redis, *, extend: bool
) -> None:
    """GetState leaves the time to live alone by default."""
    await make_model()
    await open_on(replicas[0], tenant)
    await raw.pexpire(keys.session_tag(SessionKey(tenant, "s")), 60_000)
    await replicas[0].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=extend)
    assert (await raw.pttl(keys.session_tag(SessionKey(tenant, "s"))) > 60_000) is extend


async def test_failing_chunks_leave_the_state_alone(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Ten chunks of wrong shape, dtype or order change neither h nor chunk_seq."""
    await make_model()
    client = await open_session()
    done = await client.forward(draw(rng))
    wrong = [draw(rng, rows=1), draw(rng, dtype="float64"), draw(rng, size=INPUTS + 1)]
    wrong += [np.zeros((ROWS, 0, INPUTS), np.float32)]
    for xs in wrong * 3:
        assert (await refusal(client.forward(xs))).reason == "BAD_TENSOR"
    seen = await replicas[1].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=False)
    assert seen.session.chunk_seq == 1
    np.testing.assert_array_equal(seen.state, done.state)


async def test_set_state_and_reset_begin_epochs(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """SetState continues from what it is given, ResetState from zero; both fence the epoch before."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    given = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)
    first, _ = await replicas[1].sessions.begin_epoch(tenant, new_epoch(given))
    assert (first.epoch > client.epoch, first.chunk_seq) == (True, 0)
    state = (await replicas[0].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=False)).state
    np.testing.assert_array_equal(state, given)
    assert (await refusal(client.forward(draw(rng)))).reason == "EPOCH_FENCED"
    second, _ = await replicas[0].sessions.begin_epoch(tenant, new_epoch())
    assert second.epoch > first.epoch
    state = (await replicas[0].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=False)).state
    np.testing.assert_array_equal(state, np.zeros((ROWS, HIDDEN), np.float32))


async def test_an_epoch_begins_only_where_it_was_expected(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """An expected epoch or chunk that is not the present one is refused and changes nothing."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    sessions = replicas[1].sessions
    old = await refusal(sessions.begin_epoch(tenant, new_epoch(expected_epoch=client.epoch - 1)))
    assert (old.reason, old.metadata["epoch"]) == ("EPOCH_FENCED", str(client.epoch))
    gap = await refusal(sessions.begin_epoch(tenant, new_epoch(expected_chunk_seq=0)))
    assert (gap.reason, gap.metadata["expected_seq"]) == ("SEQ_GAP", "2")
    op = new_epoch(expected_epoch=client.epoch, expected_chunk_seq=1)
    view, _ = await sessions.begin_epoch(tenant, op)
    assert view.epoch > client.epoch


async def test_requests_are_answered_again_by_their_name(
    replicas: Pair, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """Open, SetState and Fork sent twice with one request id begin one epoch."""
    await make_model()
    first = await open_on(replicas[0], tenant, request_id="open")
    again = await open_on(replicas[1], tenant, request_id="open")
    assert (again.replayed, again.session.epoch) == (True, first.session.epoch)
    given = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)
    view, _ = await replicas[0].sessions.begin_epoch(tenant, new_epoch(given, request_id="set"))
    same, replayed = await replicas[1].sessions.begin_epoch(
        tenant, new_epoch(given, request_id="set")
    )
    assert (replayed, same.epoch) == (True, view.epoch)
    fork = ForkSession("s", "forked", None, "fork")
    forked = await replicas[0].sessions.fork(tenant, fork)
    twice = await replicas[1].sessions.fork(tenant, fork)
    assert (twice.replayed, twice.session.epoch) == (True, forked.session.epoch)


async def test_a_request_id_with_other_content_is_refused(
    replicas: Pair, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """An id used for another state, model or batch size is never answered as if it were the same."""
    await make_model()
    await open_on(replicas[0], tenant, request_id="r")
    given = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)
    for call in (
        open_on(replicas[0], tenant, initial_state=given, request_id="r"),
        open_on(replicas[0], tenant, batch_size=ROWS + 1, request_id="r"),
        replicas[0].sessions.begin_epoch(tenant, new_epoch(given, request_id="r")),
    ):
        assert (await refusal(call)).reason == "REQUEST_ID_REUSED"


async def test_a_restored_epoch_comes_back_under_its_number(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker, raw: Redis
) -> None:
    """After a loss an epoch can be begun again; never an older one, and none of tomorrow."""
    await make_model()
    client = await open_session()
    tag = keys.session_tag(SessionKey(tenant, "s"))

    async def restore(replica: Replica) -> OpenedSession:
        return await open_on(replica, tenant, on_exists=OnExists.RESET, restored_epoch=client.epoch)

    assert (await refusal(restore(replicas[0]))).reason == "EPOCH_FENCED"
    await raw.delete(tag, keys.marker_key(tag))
    back = await restore(replicas[1])
    assert back.session.epoch == client.epoch
    far = new_epoch(restored_epoch=client.epoch + 2 * 86_400_000)
    assert (await refusal(replicas[0].sessions.begin_epoch(tenant, far))).reason == "EPOCH_FENCED"


async def test_a_set_state_meets_the_session_that_it_read(
    replicas: Pair, tenant: str, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session closed and opened otherwise meanwhile keeps its own model and batch size."""
    await make_model()
    await open_on(replicas[0], tenant)
    store = replicas[0].store.sessions
    begin = store.begin_epoch

    async def overtaken(key: SessionKey, start: EpochStart) -> object:
        monkeypatch.undo()
        await replicas[1].sessions.close(key, 0)
        await open_on(replicas[1], tenant, batch_size=ROWS + 3)
        return await begin(key, start)

    monkeypatch.setattr(store, "begin_epoch", overtaken)
    view, _ = await replicas[0].sessions.begin_epoch(tenant, new_epoch())
    assert view.batch_size == ROWS + 3


async def test_a_fork_goes_its_own_way(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A fork begins at its source's state; afterwards neither moves the other."""
    await make_model()
    client = await open_session()
    done = await client.forward(draw(rng))
    forked = await replicas[1].sessions.fork(tenant, ForkSession("s", "copy", None, ""))
    np.testing.assert_array_equal(forked.state, done.state)
    assert forked.session.chunk_seq == 0
    await client.forward(draw(rng))
    seen = await replicas[0].sessions.get_state(SessionKey(tenant, "copy"), extend_ttl=False)
    np.testing.assert_array_equal(seen.state, done.state)
    taken = await refusal(replicas[0].sessions.fork(tenant, ForkSession("s", "copy", None, "")))
    assert taken.reason == "SESSION_EXISTS"


async def test_an_opening_sent_again_late_answers_with_the_state_of_now(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Open and Fork begin once; their late retry returns the session as it is by then."""
    await make_model()
    client = await open_session("s", request_id="open")
    await replicas[0].sessions.fork(tenant, ForkSession("s", "copy", None, "fork"))
    done = await client.forward(draw(rng))
    again = await open_on(replicas[1], tenant, request_id="open")
    assert (again.replayed, again.resumed, again.session.chunk_seq) == (True, False, 1)
    np.testing.assert_array_equal(again.state, done.state)
    copy = Client(
        replicas, tenant, "copy", (await replicas[0].sessions.get(SessionKey(tenant, "copy"))).epoch
    )
    moved = await copy.forward(draw(rng))
    forked = await replicas[1].sessions.fork(tenant, ForkSession("s", "copy", None, "fork"))
    assert (forked.replayed, forked.session.chunk_seq) == (True, 1)
    np.testing.assert_array_equal(forked.state, moved.state)


async def test_the_quota_lets_the_next_in_when_one_closes(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker
) -> None:
    """The session beyond the tenant's number is MAX_SESSIONS with a time to retry, until one ends."""
    await make_model()
    replica = await make_replica(Limits(sessions_per_tenant=2))
    await open_on(replica, tenant, "a")
    await open_on(replica, tenant, "b")
    full = await refusal(open_on(replica, tenant, "c"))
    assert full.reason == "MAX_SESSIONS"
    assert full.retry_after_s is not None
    await open_on(replica, tenant, "b", on_exists=OnExists.RESUME)
    await replica.sessions.close(SessionKey(tenant, "a"), 0)
    await open_on(replica, tenant, "c")


async def test_a_session_stays_listed_while_it_lives(
    replicas: Pair, tenant: str, make_model: ModelMaker, raw: Redis
) -> None:
    """Neither a failed Open with a short ttl nor many SetStates lose a session from the list."""
    await make_model()
    await open_on(replicas[0], tenant)
    listed = keys.tenant_sessions_key(tenant)
    before = await raw.zscore(listed, "s")
    await refusal(open_on(replicas[1], tenant, ttl_ms=1_000))
    after = await raw.zscore(listed, "s")
    assert before is not None
    assert after == pytest.approx(before, abs=60_000)
    await raw.zadd(listed, {"s": 1})
    await replicas[0].sessions.begin_epoch(tenant, new_epoch())
    again = await raw.zscore(listed, "s")
    assert again is not None
    assert again >= before


async def test_lists_sessions_in_pages(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker
) -> None:
    """Pages hold every live session of the tenant once, and none of another model when one is asked."""
    await make_model()
    await make_model("other")
    names = {f"s{i}" for i in range(7)}
    await asyncio.gather(*(open_on(replicas[0], tenant, name) for name in names))
    await open_session("else", "other")
    seen, token = [], ""
    while True:
        views, token = await replicas[1].sessions.list_page(tenant, 3, token, model_id="m")
        seen += [view.session_id for view in views]
        if not token:
            break
    assert sorted(seen) == sorted(names)
    assert await replicas[1].sessions.list_page(f"{tenant}x", 10, "", model_id="") == ([], "")


@pytest.mark.parametrize(
    "text", ["x", '["a", "nan"]', '["a", "1_0"]', '["a", "-1"]', '["a"]', "[1, 2]", "[" * 5000]
)
async def test_a_page_token_of_ones_own_is_refused(replicas: Pair, tenant: str, text: str) -> None:
    """What no page answered is BAD_FIELD, never a failure of the store."""
    import base64

    token = base64.urlsafe_b64encode(text.encode()).decode()
    refused = await refusal(replicas[0].sessions.list_page(tenant, 10, token, model_id=""))
    assert (refused.reason, refused.field) == ("BAD_FIELD", "page_token")


def test_server_made_ids_are_unique_and_well_formed() -> None:
    """Ten thousand ids: no two equal, each begins with a letter or digit."""
    made = [new_session_id() for _ in range(10_000)]
    assert len(set(made)) == len(made)
    assert all(name[0].isalnum() for name in made)


def test_no_character_of_a_made_id_is_likelier() -> None:
    """At each of 22 places but the first and the last, which are not free, 64 characters come equally often.

    The statistic of chi-square with 63 degrees of freedom exceeds 160 once in 10^9 draws.
    """
    made = [new_session_id() for _ in range(20_000)]
    assert {len(name) for name in made} == {22}
    for place in range(1, 21):
        counts = Counter(name[place] for name in made)
        expected = len(made) / 64
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 160
        assert len(counts) == 64


async def test_an_open_without_a_name_gets_one(
    replicas: Pair, tenant: str, make_model: ModelMaker
) -> None:
    """The name that the server made finds the session."""
    await make_model()
    opened = await open_on(replicas[0], tenant, "")
    found = await replicas[1].sessions.get(SessionKey(tenant, opened.session.session_id))
    assert found.epoch == opened.session.epoch


async def test_the_longest_names_fit(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A session and a model of 128 characters each stream and train."""
    model_id, session_id = "m" * 128, "s" * 128
    await make_model(model_id)
    client = await open_session(session_id, model_id)
    for _ in range(6):
        await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await client.update(model_id, "u")
    view = await replicas[0].sessions.get(SessionKey(tenant, session_id))
    assert (view.model_id, view.chunk_seq) == (model_id, 6)


async def test_a_state_too_large_for_a_message_is_refused_at_open(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker
) -> None:
    """A batch whose state could never be answered is BAD_FIELD."""
    await make_model()
    replica = await make_replica(Limits(message_bytes=2048))
    refused = await refusal(open_on(replica, tenant, batch_size=64))
    assert (refused.reason, refused.field) == ("BAD_FIELD", "batch_size")


async def test_sessions_of_a_deleted_model_say_so_and_can_be_closed(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A model made again under its name is another one: the old session gets MODEL_NOT_FOUND."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    await replicas[0].models.delete(ModelKey(tenant, "m"), allow_missing=False)
    assert (await refusal(client.forward(draw(rng)))).reason == "MODEL_NOT_FOUND"
    await make_model()
    for _ in replicas:
        assert (await refusal(client.forward(draw(rng)))).reason == "MODEL_NOT_FOUND"
    assert await replicas[1].sessions.close(SessionKey(tenant, "s"), 0)


async def test_tenants_do_not_see_each_other(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker
) -> None:
    """The same names under another tenant are never found, by any call."""
    await make_model()
    client = await open_session()
    other = f"{tenant}x"
    calls = [
        replicas[0].sessions.get(SessionKey(other, "s")),
        replicas[0].sessions.get_state(SessionKey(other, "s"), extend_ttl=True),
        replicas[0].sessions.begin_epoch(other, new_epoch()),
        replicas[0].sessions.fork(other, ForkSession("s", "copy", None, "")),
        replicas[0].sessions.close(SessionKey(other, "s"), 0),
        replicas[0].recurrence.forward(
            other, client.chunk(np.zeros((ROWS, 1, INPUTS), np.float32))
        ),
        replicas[0].models.get(ModelKey(other, "m")),
        replicas[0].models.delete(ModelKey(other, "m"), allow_missing=False),
        open_on(replicas[0], other),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            await call


async def test_a_reset_that_another_one_overtakes_was_made_all_the_same(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker
) -> None:
    """It is answered as it began, though the next one ended it before it could be read back."""
    await make_model()
    client = await open_session()
    begun: list[int] = []

    class Overtaken:
        """A store on which each new epoch is followed by another one at once."""

        def __getattr__(self, name: str) -> Any:
            return getattr(replicas[0].store.sessions, name)

        async def begin_epoch(self, *arguments: Any) -> Any:
            decided = await replicas[0].store.sessions.begin_epoch(*arguments)
            view, _ = await replicas[1].sessions.begin_epoch(tenant, new_epoch())
            begun.append(view.epoch)
            return decided

    replicas[0].sessions._store = Overtaken()
    view, replayed = await replicas[0].sessions.begin_epoch(tenant, new_epoch())
    assert client.epoch < view.epoch < begun[0]
    assert (view.chunk_seq, replayed) == (0, False)
    late = await refusal(client.forward(np.zeros((ROWS, 1, INPUTS), np.float32), epoch=view.epoch))
    assert late.reason == "EPOCH_FENCED"


async def test_an_expired_session_says_since_when(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker, raw: Redis
) -> None:
    """At the latest at the time that its marker says, by the store's clock."""
    await make_model()
    await open_session()
    seconds, _ = await raw.time()
    await raw.pexpire(keys.session_tag(SessionKey(tenant, "s")), 0)
    error = await refusal(replicas[0].sessions.get(SessionKey(tenant, "s")))
    assert error.reason == "SESSION_EXPIRED"
    at = datetime.fromisoformat(error.metadata["expired_at"]).timestamp()
    assert seconds <= at <= seconds + 10


async def test_two_writers_of_a_session_get_an_error_that_says_so(
    tenant: str, make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """Whatever the slower one is refused with, its message names the reason."""
    await make_model()
    client = await open_session()
    for _ in range(8):
        await client.forward(draw(rng))
    reused = await refusal(client.forward(draw(rng), chunk_seq=8, previous_token=b""))
    passed = await refusal(client.forward(draw(rng), chunk_seq=1, previous_token=b""))
    forked = await refusal(client.forward(draw(rng), previous_token=b"x" * 16))
    client.epoch -= 1
    fenced = await refusal(client.forward(draw(rng), chunk_seq=9))
    reasons = [error.reason for error in (reused, passed, forked, fenced)]
    assert reasons == ["SEQ_REUSED", "REPLAY_WINDOW_PASSED", "HISTORY_FORKED", "EPOCH_FENCED"]
    assert passed.metadata["last_seq"] == "8"
    for error in (reused, passed, forked, fenced):
        assert "another writer uses this session" in error.message


async def test_a_session_of_a_model_that_was_created_again_says_what_it_runs(
    replicas: Pair, tenant: str, make_model: ModelMaker
) -> None:
    """The name of the model alone would explain nothing: it is the one that was asked for."""
    await make_model()
    await open_on(replicas[0], tenant)
    await replicas[0].models.delete(ModelKey(tenant, "m"), allow_missing=False)
    await make_model()
    error = await refusal(open_on(replicas[0], tenant, on_exists=OnExists.RESUME))
    assert error.reason == "SESSION_MISMATCH"
    assert "before it was deleted and created again" in error.message
