"""Model scripts: versions, publications, contributions, requests, blobs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from instruments.replicas import patient
from service.domain.blob import Blob
from service.domain.digests import contribution_key
from service.domain.ports import (
    CheckpointOutcome,
    Contribution,
    ContributionState,
    CreateOutcome,
    NewModel,
    NewVersion,
    Publication,
    PublishOutcome,
    RecordOutcome,
    StepAnswer,
    WaitingContribution,
)
from service.domain.types import ChunkKey, ModelKey, RequestDigest, Selector, SessionKey, Version
from service.settings import MIB, Limits
from service.store import keys
from service.store.connect import open_store
from service.store.layouts import contribution_name
from service.store.models import ORPHAN_MS, PART_BYTES, _version_parts

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from service.domain.ports import Bytes
    from service.domain.types import (
        ContributionKey,
    )
    from service.store.connect import Store
    from service.store.models import RedisModelStore

NEVER_MS = 2**53  # when a tape expires that does not
INCARNATION = b"i" * 16
CREATION = RequestDigest(b"n" * 16, b"c" * 16)
OTHER_CONTENT, OTHER_REQUEST = b"x" * 16, RequestDigest(b"o" * 16, b"c" * 16)


def version(number: int, letter: bytes = b"d") -> Version:
    """Return a version's name."""
    return Version(number, letter * 16)


def content(number: int, letter: bytes = b"d", size: int = 8) -> NewVersion:
    """Return a version's weights and moments."""
    one = bytes([number]) * size
    return NewVersion(version(number, letter), Blob((one,)), Blob((one, one)))


def step_answer(number: int) -> StepAnswer:
    """Return what the step to version `number` answered."""
    return StepAnswer(version(number), 0.5, clipped=False, contribution_count=0)


@dataclass
class Model:
    """One model of a tenant, over a store."""

    store: RedisModelStore
    key: ModelKey

    async def create(self, request: RequestDigest = CREATION) -> CreateOutcome:
        """Create the model in the store."""
        new = NewModel(INCARNATION, b"spec", content(1), request)
        return await self.store.create_model(self.key, new)

    def contribution(self, number: int) -> ContributionKey:
        """Return which contribution of session "s" it is."""
        return contribution_key(ChunkKey(SessionKey(self.key.tenant, "s"), 7, number))

    async def record(
        self,
        number: int,
        gradient: bytes = b"gradient",
        digest: bytes = b"g" * 16,
        incarnation: bytes = INCARNATION,
    ) -> RecordOutcome:
        """Record a contribution in the model's slot."""
        contribution = Contribution(
            incarnation, self.contribution(number), digest, Blob((gradient,)), NEVER_MS
        )
        return await self.store.record_contribution(self.key, contribution)

    def publication(self, number: int, *taken: ContributionKey) -> Publication:
        """Lay out the publication from version number-1 to number."""
        request = RequestDigest(number.to_bytes(16, "big"), b"c" * 16)
        base, new = version(number - 1), content(number)
        return Publication(INCARNATION, base, new, request, step_answer(number), taken)

    async def published(
        self, number: int, *taken: ContributionKey, incarnation: bytes = INCARNATION
    ) -> PublishOutcome:
        """Make the next version."""
        publication = replace(self.publication(number, *taken), incarnation=incarnation)
        outcome, _ = await self.store.publish_version(self.key, publication)
        return outcome

    async def waiting(self) -> tuple[int, int]:
        """Return the number and bytes of what waits."""
        record = await self.store.read_model(self.key)
        assert record is not None
        return record.waiting_count, record.waiting_bytes


@pytest.fixture
def model(opened: Store, tenant: str) -> Model:
    """A model that is not created yet."""
    return Model(opened.models, ModelKey(tenant, "m"))


async def test_creation_is_once_by_its_request(model: Model) -> None:
    """The same request replays, with other content it is REUSED, another one finds it taken."""
    assert await model.create() is CreateOutcome.CREATED
    assert await model.create() is CreateOutcome.REPLAYED
    assert await model.create(CREATION._replace(content=OTHER_CONTENT)) is CreateOutcome.REUSED
    assert await model.create(OTHER_REQUEST) is CreateOutcome.EXISTS


async def test_a_publication_moves_the_head_once(model: Model) -> None:
    """Sent again it replays its answer; with other content it is REUSED; from an old head STALE."""
    await model.create()
    publication = model.publication(2)
    assert await model.store.publish_version(model.key, publication) == (
        PublishOutcome.PUBLISHED,
        None,
    )
    assert await model.store.publish_version(model.key, publication) == (
        PublishOutcome.REPLAYED,
        step_answer(2),
    )
    other = replace(publication, request=publication.request._replace(content=OTHER_CONTENT))
    assert (await model.store.publish_version(model.key, other))[0] is PublishOutcome.REUSED
    late = replace(publication, request=OTHER_REQUEST)
    assert (await model.store.publish_version(model.key, late))[0] is PublishOutcome.STALE
    gone = replace(publication, request=OTHER_REQUEST, incarnation=b"j" * 16)
    assert (await model.store.publish_version(model.key, gone))[0] is PublishOutcome.GONE


