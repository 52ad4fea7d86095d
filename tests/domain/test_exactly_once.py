"""A chunk is applied once, in order, whatever is sent again and whoever gets it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from instruments.chaos_store import Chaos, disturb_client
from instruments.replicas import (
    HIDDEN,
    INPUTS,
    ROWS,
    Client,
    draw,
    head_of,
    local_rnn,
    open_on,
    present,
    refusal,
    step,
)
from service.compute import scheduler as scheduler_module
from service.domain.errors import DomainError, Unavailable
from service.domain.types import NewEpoch, ReturnHs, Selector, SessionKey, Version
from service.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from instruments.replicas import Replica
    from service.compute.scheduler import Chunk
    from service.domain.types import ForwardResult
    from tests.domain.conftest import ClientMaker, ModelMaker, ReplicaMaker

Pair = tuple["Replica", "Replica"]
RESET = NewEpoch("s", None, 0, None, "", 0)


async def test_a_chunk_sent_again_gets_the_same_answer(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """Same content under the same number: same bits from another replica, replayed, nothing moves."""
    await make_model()
    client = await open_session()
    for _ in range(3):
        token, xs = client.token, draw(rng)
        first = await client.forward(xs)
        again = await client.forward(xs, chunk_seq=first.chunk_seq, previous_token=token)
        np.testing.assert_array_equal(again.outputs, first.outputs)
        np.testing.assert_array_equal(again.state, first.state)
        assert (again.token, again.version, again.replayed) == (first.token, first.version, True)


async def test_a_replay_uses_the_weights_of_the_first_time(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """After an Update a re-sent chunk is still answered with the version that applied it."""
    await make_model()
    client = await open_session()
    xs = draw(rng)
    first = await client.forward(xs, train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await client.update("m", "u")
    for replica in replicas:
        again = await replica.recurrence.forward(
            tenant, client.chunk(xs, 1, previous_token=b"", train=True)
        )
        np.testing.assert_array_equal(again.outputs, first.outputs)
        assert again.version == first.version


@pytest.mark.parametrize("change", ["xs", "mode", "shape"])
async def test_other_content_under_a_used_number_is_refused(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
    change: str,
) -> None:
    """Another input, mode or length is SEQ_REUSED and leaves the state alone."""
    await make_model()
    client = await open_session()
    xs = draw(rng)
    done = await client.forward(xs)
    other = {"xs": xs + 1, "mode": xs, "shape": xs[:, :2]}[change]
    sent = client.forward(other, chunk_seq=1, previous_token=b"", train=change == "mode")
    assert (await refusal(sent)).reason == "SEQ_REUSED"
    seen = await replicas[0].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=False)
    np.testing.assert_array_equal(seen.state, done.state)


async def test_a_hole_is_reported_with_the_number_expected(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """Chunk k+2 before k+1 is SEQ_GAP; sent in order both succeed, on both replicas."""
    await make_model()
    client = await open_session()
    for _ in range(4):
        refused = await refusal(
            client.forward(draw(rng), chunk_seq=client.chunk_seq + 2, previous_token=b"")
        )
        assert refused.reason == "SEQ_GAP"
        assert refused.metadata["expected_seq"] == str(client.chunk_seq + 1)
        await client.forward(draw(rng))


async def test_another_history_is_reported(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """A token that is not the state's is HISTORY_FORKED, for the next chunk and for a re-sent one."""
    await make_model()
    client = await open_session()
    xs = draw(rng)
    await client.forward(xs)
    for sent in (
        client.forward(xs, chunk_seq=1, previous_token=b"x" * 16),
        client.forward(draw(rng), previous_token=b"x" * 16),
        client.forward(draw(rng), previous_token=b"x" * 16),
    ):
        assert (await refusal(sent)).reason == "HISTORY_FORKED"
    await client.forward(draw(rng))


