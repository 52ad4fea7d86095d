"""Contributions and steps: each exactly once, from the weights of its Forward."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.replicas import (
    HIDDEN,
    ROWS,
    Client,
    draw,
    head_of,
    head_params,
    open_on,
    present,
    refusal,
    session_keys,
    step,
)
from rnn_engine import Adam, rnn_backward, rnn_forward
from service.domain.errors import DomainError
from service.domain.types import (
    DiscardGradients,
    ModelKey,
    NewEpoch,
    Selector,
    SessionKey,
    Version,
    Waiting,
    WaitingTape,
)
from service.settings import Limits
from service.store import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from instruments.replicas import Replica
    from service.domain.ports import Contribution, RecordOutcome, UpdateInputs
    from service.domain.types import Update
    from tests.domain.conftest import ClientMaker, ModelMaker, ReplicaMaker

Pair = tuple["Replica", "Replica"]
RESET = NewEpoch("s", None, 0, None, "", 0)


async def test_a_backward_sent_again_counts_once(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Its answer is the same, also after the Update consumed it; no second step can take it."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, size=HIDDEN)
    first = await client.backward(dhs, return_d_inputs=True)
    assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 1
    before = await client.backward(dhs, return_d_inputs=True)
    head = (await client.update("m", "u1")).version
    after = await client.backward(dhs, return_d_inputs=True)
    for again in (before, after):
        assert again.replayed
        np.testing.assert_array_equal(again.d_inputs, first.d_inputs)
        np.testing.assert_array_equal(again.d_state, first.d_state)
    assert (await refusal(client.update("m", "u2"))).reason == "NO_GRADIENTS"
    assert await head_of(replicas[0], tenant) == head


async def test_other_gradients_for_a_recorded_chunk_are_refused(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """Another dhs or dh_next is SEQ_REUSED, before and after the Update."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, size=HIDDEN)
    await client.backward(dhs)
    assert (await refusal(client.backward(dhs + 1))).reason == "SEQ_REUSED"
    await client.update("m", "u")
    arriving = np.ones((ROWS, HIDDEN), np.float32)
    assert (await refusal(client.backward(dhs, d_state=arriving))).reason == "SEQ_REUSED"


@pytest.mark.parametrize("is_alone", [True, False])
async def test_a_refused_step_says_that_the_contribution_is_recorded(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
    *,
    is_alone: bool,
) -> None:
    """While it waits, on the first try and again; once an Update took it, no more."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, size=HIDDEN)
    selectors = () if is_alone else (Selector("s", client.epoch, ()),)
    update = step("", "u", *selectors, expected=Version(7, bytes(16)))
    for _ in range(2):
        refused = await refusal(client.backward(dhs, update=update))
        assert (refused.reason, refused.metadata["recorded"]) == ("VERSION_CONFLICT", "true")
        assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 1
    await client.update("m", "other")
    refused = await refusal(client.backward(dhs, update=update))
    assert (refused.reason, "recorded" in refused.metadata) == ("VERSION_CONFLICT", False)


async def test_racing_backwards_count_once(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Twenty times the same Backward on two replicas: one is recorded, all get the same gradient."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    op = client.gradient(draw(rng, size=HIDDEN), return_d_inputs=True)
    made = await asyncio.gather(
        *(replicas[i % 2].backpropagation.backward(tenant, op) for i in range(20))
    )
    assert sum(not one.replayed for one in made) == 1
    assert len({present(one.d_inputs).tobytes() for one in made}) == 1


async def test_an_update_sent_again_makes_one_step(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Twenty racers with one request id: one step, one answer; other content is refused."""
    await make_model(optimizer=Adam())
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    op = step("m", "u", Selector("s", client.epoch, (1,)))
    done = await asyncio.gather(*(replicas[i % 2].updates.update(tenant, op) for i in range(20)))
    assert sum(not one.replayed for one in done) == 1
    assert {(one.version, one.gradient_norm, one.contribution_count) for one in done} == {
        (done[0].version, done[0].gradient_norm, 1)
    }
    assert done[0].version.number == 2
    other = step("m", "u", Selector("s", client.epoch, (1,)), clip_norm=1.0)
    refused = await refusal(replicas[0].updates.update(tenant, other))
    assert refused.reason == "REQUEST_ID_REUSED"