async def test_a_contribution_is_consumed_once(model: Model, raw: Redis) -> None:
    """A publication takes it with its bytes; its name stays, so that it is neither recorded nor consumed again."""
    await model.create()
    assert await model.record(1) is RecordOutcome.RECORDED
    assert await model.record(1) is RecordOutcome.REPLAYED
    assert await model.record(1, digest=b"x" * 16) is RecordOutcome.REUSED
    assert await model.waiting() == (1, 8)
    assert await model.published(2, model.contribution(1)) is PublishOutcome.PUBLISHED
    assert await model.waiting() == (0, 0)
    assert await model.record(1) is RecordOutcome.CONSUMED
    assert await model.record(1, digest=b"x" * 16) is RecordOutcome.REUSED
    assert await model.published(3, model.contribution(1)) is PublishOutcome.STALE
    tag = keys.model_tag(model.key)
    assert (
        await raw.exists(keys.gradient_prefix(tag) + contribution_name(model.contribution(1))) == 0
    )
    found = await model.store.read_gradients(
        model.key, [WaitingContribution(model.contribution(1), b"g" * 16)], 8
    )
    assert found is None


async def test_contributions_are_bounded_in_number_and_bytes(store_url: str, tenant: str) -> None:
    """What would go beyond either is QUOTA, and fits again after a publication."""
    tight = Limits(contributions_per_model=2, contribution_bytes_per_model=20)
    store = await open_store(store_url, patient(tight))
    model = Model(store.models, ModelKey(tenant, "m"))
    await model.create()
    await model.record(1)
    assert await model.record(2, bytes(13)) is RecordOutcome.QUOTA
    assert await model.record(2) is RecordOutcome.RECORDED
    assert await model.record(3, b"") is RecordOutcome.QUOTA
    await model.published(2, model.contribution(1))
    assert await model.record(3) is RecordOutcome.RECORDED
    await store.close()


async def test_what_is_remembered_of_contributions_is_bounded(
    store_url: str, tenant: str, raw: Redis
) -> None:
    """Beyond it is FULL, until the names that were counted have had their time."""
    store = await open_store(store_url, patient(Limits(remembered_contributions_per_model=2)))
    model = Model(store.models, ModelKey(tenant, "m"))
    await model.create()
    await model.record(1)
    await model.record(2)
    await model.published(2, model.contribution(1), model.contribution(2))
    assert await model.record(3) is RecordOutcome.FULL
    expiry = keys.expiry_key(keys.model_tag(ModelKey(tenant, "m")))
    await raw.zadd(expiry, {contribution_name(model.contribution(number)): 1 for number in (1, 2)})
    assert await model.record(3) is RecordOutcome.RECORDED
    assert await raw.zcard(expiry) == 1
    await store.close()


async def test_a_contribution_nobody_takes_goes_with_its_bytes(model: Model, raw: Redis) -> None:
    """After its time the next count forgets it whole."""
    await model.create()
    await model.record(1)
    tag = keys.model_tag(model.key)
    await raw.zadd(keys.expiry_key(tag), {contribution_name(model.contribution(1)): 1})
    await model.record(2)
    assert await model.waiting() == (1, 8)
    assert (
        await raw.exists(keys.gradient_prefix(tag) + contribution_name(model.contribution(1))) == 0
    )
    assert await model.store.find_contribution(model.key, model.contribution(1)) is None


async def test_a_contribution_whose_tape_has_expired_is_not_recorded(model: Model) -> None:
    """A writer that stood still so long may come after its name was forgotten: it would count twice."""
    await model.create()
    late = Contribution(INCARNATION, model.contribution(1), b"g" * 16, Blob((b"gradient",)), 1)
    assert await model.store.record_contribution(model.key, late) is RecordOutcome.EXPIRED
    assert await model.waiting() == (0, 0)


async def test_a_contribution_that_was_recorded_answers_also_after_its_tape(model: Model) -> None:
    """A retry learns that it was recorded, whatever has expired since."""
    await model.create()
    await model.record(1)
    late = Contribution(INCARNATION, model.contribution(1), b"g" * 16, Blob((b"gradient",)), 1)
    assert await model.store.record_contribution(model.key, late) is RecordOutcome.REPLAYED