async def test_a_newer_epoch_than_stored_is_a_gap(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """An epoch that has not begun, as after lost writes, is SEQ_GAP with the present one."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    for sent in (
        client.forward(draw(rng), epoch=client.epoch + 1),
        client.backward(draw(rng, size=HIDDEN), epoch=client.epoch + 1),
    ):
        refused = await refusal(sent)
        assert (refused.reason, refused.metadata["epoch"]) == ("SEQ_GAP", str(client.epoch))


@pytest.mark.parametrize(("acknowledges", "reach"), [(False, 4), (True, 1)])
async def test_as_many_chunks_can_be_sent_again_as_the_window_says(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
    *,
    acknowledges: bool,
    reach: int,
) -> None:
    """Without acknowledgements the last W chunks replay; with them the last one, in two states."""
    await make_model()
    client = await open_session()
    sent: list[tuple[np.ndarray, ForwardResult]] = []
    for k in range(1, 9):
        xs = draw(rng)
        sent.append((xs, await client.forward(xs, acknowledged_seq=k - 1 if acknowledges else 0)))
    for k, (xs, first) in enumerate(sent, start=1):
        again = replicas[k % 2].recurrence.forward(tenant, client.chunk(xs, k, previous_token=b""))
        if k > 8 - reach:
            np.testing.assert_array_equal((await again).outputs, first.outputs)
        else:
            refused = await refusal(again)
            assert refused.reason == "REPLAY_WINDOW_PASSED"
            assert refused.metadata["applied"] == "true"


async def test_the_record_answers_one_chunk_further_without_hs(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """A chunk whose state is kept but not the state before it is answered for LAST and NONE."""
    await make_model()
    client = await open_session()
    sent = [draw(rng) for _ in range(6)]
    answers = [await client.forward(xs) for xs in sent]
    for wanted in (ReturnHs.LAST, ReturnHs.NONE):
        again = await client.forward(sent[1], chunk_seq=2, previous_token=b"", return_hs=wanted)
        np.testing.assert_array_equal(again.state, answers[1].state)
    client.chunk_seq = 6
    refused = await refusal(client.forward(sent[1], chunk_seq=2, previous_token=b""))
    assert refused.reason == "REPLAY_WINDOW_PASSED"


async def test_a_replay_whose_version_is_gone_is_answered_from_the_record(
    make_replica: ReplicaMaker,
    tenant: str,
    make_model: ModelMaker,
    rng: np.random.Generator,
) -> None:
    """LAST and NONE need no weights; ALL is REPLAY_WINDOW_PASSED, never computed with others."""
    await make_model()
    limits = Limits(superseded_bytes_per_model=1)
    trainer, fresh, behind = [await make_replica(limits) for _ in range(3)]
    opened = await open_on(trainer, tenant)
    client = Client([trainer], tenant, "s", opened.session.epoch)
    await client.forward(draw(rng))
    behind.caches.sessions.put(
        SessionKey(tenant, "s"), present(trainer.caches.sessions.get(SessionKey(tenant, "s")))
    )
    xs = draw(rng)
    first = await client.forward(xs)
    other = Client([trainer], tenant, "t", (await open_on(trainer, tenant, "t")).session.epoch)
    for k in range(1, 7):
        await other.forward(draw(rng), train=True)
        await other.backward(draw(rng, size=HIDDEN))
        await other.update("m", f"u{k}")
    for replica in (fresh, behind):
        again = await replica.recurrence.forward(
            tenant,
            client.chunk(xs, 2, previous_token=b"", return_hs=ReturnHs.LAST, pinned=first.version),
        )
        np.testing.assert_array_equal(again.state, first.state)
        assert (again.version, again.replayed) == (first.version, True)
    refused = await refusal(
        fresh.recurrence.forward(tenant, client.chunk(xs, 2, previous_token=b""))
    )
    assert refused.reason == "REPLAY_WINDOW_PASSED"


async def test_a_replay_that_names_another_version_is_reported(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A chunk that was applied with other weights than its sender pins is another history."""
    await make_model()
    client = await open_session()
    xs = draw(rng)
    first = await client.forward(xs)
    same = await client.forward(xs, chunk_seq=1, previous_token=b"", pinned=first.version)
    assert same.replayed
    pinned = Version(first.version.number, b"other content..!")
    refused = await refusal(client.forward(xs, chunk_seq=1, previous_token=b"", pinned=pinned))
    assert refused.reason == "HISTORY_FORKED"


async def test_twenty_racers_commit_once(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """The same chunk sent twenty times at once to two replicas: one applies, all get its answer."""
    await make_model()
    client = await open_session()
    for _ in range(5):
        op = client.chunk(draw(rng))
        answers = await asyncio.gather(
            *(replicas[i % 2].recurrence.forward(tenant, op) for i in range(20))
        )
        assert sum(not answer.replayed for answer in answers) == 1
        assert len({(answer.token, answer.state.tobytes()) for answer in answers}) == 1
        for answer in answers:
            np.testing.assert_allclose(
                present(answer.outputs), present(answers[0].outputs), rtol=1e-6
            )
        client.chunk_seq, client.token = op.chunk_seq, answers[0].token


async def test_racers_with_different_content_commit_one(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Of different chunks under one number one is applied and the others are SEQ_REUSED."""
    await make_model()
    client = await open_session()
    ends = await asyncio.gather(
        *(replicas[i % 2].recurrence.forward(tenant, client.chunk(draw(rng))) for i in range(10)),
        return_exceptions=True,
    )
    reasons = Counter(end.reason if isinstance(end, DomainError) else "OK" for end in ends)
    assert reasons == {"OK": 1, "SEQ_REUSED": 9}


async def test_a_chunk_and_a_reset_that_race_do_not_mix(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """With the same expected chunk exactly one of Forward and Reset wins."""
    await make_model()
    for trial in range(10):
        client = await open_session(f"s{trial}")
        reset = replace(
            RESET, session_id=f"s{trial}", expected_epoch=client.epoch, expected_chunk_seq=0
        )
        calls = [
            replicas[0].recurrence.forward(tenant, client.chunk(draw(rng))),
            replicas[1].sessions.begin_epoch(tenant, reset),
        ]
        ends = await asyncio.gather(*calls[:: 1 if trial % 2 else -1], return_exceptions=True)
        lost = [end for end in ends if isinstance(end, DomainError)]
        assert len(lost) == 1
        assert lost[0].reason in ("EPOCH_FENCED", "SEQ_GAP")


async def test_a_chunk_and_a_close_that_race_end_well(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A chunk in flight at Close commits or is SESSION_CLOSED; afterwards the session is closed."""
    await make_model()
    for trial in range(10):
        client = await open_session(f"s{trial}")
        await client.forward(draw(rng))
        calls = [
            replicas[0].recurrence.forward(tenant, client.chunk(draw(rng))),
            replicas[1].sessions.close(SessionKey(tenant, f"s{trial}"), 0),
        ]
        ends = await asyncio.gather(*calls[:: 1 if trial % 2 else -1], return_exceptions=True)
        assert {end.reason for end in ends if isinstance(end, DomainError)} <= {"SESSION_CLOSED"}
        assert (await refusal(client.forward(draw(rng)))).reason == "SESSION_CLOSED"


async def test_a_commit_whose_reply_is_lost_is_answered_as_a_replay(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """Over a client that fails before or after its calls every chunk is applied exactly once."""
    spec = await make_model()
    chaos = [Chaos(seed=seed) for seed in (1, 2)]
    pair = [
        await make_replica(disturb=lambda client, dice=dice: disturb_client(client, dice))
        for dice in chaos
    ]
    calm = await make_replica()
    opened = await open_on(calm, tenant)
    client, local = (
        Client(pair, tenant, "s", opened.session.epoch),
        await local_rnn(calm, tenant, spec),
    )
    replayed = 0
    for _ in range(40):
        xs = draw(rng)
        while True:
            try:
                done = await client.forward(xs)
            except Unavailable:
                continue
            break
        replayed += done.replayed
        np.testing.assert_allclose(present(done.outputs), local.forward(xs), rtol=1e-5, atol=1e-6)
    assert client.chunk_seq == 40
    assert replayed > 0
    assert all(dice.fault_count > 0 for dice in chaos)


async def test_training_over_a_failing_client_makes_each_step_once(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """Retried through failures, ten steps end at the digest of an undisturbed run."""
    await make_model("calm")
    await make_model("rough")
    chaos = [Chaos(seed=seed) for seed in (3, 4)]
    rough = [
        await make_replica(disturb=lambda client, dice=dice: disturb_client(client, dice))
        for dice in chaos
    ]
    calm = await make_replica()
    chunks = [(draw(rng), draw(rng, size=HIDDEN)) for _ in range(10)]
    ends = {}
    for model_id, pair in (("calm", [calm]), ("rough", rough)):
        opened = await open_on(calm, tenant, model_id, model_id)
        client = Client(pair, tenant, model_id, opened.session.epoch)
        version = await head_of(calm, tenant, model_id)
        for k, (xs, dhs) in enumerate(chunks, start=1):
            version = await one_step(client, model_id, k, xs, dhs, version)
        ends[model_id] = await head_of(calm, tenant, model_id)
    assert ends["calm"] == ends["rough"]
    assert all(dice.fault_count > 0 for dice in chaos)


async def one_step(
    client: Client, model_id: str, k: int, xs: np.ndarray, dhs: np.ndarray, version: Version
) -> Version:
    """Make one training step, each call again until it is answered."""
    while client.chunk_seq < k:
        try:
            await client.forward(xs, train=True, minimum=version)
        except Unavailable:
            continue
    while True:
        try:
            await client.backward(dhs)
            return (await client.update(model_id, f"u{k}", expected=version)).version
        except Unavailable:
            continue


async def test_a_callers_cancellation_stops_no_commit(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """A cancelled caller's chunk is applied or not, as a whole, and the next call works."""
    await make_model()
    client = await open_session()
    for yields in range(12):
        xs = draw(rng)
        caller = asyncio.create_task(replicas[0].recurrence.forward(tenant, client.chunk(xs)))
        for _ in range(yields):
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        done = await client.forward(xs)
        assert done.chunk_seq == yields + 1


async def test_chunks_of_a_session_are_applied_in_the_order_they_came(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Chunks sent without waiting, for ten sessions interleaved, are each session's in order."""
    spec = await make_model()
    clients = [await open_session(f"s{i}") for i in range(10)]
    chunks = [[draw(rng) for _ in range(3)] for _ in clients]
    futures = [
        replicas[0].recurrence.forward(
            tenant, client.chunk(chunks[i][k], k + 1, previous_token=b"")
        )
        for k in range(3)
        for i, client in enumerate(clients)
    ]
    answers = await asyncio.gather(*futures)
    for i in range(10):
        local = await local_rnn(replicas[0], tenant, spec)
        for k in range(3):
            here = local.forward(chunks[i][k])
            np.testing.assert_allclose(
                present(answers[k * 10 + i].outputs), here, rtol=1e-5, atol=1e-6
            )


async def test_who_fails_at_its_answer_stops_nobody(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """The bug is reported to the event loop; the rest of the batch and the session's next chunk go on."""
    await make_model()
    clients = [await open_session(name) for name in "ab"]
    bugs: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: bugs.append(context["exception"])
    )
    bug = ZeroDivisionError()

    def broken(_outcome: object) -> None:
        raise bug

    recurrence = replicas[0].recurrence
    recurrence.begin_forward(tenant, clients[0].chunk(draw(rng), 1, previous_token=b""), broken)
    answers = await asyncio.gather(
        *(
            recurrence.forward(tenant, client.chunk(draw(rng), seq, previous_token=b""))
            for client, seq in zip(clients, (2, 1), strict=True)
        )
    )
    assert [answer.chunk_seq for answer in answers] == [2, 1]
    assert bugs == [bug]


async def test_chunks_of_one_session_never_share_a_batch(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each needs the state after the one before; other sessions' chunks go with it."""
    await make_model()
    clients = [await open_session(name) for name in "abc"]
    owners = {}
    futures = []
    for k in range(1, 6):
        for client in clients:
            xs = draw(rng)
            owners[id(xs)] = client.session_id
            op = client.chunk(xs, k, previous_token=b"")
            futures.append(replicas[0].recurrence.forward(tenant, op))
    batches = []
    compute = scheduler_module._compute

    def watched(batch: Sequence[Chunk]) -> None:
        batches.append([owners[id(chunk.inputs)] for chunk in batch])
        compute(batch)

    monkeypatch.setattr(scheduler_module, "_compute", watched)
    await asyncio.gather(*futures)
    assert all(len(set(batch)) == len(batch) for batch in batches)
    assert sum(map(len, batches)) == 15
    assert max(map(len, batches)) > 1


async def test_a_refused_chunk_in_flight_does_not_stop_those_behind_it(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Refused chunks that queue for one session are each refused, and the good one behind them is applied."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    wrong, right = client.chunk(draw(rng, rows=1)), client.chunk(draw(rng))
    futures = [replicas[1].recurrence.forward(tenant, right)]
    futures += [replicas[0].recurrence.forward(tenant, wrong) for _ in range(200)]
    futures.append(replicas[0].recurrence.forward(tenant, right))
    first, *refused, last = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(end, DomainError) and end.reason == "BAD_TENSOR" for end in refused)
    assert not isinstance(first, BaseException)
    assert not isinstance(last, BaseException)
    assert {first.replayed, last.replayed} == {True, False}


async def test_a_queue_of_refused_chunks_does_not_recurse(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """On the replica that has the session cached a long queue of refusals ends one by one."""
    await make_model()
    client = await open_session()
    client.replicas = replicas[:1]
    await client.forward(draw(rng))
    wrong = client.chunk(draw(rng, rows=1))
    futures = [replicas[0].recurrence.forward(tenant, wrong) for _ in range(3000)]
    ends = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(end, DomainError) and end.reason == "BAD_TENSOR" for end in ends)
    await replicas[0].recurrence.drain()


async def test_a_cached_state_does_not_keep_a_chunks_outputs(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """What a replica holds of a session is its state, not the buffer of hs that it was cut from."""
    await make_model()
    client = await open_session(batch_size=1)
    client.replicas = replicas[:1]
    await client.forward(draw(rng, 100, rows=1))
    assert present(replicas[0].caches.sessions.get(SessionKey(tenant, "s"))).state.base is None


@pytest.mark.parametrize("wanted", list(ReturnHs))
async def test_a_chunk_whose_outputs_would_not_fit_is_refused(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, wanted: ReturnHs
) -> None:
    """All of hs counts against a message, whatever of it is returned: it has to be computed."""
    await make_model()
    replica = await make_replica(Limits(message_bytes=4096))
    opened = await open_on(replica, tenant)
    client = Client([replica], tenant, "s", opened.session.epoch)
    xs = np.zeros((ROWS, 4096 // (ROWS * HIDDEN * 4), INPUTS), np.float32)
    refused = await refusal(client.forward(xs, return_hs=wanted))
    assert refused.reason == "MESSAGE_TOO_LARGE"


async def test_a_version_that_is_not_the_head_any_more_can_be_pinned(
    make_model: ModelMaker, open_session: ClientMaker, rng: np.random.Generator
) -> None:
    """A pinned version is used; one that never was is VERSION_GONE; another digest is forked."""
    await make_model()
    client = await open_session()
    first = await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    newer = (await client.update("m", "u")).version
    pinned = await client.forward(draw(rng), pinned=first.version)
    assert pinned.version == first.version
    assert (await client.forward(draw(rng), pinned=Version(2))).version == newer
    gone = await refusal(client.forward(draw(rng), pinned=Version(9)))
    assert gone.reason == "VERSION_GONE"
    forked = await refusal(client.forward(draw(rng), pinned=Version(1, b"x" * 16)))
    assert forked.reason == "WEIGHTS_FORKED"


async def test_a_minimum_version_is_never_undercut(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """A replica with an older head asks again; a head that does not reach the minimum is an error."""
    await make_model()
    now = [0.0]
    replica = await make_replica(head_max_age_ms=50, clock=lambda: now[0])
    trainer = await make_replica()
    client = Client([replica], tenant, "s", (await open_on(replica, tenant)).session.epoch)
    old = (await client.forward(draw(rng))).version
    other = Client([trainer], tenant, "t", (await open_on(trainer, tenant, "t")).session.epoch)
    await other.forward(draw(rng), train=True)
    await other.backward(draw(rng, size=HIDDEN))
    new = (await other.update("m", "u")).version
    assert (await client.forward(draw(rng))).version == old
    assert (await client.forward(draw(rng), minimum=new)).version == new
    gone = await refusal(client.forward(draw(rng), minimum=Version(3)))
    assert gone.reason == "VERSION_GONE"
    forked = await refusal(client.forward(draw(rng), minimum=Version(2, b"x" * 16)))
    assert forked.reason == "WEIGHTS_FORKED"


async def test_a_head_is_served_no_longer_than_its_age(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, rng: np.random.Generator
) -> None:
    """After head_max_age a replica asks the store, by a clock that only it sees."""
    await make_model()
    now = [0.0]
    replica = await make_replica(head_max_age_ms=50, clock=lambda: now[0])
    trainer = await make_replica()
    client = Client([replica], tenant, "s", (await open_on(replica, tenant)).session.epoch)
    await client.forward(draw(rng))
    other = Client([trainer], tenant, "t", (await open_on(trainer, tenant, "t")).session.epoch)
    await other.forward(draw(rng), train=True)
    await other.backward(draw(rng, size=HIDDEN))
    new = (await other.update("m", "u")).version
    now[0] = 0.051
    assert (await client.forward(draw(rng))).version == new


async def test_updates_from_one_head_conflict(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Of two trainers that expect the same head one makes the step, the other gets a conflict."""
    await make_model()
    head = await head_of(replicas[0], tenant)
    clients = [await open_session(name) for name in "ab"]
    for client in clients:
        await client.forward(draw(rng), train=True)
        await client.backward(draw(rng, size=HIDDEN))
    ends = await asyncio.gather(
        *(
            replica.updates.update(
                tenant,
                step("m", name, Selector(name, client.epoch, (1,)), expected=head),
            )
            for replica, client, name in zip(replicas, clients, "ab", strict=True)
        ),
        return_exceptions=True,
    )
    lost = [end for end in ends if isinstance(end, DomainError)]
    assert [end.reason for end in lost] == ["VERSION_CONFLICT"]
    assert lost[0].metadata["head"] == "2"


async def test_sessions_with_distinct_data_stay_apart(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:
    """Sessions batched together get exactly the tokens and states that they get alone."""
    spec = await make_model()
    data = {f"s{i}": [np.full((ROWS, 2, INPUTS), i + k, np.float32) for k in range(5)]
            for i in range(8)}  # fmt: skip
    clients = [await open_session(name) for name in data]

    async def run(client: Client) -> list[ForwardResult]:
        return [await client.forward(xs) for xs in data[client.session_id]]

    answers = await asyncio.gather(*(run(client) for client in clients))
    for client, got in zip(clients, answers, strict=True):
        local = await local_rnn(replicas[0], tenant, spec)
        for xs, answer in zip(data[client.session_id], got, strict=True):
            np.testing.assert_allclose(
                present(answer.outputs), local.forward(xs), rtol=1e-5, atol=1e-6
            )
