"""A store that lost acknowledged writes is noticed, never continued as if nothing had been lost.

A failover is a slot put back to an earlier copy of itself, each slot on its own; the replicas keep what
they have cached.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.replicas import (
    HIDDEN,
    INPUTS,
    ROWS,
    Backup,
    Client,
    draw,
    head_of,
    head_params,
    open_on,
    present,
    refusal,
    step,
)
from rnn_engine import Adam, rnn_forward
from service.domain.errors import DomainError
from service.domain.types import ModelKey, NewEpoch, OnExists, Selector, SessionKey
from service.store import keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

    from instruments.replicas import Replica
    from rnn_engine import Array
    from service.domain.ports import Bytes
    from service.domain.types import Version
    from tests.domain.conftest import ClientMaker, ModelMaker, ReplicaMaker

Pair = tuple["Replica", "Replica"]
LOSS = {
    "SEQ_GAP",
    "VERSION_GONE",
    "WEIGHTS_FORKED",
    "NO_GRADIENTS",
    "VERSION_CONFLICT",
}


def session_slot(tenant: str, session_id: str = "s") -> bytes:
    """Return what the keys of a session begin with."""
    return keys.session_tag(SessionKey(tenant, session_id))


async def test_lost_chunks_are_reported_and_applied_again(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """The next chunk is SEQ_GAP on each replica; sent again in order all gets the bits it had."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    backup = await Backup.take(raw, session_slot(tenant))
    lost = [draw(rng) for _ in range(3)]
    before = [await client.forward(xs) for xs in lost]
    await backup.restore(raw)
    for replica in replicas:
        gap = await refusal(replica.recurrence.forward(tenant, client.chunk(draw(rng))))
        assert (gap.reason, gap.metadata["expected_seq"]) == ("SEQ_GAP", "2")
    client.chunk_seq, client.token = 1, client.tokens[1]
    for xs, first in zip(lost, before, strict=True):
        again = await client.forward(xs, pinned=first.version)
        assert (again.token, again.replayed) == (first.token, False)
        np.testing.assert_array_equal(again.state, first.state)