async def test_a_contribution_is_found_as_it_stands(model: Model) -> None:
    """It waits, until a step has taken it."""
    await model.create()
    await model.record(1)
    find = model.store.find_contribution
    assert await find(model.key, model.contribution(1)) is ContributionState.WAITING
    await model.published(2, model.contribution(1))
    assert await find(model.key, model.contribution(1)) is ContributionState.CONSUMED


async def test_a_look_finds_what_selectors_name(model: Model) -> None:
    """All, one session's, one epoch's, or exactly those named; sorted, each once."""
    await model.create()
    for number in (3, 1, 2):
        await model.record(number)
    other = contribution_key(ChunkKey(SessionKey(model.key.tenant, "t"), 8, 1))
    contribution = Contribution(INCARNATION, other, b"g" * 16, Blob((b"gradient",)), NEVER_MS)
    await model.store.record_contribution(model.key, contribution)
    mine = [model.contribution(number) for number in (1, 2, 3)]

    async def read(*selectors: Selector) -> list[ContributionKey]:
        found = await model.store.read_update_inputs(model.key, None, selectors)
        assert found is not None
        return [one.key for one in found.waiting]

    assert await read() == sorted([*mine, other])
    assert await read(Selector("s")) == mine
    assert await read(Selector("s", 7)) == mine
    assert await read(Selector("s", 8)) == []
    assert await read(Selector("t", 8), Selector("t", 8, (1,))) == [other]
    assert await read(Selector("s", 7, (2, 2, 9))) == [mine[1]]
    nothing = await model.store.read_update_inputs(model.key, None, None)
    assert nothing is not None
    assert nothing.waiting == ()


async def test_requests_are_remembered_by_number_and_time(
    store_url: str, tenant: str, raw: Redis
) -> None:
    """The oldest go when there are too many or they are old; not before."""
    store = await open_store(store_url, patient(Limits(remembered_requests_per_model=3)))
    model = Model(store.models, ModelKey(tenant, "m"))
    await model.create(
        CREATION._replace(name=(1).to_bytes(16, "big"))
    )  # within a millisecond the name decides
    for number in range(2, 8):
        await model.published(number)
    requests = keys.requests_key(keys.model_tag(ModelKey(tenant, "m")))
    assert await raw.hlen(requests) == 3
    times = keys.request_times_key(keys.model_tag(ModelKey(tenant, "m")))
    for number in (5, 6):
        await raw.zadd(times, {number.to_bytes(16, "big"): 1})
    await model.published(8)
    assert await raw.hlen(requests) == 2
    await store.close()


async def test_moments_stay_with_the_head_and_checkpoints(model: Model) -> None:
    """A superseded version keeps its weights alone, unless a checkpoint names it."""
    await model.create()
    outcome, _ = await model.store.create_checkpoint(
        model.key, INCARNATION, "c", version=version(1)
    )
    assert outcome is CheckpointOutcome.CREATED
    await model.published(2)
    await model.published(3)
    read = [
        await model.store.read_moments(model.key, INCARNATION, version(number))
        for number in (1, 2, 3)
    ]
    assert read == [content(1).moments.joined(), b"", content(3).moments.joined()]
    for number in (1, 2, 3):
        weights = await model.store.read_weights(model.key, INCARNATION, version(number))
        assert weights == content(number).weights.joined()


async def test_a_version_is_read_by_number_and_digest(model: Model) -> None:
    """Another digest under a number is not that version."""
    await model.create()
    assert await model.store.find_version(model.key, 1) == version(1)
    assert await model.store.find_version(model.key, 2) is None
    assert await model.store.find_versions(model.key, [2, 1, 3]) == [version(1)]
    assert await model.store.read_weights(model.key, INCARNATION, version(1, b"x")) is None


async def test_large_blobs_go_in_parts(model: Model, raw: Redis) -> None:
    """No value is larger than a part, and what is read is what was written."""
    await model.create()
    size = 2 * PART_BYTES + 5
    publication = replace(model.publication(2), new=content(2, size=size))
    await model.store.publish_version(model.key, publication)
    weights = await model.store.read_weights(model.key, INCARNATION, version(2))
    moments = await model.store.read_moments(model.key, INCARNATION, version(2))
    assert (weights, moments) == (
        publication.new.weights.joined(),
        publication.new.moments.joined(),
    )
    prefix = keys.weights_prefix(keys.model_tag(model.key), INCARNATION)
    parts = [key async for key in raw.scan_iter(match=prefix + b"*", count=1000)]
    sizes = sorted([await raw.strlen(key) for key in parts])
    assert sizes == [5, 8, PART_BYTES, PART_BYTES]
    assert PART_BYTES <= 4 * MIB