async def test_an_old_tape_uses_its_own_weights(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """After somebody else's Update a Backward is computed with the version of its Forward."""
    spec = await make_model()
    old = await head_params(replicas[0], tenant, spec)
    client, other = await open_session(), await open_session("t")
    xs, dhs = draw(rng), draw(rng, size=HIDDEN)
    first = await client.forward(xs, train=True)
    await other.forward(draw(rng), train=True)
    await other.backward(draw(rng, size=HIDDEN))
    await other.update("m", "u")
    made = await client.backward(dhs, return_d_inputs=True)
    tape = rnn_forward(old, xs, np.zeros((ROWS, HIDDEN), np.float32))
    np.testing.assert_array_equal(made.d_inputs, rnn_backward(old, tape, dhs).dxs)
    assert made.version == first.version


async def test_a_tape_whose_version_is_gone_says_so(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """VERSION_GONE, and whether the contribution was recorded before."""
    await make_model()
    limits = Limits(superseded_bytes_per_model=1)
    trainer, fresh = [await make_replica(limits) for _ in range(2)]
    client = Client([trainer], tenant, "s", (await open_on(trainer, tenant)).session.epoch)
    dhs = draw(rng, size=HIDDEN)
    await client.forward(draw(rng), train=True)
    await client.forward(draw(rng), train=True)
    await client.backward(dhs, 2)
    other = Client([trainer], tenant, "t", (await open_on(trainer, tenant, "t")).session.epoch)
    for k in range(1, 7):
        await other.forward(draw(rng), train=True)
        await other.backward(draw(rng, size=HIDDEN))
        await other.update("m", f"u{k}")
    for chunk_seq, is_recorded in ((1, "false"), (2, "true")):
        refused = await refusal(
            fresh.backpropagation.backward(tenant, client.gradient(dhs, chunk_seq))
        )
        assert refused.reason == "VERSION_GONE"
        assert refused.metadata["counted"] == is_recorded


@pytest.mark.parametrize("problem", ["infer", "discarded", "expired"])
async def test_without_a_tape_there_is_no_backward(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
    problem: str,
) -> None:
    """A chunk that ran in INFER mode, or whose tape is gone, is TAPE_MISSING and not recorded."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=problem != "infer")
    if problem == "discarded":
        op = DiscardGradients("m", (Selector("s", client.epoch, (1,)),))
        assert (await replicas[1].waiting.discard(tenant, op)).tape_count == 1
    if problem == "expired":
        for key in await session_keys(raw, tenant):
            if len(key) > 1:
                await raw.pexpireat(keys.session_tag(SessionKey(tenant, "s")) + key, 1)
    refused = await refusal(client.backward(draw(rng, size=HIDDEN)))
    assert (refused.reason, refused.metadata["counted"]) == ("TAPE_MISSING", "false")


async def test_a_tape_evicted_after_it_was_recorded_says_counted(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """A late retry of a Backward whose tape is gone learns that its contribution is recorded."""
    await make_model()
    replica = await make_replica(Limits(counted_tapes_per_session=1))
    client = Client([replica], tenant, "s", (await open_on(replica, tenant)).session.epoch)
    dhs = draw(rng, size=HIDDEN)
    for _ in range(4):
        await client.forward(draw(rng), train=True)
        await client.backward(dhs)
    refused = await refusal(client.backward(dhs, 1))
    assert (refused.reason, refused.metadata["counted"]) == ("TAPE_MISSING", "true")
    assert refused.metadata["recorded"] == "true"  # it waits: an Update may take it
    assert (await client.backward(dhs, 3)).replayed
    await client.update("m", "step", 1, 2, 3, 4)
    refused = await refusal(client.backward(dhs, 1))
    assert (refused.metadata["counted"], "recorded" in refused.metadata) == ("true", False)


async def test_a_backward_beyond_the_session_is_a_gap(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """A chunk that is not applied, as after lost writes, is SEQ_GAP and not a missing tape."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    refused = await refusal(client.backward(draw(rng, size=HIDDEN), 2, token=b"t" * 16))
    assert (refused.reason, refused.metadata["expected_seq"]) == ("SEQ_GAP", "2")


async def test_a_backward_of_another_history_is_reported(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """A token that is not its chunk's is HISTORY_FORKED; nothing is recorded."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    refused = await refusal(client.backward(draw(rng, size=HIDDEN), token=b"t" * 16))
    assert refused.reason == "HISTORY_FORKED"
    assert (await refusal(client.update("m", "u"))).reason == "NO_GRADIENTS"


async def test_an_ended_epoch_takes_only_what_is_sent_again(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """After a reset a new Backward is fenced, a recorded one replays, a resent one is recorded."""
    await make_model()
    client = await open_session()
    dhs = draw(rng, size=HIDDEN)
    await client.forward(draw(rng), train=True)
    await client.forward(draw(rng), train=True)
    await client.backward(dhs, 1)
    await replicas[0].sessions.begin_epoch(tenant, RESET)
    assert (await client.backward(dhs, 1)).replayed
    assert (await refusal(client.backward(dhs, 2))).reason == "EPOCH_FENCED"
    assert not (await client.backward(dhs, 2, resent=True)).replayed
    assert (await client.update("m", "u", 1, 2)).contribution_count == 2


@pytest.mark.parametrize("kind", ["dhs", "dtype", "dh_next"])
async def test_gradients_of_another_shape_are_refused(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator, kind: str
) -> None:
    """Dhs is the tape's (N, T, H), dh_next (N, H), both of the model's dtype."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, 2 if kind == "dhs" else 3, size=HIDDEN)
    if kind == "dtype":
        dhs = dhs.astype(np.float64)
    arriving = np.zeros((1, HIDDEN), np.float32) if kind == "dh_next" else None
    refused = await refusal(client.backward(dhs, d_state=arriving))
    assert (refused.reason, refused.field.split(".")[0]) == (
        "BAD_TENSOR",
        "dh_next" if kind == "dh_next" else "dhs",
    )


async def test_an_update_of_what_is_not_there_changes_nothing(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """NO_GRADIENTS names found and expected; the version stays."""
    await make_model()
    client = await open_session()
    head = await head_of(replicas[0], tenant)
    empty = await refusal(replicas[0].updates.update(tenant, step("m", "u0")))
    assert (empty.reason, empty.metadata["found"]) == ("NO_GRADIENTS", "0")
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    refused = await refusal(client.update("m", "u1", 1, 2))
    assert refused.reason == "NO_GRADIENTS"
    assert (refused.metadata["found"], refused.metadata["expected"]) == ("1", "2")
    assert await head_of(replicas[1], tenant) == head


async def test_an_exact_name_counts_beside_a_whole_session(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A named contribution that is missing is an error, however many others are taken with it."""
    await make_model()
    one, other = await open_session("a"), await open_session("b")
    for client, count in ((one, 1), (other, 3)):
        for _ in range(count):
            await client.forward(draw(rng), train=True)
            await client.backward(draw(rng, size=HIDDEN))
    missing = step("m", "u1", Selector("a", one.epoch, (1, 2)), Selector("b"))
    assert (await refusal(replicas[0].updates.update(tenant, missing))).reason == "NO_GRADIENTS"
    there = step("m", "u2", Selector("a", one.epoch, (1,)), Selector("b", other.epoch))
    assert (await replicas[1].updates.update(tenant, there)).contribution_count == 4


async def test_contributions_survive_a_reset_and_a_replica(
    make_replica: ReplicaMaker,
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """What was recorded waits for an Update on a replica that was not there before."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await replicas[0].sessions.begin_epoch(tenant, RESET)
    later = await make_replica()
    assert (await later.updates.update(tenant, step("m", "u"))).contribution_count == 1


async def test_the_order_of_arrival_changes_no_bit(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    rng: np.random.Generator,
) -> None:
    """The same contributions give one digest, whoever sends them in which order to which replica."""
    await make_model("a", optimizer=Adam())
    await make_model("b", optimizer=Adam())
    # One epoch for both, for the names sort by it.
    chunks = {name: (draw(rng), draw(rng, size=HIDDEN)) for name in "xyz"}
    heads = []
    for model_id, order in (("a", "xyz"), ("b", "zxy")):
        for name in order:
            opened = await open_on(replicas[0], tenant, name, model_id)
            client = Client(replicas, tenant, name, opened.session.epoch)
            await client.forward(chunks[name][0], train=True)
            await client.backward(chunks[name][1])
        await replicas[model_id == "a"].updates.update(tenant, step(model_id, "u"))
        heads.append(await head_of(replicas[0], tenant, model_id))
        for name in order:
            await replicas[0].sessions.close(SessionKey(tenant, name), 0)
    assert heads[0] == heads[1]


async def test_what_waits_of_a_session_is_listed(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Its own tapes and contributions alone, in order, older epochs' contributions too."""
    await make_model()
    other = await open_session("other")
    await other.forward(draw(rng), train=True)
    await other.backward(draw(rng, size=HIDDEN))
    client = await open_session()
    for _ in range(3):
        await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await client.backward(draw(rng, size=HIDDEN), 2)
    waiting = await replicas[0].waiting.list_waiting(SessionKey(tenant, "s"))
    assert waiting.tapes == (WaitingTape(client.epoch, 1, client.tokens[1]),)
    assert waiting.contributions == (Selector("s", client.epoch, (2, 3)),)
    await client.update("m", "u", 3)
    view, _ = await replicas[0].sessions.begin_epoch(tenant, RESET)
    later = Client(replicas, tenant, "s", view.epoch)
    await later.forward(draw(rng), train=True)
    await later.backward(draw(rng, size=HIDDEN))
    waiting = await replicas[1].waiting.list_waiting(SessionKey(tenant, "s"))
    assert waiting.tapes == ()
    named = (Selector("s", client.epoch, (2,)), Selector("s", later.epoch, (1,)))
    assert waiting.contributions == named


async def test_a_tape_whose_gradient_was_recorded_does_not_wait(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that died between the two slots left its tape as one that waits; it is not listed."""
    await make_model()
    client = await open_session()

    async def died(*_: object) -> None:
        pass

    for replica in replicas:
        monkeypatch.setattr(replica.store.sessions, "mark_tape_consumed", died)
    for _ in range(2):
        await client.forward(draw(rng), train=True)
        await client.backward(draw(rng, size=HIDDEN))
    await client.update("m", "u", 1)
    waiting = await replicas[0].waiting.list_waiting(SessionKey(tenant, "s"))
    assert waiting == Waiting((), (Selector("s", client.epoch, (2,)),))


async def test_nothing_waits_of_a_session_that_is_gone(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker, raw: Redis
) -> None:
    """Never opened, expired, closed, and of a model that was made anew: each has its own answer."""
    await make_model()
    list_waiting = replicas[0].waiting.list_waiting
    assert (await refusal(list_waiting(SessionKey(tenant, "never")))).reason == "SESSION_NOT_FOUND"
    await open_session()
    assert await list_waiting(SessionKey(tenant, "s")) == Waiting((), ())
    await replicas[0].models.delete(ModelKey(tenant, "m"), allow_missing=False)
    assert (await refusal(list_waiting(SessionKey(tenant, "s")))).reason == "MODEL_NOT_FOUND"
    await make_model()
    assert (await refusal(list_waiting(SessionKey(tenant, "s")))).reason == "MODEL_NOT_FOUND"
    await raw.pexpireat(keys.session_tag(SessionKey(tenant, "s")), 1)
    assert (await refusal(list_waiting(SessionKey(tenant, "s")))).reason == "SESSION_EXPIRED"
    await open_session()
    await replicas[0].sessions.close(SessionKey(tenant, "s"), 0)
    assert (await refusal(list_waiting(SessionKey(tenant, "s")))).reason == "SESSION_CLOSED"


async def test_discarded_contributions_cannot_come_back(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """DiscardGradients drops what is named, frees its bytes, and a late retry does not revive it."""
    await make_model()
    client = await open_session()
    dhs = draw(rng, size=HIDDEN)
    for _ in range(3):
        await client.forward(draw(rng), train=True)
        await client.backward(dhs)
    named = DiscardGradients("m", (Selector("s", client.epoch, (1, 2)),))
    assert (await replicas[0].waiting.discard(tenant, named)).contribution_count == 2
    assert (await client.backward(dhs, 1)).replayed
    assert (await replicas[1].models.get(ModelKey(tenant, "m"))).waiting_count == 1
    everything = DiscardGradients("m", ())
    assert (await replicas[1].waiting.discard(tenant, everything)).contribution_count == 1
    view = await replicas[0].models.get(ModelKey(tenant, "m"))
    assert (view.waiting_count, view.waiting_bytes) == (0, 0)


async def test_a_contribution_quota_is_an_error_and_passes(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """Beyond the model's number a Backward is TAPE_QUOTA; after an Update it is taken."""
    await make_model()
    replica = await make_replica(Limits(contributions_per_model=1))
    client = Client([replica], tenant, "s", (await open_on(replica, tenant)).session.epoch)
    dhs = draw(rng, size=HIDDEN)
    await client.forward(draw(rng), train=True)
    await client.forward(draw(rng), train=True)
    await client.backward(dhs, 1)
    assert (await refusal(client.backward(dhs, 2))).reason == "TAPE_QUOTA"
    await client.update("m", "u", 1)
    await client.backward(dhs, 2)


async def test_a_step_can_ride_on_its_backward(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """An inline Update takes the Backward's own contribution; both replay together."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, size=HIDDEN)
    await client.backward(dhs, 1)
    inline: Update = step("", "u")
    first = await client.backward(dhs, 2, update=inline)
    again = await client.backward(dhs, 2, update=inline)
    assert present(first.update).contribution_count == 1
    assert present(again.update).version == present(first.update).version
    assert (again.replayed, present(again.update).replayed) == (True, True)
    assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 1


async def test_what_was_computed_early_counts_nothing_in_a_closed_session(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """The replica has the tape cached and computes at once; the store's answer then decides."""
    await make_model()
    client = await open_session()
    client.replicas = replicas[:1]
    await client.forward(draw(rng), train=True)
    await replicas[1].sessions.close(SessionKey(tenant, "s"), 0)
    call = client.backward(draw(rng, size=HIDDEN), update=step("", "u"))
    assert (await refusal(call)).reason == "SESSION_CLOSED"
    assert (await replicas[1].models.get(ModelKey(tenant, "m"))).waiting_count == 0
    assert (await head_of(replicas[1], tenant)).number == 1


async def test_a_retry_reads_the_tape_that_was_let_go(
    replicas: Pair, make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """Once its contribution is recorded a replica does not keep a tape; the store does."""
    await make_model()
    client = await open_session()
    client.replicas = replicas[:1]
    await client.forward(draw(rng), train=True)
    assert replicas[0].caches.tapes.get(client.token) is not None
    dhs = draw(rng, size=HIDDEN)
    first = await client.backward(dhs, return_d_inputs=True)
    assert replicas[0].caches.tapes.get(client.token) is None
    again = await client.backward(dhs, return_d_inputs=True)
    assert again.replayed
    np.testing.assert_array_equal(again.d_inputs, first.d_inputs)


async def test_a_step_foreseen_from_an_older_head_is_made_again(
    make_replica: ReplicaMaker,
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A replica that has not heard of another's step builds on it all the same."""
    spec = await make_model()
    client, other = await open_session(), await open_session("t")
    client.replicas, other.replicas = [await make_replica(head_max_age_ms=60_000)], replicas[:1]
    dhs = draw(rng, size=HIDDEN)
    for each, request_id in ((client, "u1"), (other, "u2")):
        await each.forward(draw(rng), train=True)
        await each.backward(dhs, update=step("", request_id))
    before = await head_params(replicas[0], tenant, spec)
    await client.forward(draw(rng), train=True)
    made = await client.backward(dhs, return_gradients=True, update=step("", "u3"))
    assert (made.version.number, present(made.update).version.number) == (2, 4)
    after = await head_params(replicas[0], tenant, spec)
    np.testing.assert_array_equal(after.Wh, before.Wh - np.float32(0.1) * present(made.grads)[1])


async def test_a_look_that_came_before_its_count_is_taken_again(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They go in one round trip, but one of the two may have to be sent again."""
    await make_model()
    client = await open_session()
    client.replicas = replicas[:1]
    store = replicas[0].store.models

    async def read_and_record(
        key: ModelKey, contribution: Contribution, **asked: Any
    ) -> tuple[RecordOutcome, UpdateInputs | None]:
        inputs = await store.read_update_inputs(key, **asked)
        return await store.record_contribution(key, contribution), inputs

    monkeypatch.setattr(store, "record_and_read", read_and_record)
    await client.forward(draw(rng), train=True)
    made = await client.backward(draw(rng, size=HIDDEN), update=step("", "u"))
    assert present(made.update).contribution_count == 1
    assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 0


async def test_tenants_contributions_are_their_own(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Another tenant's Backward, Update and discard find neither session nor model."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    other = f"{tenant}x"
    for call in (
        replicas[0].backpropagation.backward(other, client.gradient(draw(rng, size=HIDDEN))),
        replicas[0].updates.update(other, step("m", "u")),
        replicas[0].waiting.discard(other, DiscardGradients("m", ())),
    ):
        assert (await refusal(call)).reason in ("SESSION_NOT_FOUND", "MODEL_NOT_FOUND")
    assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 1


async def test_an_update_expecting_another_head_gets_the_head_there_is(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """The number or the digest may differ; the answer names the present head."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    head = await head_of(replicas[0], tenant)
    for expected in (Version(7), Version(1, b"x" * 16)):
        refused = await refusal(client.update("m", "u", expected=expected))
        assert refused.reason == "VERSION_CONFLICT"
        assert refused.metadata["head_digest"] == head.digest.hex()
    assert (await client.update("m", "u", expected=Version(1))).version.number == 2


async def test_many_trainers_at_once_lose_and_double_nothing(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Six trainers of one model on two replicas: as many steps as Updates, each of its own chunk."""
    await make_model()
    clients = [await open_session(f"s{i}") for i in range(6)]
    chunks = [[(draw(rng), draw(rng, size=HIDDEN)) for _ in range(4)] for _ in clients]

    async def train(client: Client, own: list[tuple[np.ndarray, np.ndarray]]) -> list[Version]:
        made = []
        for xs, dhs in own:
            await client.forward(xs, train=True)
            await client.backward(dhs)
            name = f"{client.session_id}/{client.chunk_seq}"
            made.append((await client.update("m", name)).version)
        return made

    versions = await asyncio.gather(
        *(train(client, own) for client, own in zip(clients, chunks, strict=True))
    )
    numbers = sorted(version.number for one in versions for version in one)
    assert numbers == list(range(2, 26))
    view = await replicas[0].models.get(ModelKey(tenant, "m"))
    assert (view.head.number, view.waiting_count, view.waiting_bytes) == (25, 0, 0)


async def test_a_tape_quota_holds_under_a_race(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Chunks in flight beyond the waiting tapes are refused in order, and pass once a tape is used."""
    await make_model()
    client = await open_session()
    futures = [
        replicas[0].recurrence.forward(
            tenant, client.chunk(draw(rng), k, previous_token=b"", train=True)
        )
        for k in range(1, 12)
    ]
    ends = await asyncio.gather(*futures, return_exceptions=True)
    reasons = [end.reason if isinstance(end, DomainError) else "" for end in ends]
    assert reasons == [""] * 8 + ["TAPE_QUOTA", "SEQ_GAP", "SEQ_GAP"]