async def test_a_rival_in_the_lost_range_is_reported(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Who comes back after another writer used the gap gets HISTORY_FORKED or SEQ_REUSED."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    backup = await Backup.take(raw, session_slot(tenant))
    mine = draw(rng)
    await client.forward(mine)
    await backup.restore(raw)
    rival = Client(replicas, tenant, "s", client.epoch, 1)
    await rival.forward(draw(rng))
    for _ in replicas:
        assert (await refusal(client.forward(draw(rng)))).reason == "HISTORY_FORKED"
        replayed = client.forward(mine, chunk_seq=2, previous_token=client.tokens[1])
        assert (await refusal(replayed)).reason == "SEQ_REUSED"
    await rival.forward(draw(rng))


async def test_a_gradient_never_belongs_to_a_rivals_chunk(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """A Backward whose tape was replaced by another writer's is HISTORY_FORKED."""
    await make_model()
    client = await open_session()
    backup = await Backup.take(raw, session_slot(tenant))
    await client.forward(draw(rng), train=True)
    await backup.restore(raw)
    await Client(replicas, tenant, "s", client.epoch).forward(draw(rng), train=True)
    for _ in replicas:
        refused = await refusal(client.backward(draw(rng, size=HIDDEN)))
        assert refused.reason == "HISTORY_FORKED"


async def test_a_lost_chunks_backward_is_a_gap_and_heals(
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Backward of a lost Forward is SEQ_GAP; after the Forward again it gives the same gradient."""
    await make_model()
    client = await open_session()
    backup = await Backup.take(raw, session_slot(tenant))
    xs, dhs = draw(rng), draw(rng, size=HIDDEN)
    first = await client.forward(xs, train=True)
    made = await client.backward(dhs, return_d_inputs=True)
    await backup.restore(raw)
    assert (await refusal(client.backward(dhs))).reason == "SEQ_GAP"
    await client.forward(xs, chunk_seq=1, previous_token=b"", train=True, pinned=first.version)
    again = await client.backward(dhs, return_d_inputs=True)
    np.testing.assert_array_equal(again.d_inputs, made.d_inputs)
    assert again.replayed


async def test_a_lost_epoch_is_reported_and_begun_again(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """A chunk of an epoch whose beginning was lost is SEQ_GAP; restored, it has its tokens again."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng))
    backup = await Backup.take(raw, session_slot(tenant))
    given = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32)
    view, _ = await replicas[0].sessions.begin_epoch(
        tenant, NewEpoch("s", given, 0, None, "set", 0)
    )
    moved = Client(replicas, tenant, "s", view.epoch)
    xs = draw(rng)
    first = await moved.forward(xs)
    await backup.restore(raw)
    gap = await refusal(moved.forward(draw(rng)))
    assert (gap.reason, gap.metadata["epoch"]) == ("SEQ_GAP", str(client.epoch))
    again, _ = await replicas[1].sessions.begin_epoch(
        tenant, NewEpoch("s", given, 0, None, "set", view.epoch)
    )
    assert again.epoch == view.epoch
    assert (await moved.forward(xs, chunk_seq=1, previous_token=b"")).token == first.token


async def test_a_session_lost_whole_is_not_found_and_restored(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """A session rolled back to before its Open comes back under its epoch."""
    await make_model()
    backup = await Backup.take(raw, session_slot(tenant))
    opened = await open_on(replicas[0], tenant)
    client = Client(replicas, tenant, "s", opened.session.epoch)
    xs = draw(rng)
    first = await client.forward(xs)
    await backup.restore(raw)
    assert (await refusal(client.forward(draw(rng)))).reason == "SESSION_NOT_FOUND"
    await open_on(replicas[1], tenant, on_exists=OnExists.RESET, restored_epoch=client.epoch)
    assert (await client.forward(xs, chunk_seq=1, previous_token=b"")).token == first.token


async def test_a_lost_step_made_again_has_the_digest_it_had(
    make_replica: ReplicaMaker,
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Until it is made again its version is VERSION_GONE; then the tapes made with it are good."""
    await make_model(optimizer=Adam())
    client = await open_session()
    head = await head_of(replicas[0], tenant)
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, size=HIDDEN)
    await client.backward(dhs)
    backup = await Backup.take(raw, keys.model_tag(ModelKey(tenant, "m")))
    made = await client.update("m", "u", expected=head)
    await client.forward(draw(rng), train=True, minimum=made.version)
    await backup.restore(raw)
    assert (await refusal(client.forward(draw(rng), minimum=made.version))).reason == (
        "VERSION_GONE"
    )
    fresh = await make_replica()
    gone = await refusal(fresh.backpropagation.backward(tenant, client.gradient(dhs)))
    assert gone.reason == "VERSION_GONE"
    again = await client.update("m", "u", 1, expected=head)
    assert (again.version, again.replayed) == (made.version, False)
    await fresh.backpropagation.backward(tenant, client.gradient(dhs))


async def test_another_version_under_a_number_is_never_taken_for_it(
    make_replica: ReplicaMaker,
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Minimum, pinned and tape versions are recognized by their digest: WEIGHTS_FORKED."""
    await make_model()
    client, rival = await open_session(), await open_session("rival")
    for one in (client, rival):
        await one.forward(draw(rng), train=True)
        await one.backward(draw(rng, size=HIDDEN))
    backup = await Backup.take(raw, keys.model_tag(ModelKey(tenant, "m")))
    lost = (await client.update("m", "mine")).version
    await client.forward(draw(rng), train=True, minimum=lost)
    await backup.restore(raw)
    other = (await rival.update("m", "theirs")).version
    assert (other.number, other.digest != lost.digest) == (lost.number, True)
    fresh = await make_replica()
    client.replicas = [fresh]
    dhs = draw(rng, size=HIDDEN)
    for call in (
        client.forward(draw(rng), minimum=lost),
        client.forward(draw(rng), pinned=lost),
        client.backward(dhs),
    ):
        assert (await refusal(call)).reason == "WEIGHTS_FORKED"
    assert (await refusal(client.update("m", "next", 2, expected=lost))).reason == (
        "VERSION_CONFLICT"
    )


async def test_lost_contributions_are_reported_and_recorded_again(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """An Update of lost contributions is NO_GRADIENTS; resent, even over a reset, they count once."""
    await make_model()
    client = await open_session()
    backup = await Backup.take(raw, keys.model_tag(ModelKey(tenant, "m")))
    await client.forward(draw(rng), train=True)
    dhs = draw(rng, size=HIDDEN)
    await client.backward(dhs)
    await replicas[0].sessions.begin_epoch(tenant, NewEpoch("s", None, 0, None, "", 0))
    await backup.restore(raw)
    op = step("m", "u", Selector("s", client.epoch, (1,)))
    assert (await refusal(replicas[1].updates.update(tenant, op))).reason == "NO_GRADIENTS"
    assert not (await client.backward(dhs, resent=True)).replayed
    assert (await client.backward(dhs, resent=True)).replayed
    assert (await replicas[1].updates.update(tenant, op)).contribution_count == 1


async def test_a_head_that_vanishes_under_a_chunk_still_answers_its_minimum(
    make_replica: ReplicaMaker,
    tenant: str,
    make_model: ModelMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """A replica whose head is gone reads again, and does not fall below what was asked for."""
    await make_model()
    now = [0.0]
    replica, trainer = (
        await make_replica(head_max_age_ms=50, clock=lambda: now[0]),
        (await make_replica()),
    )
    client = Client([replica], tenant, "s", (await open_on(replica, tenant)).session.epoch)
    backup = await Backup.take(raw, keys.model_tag(ModelKey(tenant, "m")))
    other = Client([trainer], tenant, "t", (await open_on(trainer, tenant, "t")).session.epoch)
    await other.forward(draw(rng), train=True)
    await other.backward(draw(rng, size=HIDDEN))
    newer = (await other.update("m", "u")).version
    now[0] = 1.0
    await replica.caches.models.get(ModelKey(tenant, "m"))  # the head is known, its weights are not
    await backup.restore(raw)
    refused = await refusal(client.forward(draw(rng), minimum=newer))
    assert refused.reason == "VERSION_GONE"
    assert (await client.forward(draw(rng))).version.number == 1


@pytest.mark.parametrize("seed", range(3))
async def test_no_rollback_ever_brings_a_wrong_number(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    seed: int,
) -> None:
    """Whatever is rolled back under two replicas' caches, an answer follows from its token's state."""
    rng = np.random.default_rng(seed)
    spec = await make_model()
    params = await head_params(replicas[0], tenant, spec)
    client = await open_session()
    states = {b"": np.zeros((ROWS, HIDDEN), np.float32)}
    inputs = [draw(rng, 2) for _ in range(3)]
    backups, reasons, backtracked = [await Backup.take(raw, session_slot(tenant))], set(), 0
    chain = [b""]  # the tokens that this client was given, in order
    for _ in range(120):
        if rng.random() < 0.15:
            backups.append(await Backup.take(raw, session_slot(tenant)))
        if rng.random() < 0.15:
            await backups[rng.integers(len(backups))].restore(raw)
        place = int(rng.integers(max(0, len(chain) - 3), len(chain)))
        xs, before = inputs[rng.integers(3)], chain[place]
        op = client.chunk(xs, place + 1, previous_token=before)
        try:
            done = await replicas[rng.integers(2)].recurrence.forward(tenant, op)
        except DomainError as error:
            reasons.add(error.reason)
            if rng.random() < 0.5 and len(chain) > 1:
                chain.pop()
            continue
        follows = rnn_forward(params, xs, states[before])
        if before or place == 0:
            np.testing.assert_allclose(present(done.outputs), follows.hs, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                done.state, states.setdefault(done.token, done.state), rtol=1e-5, atol=1e-6
            )
        backtracked += place < len(chain) - 1
        chain = [*chain[: place + 1], done.token]
    assert reasons <= {"SEQ_GAP", "HISTORY_FORKED", "SEQ_REUSED", "REPLAY_WINDOW_PASSED"}
    assert "SEQ_GAP" in reasons
    assert backtracked > 0


@dataclass
class Trainer:
    """A client that keeps a log and sends it again, in order, on a sign of loss."""

    client: Client
    model_id: str
    version: Version
    log: list[Callable[[], Awaitable[object]]] = field(default_factory=list)
    versions: dict[int, Version] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)

    async def train(self, k: int, xs: Array, dhs: Array) -> None:
        """Make one step: Forward, Backward, Update."""
        base, client, token = self.version, self.client, self.client.tokens.get(k - 1, b"")

        async def forward() -> None:
            pinned = self.versions.get(k)
            done = await client.forward(
                xs,
                chunk_seq=k,
                previous_token=token,
                train=True,
                pinned=pinned,
                minimum=None if pinned else base,
            )
            assert self.versions.setdefault(k, done.version) == done.version

        async def backward() -> None:
            await client.backward(dhs, k, resent=True)

        async def update() -> None:
            done = await client.update(self.model_id, f"u{k}", k, expected=base)
            assert self.versions.setdefault(-k, done.version) == done.version
            self.version = done.version

        for operation in (forward, backward, update):
            self.log.append(operation)
            await self._carry_out(operation)

    async def _carry_out(self, operation: Callable[[], Awaitable[object]]) -> None:
        for _ in range(40):
            if await self._answered(operation):
                return
            for logged in self.log:
                if logged is operation or not await self._answered(logged):
                    break
        raise AssertionError("never answered")

    async def _answered(self, operation: Callable[[], Awaitable[object]]) -> bool:
        try:
            await operation()
        except DomainError as error:
            if error.reason == "REPLAY_WINDOW_PASSED":  # it was applied long ago
                return True
            if error.metadata.get("counted") == "true":
                return True
            if error.reason not in LOSS:
                raise
            self.reasons.add(error.reason)
            return False
        return True


@pytest.mark.parametrize("seed", range(4))
async def test_a_trainer_with_a_log_ends_where_an_undisturbed_one_does(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    seed: int,
) -> None:
    """Whichever slot is rolled back, and when, the final version is the same, digest for digest."""
    rng = np.random.default_rng(seed)
    chunks = [(draw(rng), draw(rng, size=HIDDEN)) for _ in range(8)]
    trainers = []
    for name in ("calm", "rough"):
        await make_model(name, optimizer=Adam())
        client = await open_session(name, name)
        trainers.append(Trainer(client, name, await head_of(replicas[0], tenant, name)))
    slots = [
        keys.session_tag(SessionKey(tenant, "rough")),
        keys.model_tag(ModelKey(tenant, "rough")),
    ]
    backups = {slot: [await Backup.take(raw, slot)] for slot in slots}
    for k, (xs, dhs) in enumerate(chunks, start=1):
        await trainers[0].train(k, xs, dhs)
        await trainers[1].train(k, xs, dhs)
        for slot in slots:
            if rng.random() < 0.5:
                await backups[slot][rng.integers(max(0, k - 4), len(backups[slot]))].restore(raw)
            backups[slot].append(await Backup.take(raw, slot))
    last = np.zeros((ROWS, 1, INPUTS), np.float32)
    for trainer in trainers:
        await trainer.train(9, last, np.ones((ROWS, 1, HIDDEN), np.float32))
    calm, rough = [await head_of(replicas[0], tenant, name) for name in ("calm", "rough")]
    assert calm == rough
    assert (trainers[0].reasons, bool(trainers[1].reasons)) == (set(), True)


async def test_a_step_never_starts_an_optimizer_anew_that_has_moments(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two masters for a while: the head is of the one, its moments are asked of the other, further on."""
    await make_model(optimizer=Adam())
    client = await open_session()
    for request in ("u1", "u2"):
        await client.forward(draw(rng), train=True)
        await client.backward(draw(rng, size=HIDDEN))
        if request == "u1":
            await client.update("m", request)
    backup = await Backup.take(raw, keys.model_tag(ModelKey(tenant, "m")))
    named = Selector("s", client.epoch, (2,))
    made = await replicas[0].updates.update(tenant, step("m", "u2", named))
    ahead = await Backup.take(raw, keys.model_tag(ModelKey(tenant, "m")))
    await backup.restore(raw)
    models = replicas[1].store.models
    read = models.read_moments

    async def read_ahead(*which: Any) -> Bytes | None:
        monkeypatch.undo()
        await ahead.restore(raw)
        found = await read(*which)
        await backup.restore(raw)
        return found

    monkeypatch.setattr(models, "read_moments", read_ahead)
    replicas[1].caches.models.forget(ModelKey(tenant, "m"))
    again = await replicas[1].updates.update(tenant, step("m", "u2", named))
    assert (again.version, again.replayed) == (made.version, False)