async def test_a_large_gradient_goes_in_parts_and_leaves_none(model: Model, raw: Redis) -> None:
    """It counts, is read and is dropped like a small one; parts nobody counted go by themselves."""
    await model.create()
    gradient = bytes(range(256)) * (PART_BYTES // 256) + b"tail"
    prefix = keys.gradient_prefix(keys.model_tag(model.key))

    async def parts() -> list[bytes]:
        return [key async for key in raw.scan_iter(match=prefix + b"*", count=1000)]

    for number in (1, 2):
        assert await model.record(number, gradient) is RecordOutcome.RECORDED
        assert await model.record(number, gradient) is RecordOutcome.REPLAYED
    found = await model.store.read_update_inputs(model.key, None, ())
    assert found is not None
    size = len(gradient)
    read = await model.store.read_gradients(model.key, found.waiting, size)
    assert read == [gradient, gradient]
    assert {await raw.pttl(key) for key in await parts()} == {-1}
    await model.published(2, model.contribution(1))
    assert await model.waiting() == (1, size)
    assert len(await parts()) == 2
    await model.store.discard_contributions(model.key, INCARNATION, [Selector("s", 7, (2,))])
    assert await parts() == []
    await model.record(3, gradient)
    await model.store.delete_model(model.key, INCARNATION)
    assert await parts() == []


async def test_what_a_dead_writer_left_goes_by_itself(model: Model, raw: Redis) -> None:
    """Parts carry a time to live until the script that makes them count; then they have none."""
    await model.create()
    tag = keys.model_tag(model.key)
    await model.store._write_parts(_version_parts(tag, INCARNATION, content(2)))
    prefixes = (keys.weights_prefix(tag, INCARNATION), keys.moments_prefix(tag, INCARNATION))
    name = version(2).digest + (2).to_bytes(8, "big") + bytes(2)
    assert all([0 < await raw.pttl(prefix + name) <= ORPHAN_MS for prefix in prefixes])
    await model.published(2)
    assert all([await raw.pttl(prefix + name) == -1 for prefix in prefixes])


async def test_a_publication_without_all_its_parts_keeps_none(
    model: Model, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a part has expired the head stays, and no other part is made to stay for ever."""
    await model.create()
    tag = keys.model_tag(model.key)

    def without_moments(
        tag: bytes, incarnation: bytes, new: NewVersion
    ) -> list[tuple[bytes, Bytes]]:
        return _version_parts(tag, incarnation, new)[:1]

    monkeypatch.setattr("service.store.models._version_parts", without_moments)
    assert await model.published(2) is PublishOutcome.STALE
    name = version(2).digest + (2).to_bytes(8, "big") + bytes(2)
    assert await raw.pttl(keys.weights_prefix(tag, INCARNATION) + name) > 0


async def test_versions_go_by_their_bytes_but_four_stay(store_url: str, tenant: str) -> None:
    """The budget counts weights and a little beside each; beneath it nothing goes before its time."""
    store = await open_store(store_url, patient(Limits(superseded_bytes_per_model=6 * (4096 + 8))))
    model = Model(store.models, ModelKey(tenant, "m"))
    await model.create()
    for number in range(2, 12):
        await model.published(number)
    kept = [n for n in range(1, 12) if await model.store.find_version(ModelKey(tenant, "m"), n)]
    assert kept == [5, 6, 7, 8, 9, 10, 11]
    await store.close()


async def test_discarding_frees_and_remembers(model: Model) -> None:
    """By name, by session or all; a name once discarded is known."""
    await model.create()
    for number in (1, 2, 3):
        await model.record(number)

    async def discard(*selectors: Selector) -> int | None:
        return await model.store.discard_contributions(model.key, INCARNATION, selectors)

    assert await discard(Selector("s", 7, (1, 9))) == 1
    assert await model.waiting() == (2, 16)
    assert await discard(Selector("s", 7)) == 2
    assert await discard() == 0
    assert await model.record(1) is RecordOutcome.CONSUMED
    assert await model.waiting() == (0, 0)
    other = model.store.discard_contributions(model.key, b"j" * 16, ())
    assert await other is None


async def test_names_of_models_are_bounded_listed_and_forgotten(
    store_url: str, tenant: str
) -> None:
    """A tenant has as many as it may; a deleted one makes room."""
    store = await open_store(store_url, patient(Limits(models_per_tenant=1)))
    model = Model(store.models, ModelKey(tenant, "m"))
    await model.create()
    new = NewModel(INCARNATION, b"spec", content(1), CREATION)
    other = store.models.create_model(ModelKey(tenant, "n"), new)
    assert await other is CreateOutcome.QUOTA
    assert await store.models.list_models(tenant, "", 10) == ["m"]
    assert await store.models.delete_model(ModelKey(tenant, "m"), INCARNATION)
    assert not await store.models.delete_model(ModelKey(tenant, "m"), INCARNATION)
    assert await store.models.list_models(tenant, "", 10) == []
    await store.close()
