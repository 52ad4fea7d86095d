"""Models: made, listed, replaced, checkpointed, deleted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from instruments.replicas import (
    HIDDEN,
    INPUTS,
    Client,
    draw,
    head_of,
    head_params,
    keys_of,
    open_on,
    refusal,
    step,
)
from rnn_engine import SGD, Adam, Params, TanhNetwork
from service.domain.types import InitialWeights, ModelKey, ModelSpec, Selector, Version
from service.settings import Limits
from service.store import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from instruments.replicas import Replica
    from tests.domain.conftest import ClientMaker, ModelMaker, ReplicaMaker

Pair = tuple["Replica", "Replica"]
SPEC = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", Adam(lr=1e-2))


async def train(client: Client, rng: np.random.Generator, name: str) -> Version:
    """Make one step from one chunk."""
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    return (await client.update("m", name)).version


async def test_a_seed_makes_one_model_however_often_it_is_asked_for(
    replicas: Pair, tenant: str
) -> None:
    """Twenty racers with one request id create one model; a later one is MODEL_EXISTS."""
    made = await asyncio.gather(
        *(
            replicas[i % 2].models.create(tenant, SPEC, InitialWeights(seed=3), request_id="r")
            for i in range(20)
        )
    )
    assert sum(not replayed for _, replayed in made) == 1
    assert len({view.incarnation for view, _ in made}) == 1
    again = replicas[0].models.create(tenant, SPEC, InitialWeights(seed=3), request_id="")
    assert (await refusal(again)).reason == "MODEL_EXISTS"
    other = replicas[0].models.create(tenant, SPEC, InitialWeights(seed=4), request_id="r")
    assert (await refusal(other)).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("facts", "difference"),
    [
        ({}, ""),
        ({"network": TanhNetwork(INPUTS, 9)}, "hidden_size"),
        ({"dtype": "float64", "optimizer": Adam(lr=0.5)}, "dtype,optimizer"),
    ],
)
async def test_a_name_that_is_taken_tells_the_difference(
    replicas: Pair, tenant: str, facts: dict[str, Any], difference: str
) -> None:
    """MODEL_EXISTS names each part of the specification that is otherwise there; seeds are none."""
    await replicas[0].models.create(tenant, SPEC, InitialWeights(seed=3), request_id="r")
    asked = replace(SPEC, **facts)
    refused = await refusal(
        replicas[1].models.create(tenant, asked, InitialWeights(seed=5), request_id="")
    )
    assert (refused.reason, refused.metadata["difference"]) == ("MODEL_EXISTS", difference)
    assert all(name in refused.message for name in difference.split(","))


async def test_a_refused_creation_leaves_nothing(replicas: Pair, tenant: str, raw: Redis) -> None:
    """Creating what exists writes no weights, not even for a while."""
    await replicas[0].models.create(tenant, SPEC, InitialWeights(seed=1), request_id="")
    before = await keys_of(raw, keys.model_tag(ModelKey(tenant, "m")))
    await refusal(replicas[0].models.create(tenant, SPEC, InitialWeights(seed=2), request_id=""))
    assert await keys_of(raw, keys.model_tag(ModelKey(tenant, "m"))) == before


async def test_given_weights_are_taken_bit_for_bit(
    replicas: Pair, tenant: str, rng: np.random.Generator
) -> None:
    """Wx, Wh and b come back as they were given; another shape is refused by its field."""
    shapes = ((INPUTS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN,))
    given = Params(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    await replicas[0].models.create(tenant, SPEC, InitialWeights(given=given), request_id="")
    there = await head_params(replicas[1], tenant, SPEC)
    for one, other in zip(
        (there.Wx, there.Wh, there.b), (given.Wx, given.Wh, given.b), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    wrong = InitialWeights(given=Params(given.Wx.T.copy().T[:, ::-1].copy(), given.Wh, given.b))
    spec = ModelSpec("n", TanhNetwork(INPUTS + 1, HIDDEN), "float32", SGD())
    refused = await refusal(replicas[0].models.create(tenant, spec, wrong, request_id=""))
    assert (refused.reason, refused.field) == ("BAD_TENSOR", "given.wx")


async def test_models_are_listed_in_pages_by_name(replicas: Pair, tenant: str) -> None:
    """Each once, sorted; another tenant's list is empty."""
    names = [f"m{i}" for i in range(5)]
    for name in names:
        spec = ModelSpec(name, TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
        await replicas[0].models.create(tenant, spec, InitialWeights(), request_id="")
    seen, token = [], ""
    while True:
        views, token = await replicas[1].models.list_page(tenant, 2, token)
        seen += [view.spec.model_id for view in views]
        if not token:
            break
    assert seen == names
    assert await replicas[1].models.list_page(f"{tenant}x", 10, "") == ([], "")


async def test_the_number_of_models_is_bounded_and_freed(
    make_replica: ReplicaMaker, tenant: str
) -> None:
    """Beyond the tenant's number is MAX_MODELS until one is deleted."""
    replica = await make_replica(Limits(models_per_tenant=1))
    await replica.models.create(tenant, SPEC, InitialWeights(), request_id="")
    other = ModelSpec("n", TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
    assert (
        await refusal(replica.models.create(tenant, other, InitialWeights(), request_id=""))
    ).reason == ("MAX_MODELS")
    assert await replica.models.delete(ModelKey(tenant, "m"), allow_missing=False)
    await replica.models.create(tenant, other, InitialWeights(), request_id="")


async def test_a_name_left_by_a_creation_cut_short_can_be_deleted(
    make_replica: ReplicaMaker, tenant: str, raw: Redis
) -> None:
    """A reservation without a model counts for nobody for ever."""
    replica = await make_replica(Limits(models_per_tenant=1))
    await raw.zadd(keys.tenant_models_key(tenant), {"half": 0})
    assert (
        await refusal(replica.models.create(tenant, SPEC, InitialWeights(), request_id=""))
    ).reason == ("MAX_MODELS")
    assert not await replica.models.delete(ModelKey(tenant, "half"), allow_missing=True)
    await replica.models.create(tenant, SPEC, InitialWeights(), request_id="")


async def test_deleting_a_model_removes_every_key(
    replicas: Pair,
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    raw: Redis,
    rng: np.random.Generator,
) -> None:
    """Versions, moments, contributions, requests and checkpoints go; deleting again is an error."""
    await make_model(optimizer=Adam())
    client = await open_session()
    for k in range(3):
        await train(client, rng, f"u{k}")
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await replicas[0].models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    assert await replicas[1].models.delete(ModelKey(tenant, "m"), allow_missing=False)
    assert await keys_of(raw, keys.model_tag(ModelKey(tenant, "m"))) == []
    assert (
        await refusal(replicas[0].models.get(ModelKey(tenant, "m")))
    ).reason == "MODEL_NOT_FOUND"
    again = replicas[0].models.delete(ModelKey(tenant, "m"), allow_missing=False)
    assert (await refusal(again)).reason == "MODEL_NOT_FOUND"
    assert not await replicas[0].models.delete(ModelKey(tenant, "m"), allow_missing=True)


async def test_weights_go_out_and_come_back(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """A file with moments put back makes the next version with the same bits."""
    spec = await make_model(optimizer=Adam())
    version = await train(await open_session(), rng, "u")
    found, data = await replicas[0].models.read_weights(
        ModelKey(tenant, "m"), None, include_moments=True
    )
    assert found == version
    put, replayed = await replicas[1].models.put_weights(
        ModelKey(tenant, "m"), data, expected=version, request_id="p"
    )
    assert (put.number, put.digest, replayed) == (3, version.digest, False)
    again, replayed = await replicas[0].models.put_weights(
        ModelKey(tenant, "m"), data, expected=version, request_id="p"
    )
    assert (again, replayed) == (put, True)
    tensors = load(data)
    there = await head_params(replicas[0], tenant, spec)
    np.testing.assert_array_equal(there.Wh, tensors["Wh"])
    stale = replicas[0].models.put_weights(
        ModelKey(tenant, "m"), data, expected=version, request_id="q"
    )
    assert (await refusal(stale)).reason == "VERSION_CONFLICT"


async def test_moments_that_are_not_kept_are_not_made_up(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """A superseded version's file has weights alone; zeros would pass for its moments."""
    await make_model(optimizer=Adam())
    client = await open_session()
    old = await train(client, rng, "u1")
    await train(client, rng, "u2")
    fresh = await make_replica()
    _, data = await fresh.models.read_weights(ModelKey(tenant, "m"), old, include_moments=True)
    assert set(load(data)) == {"Wx", "Wh", "b"}


async def test_a_file_for_another_specification_is_refused(
    replicas: Pair, tenant: str, make_model: ModelMaker
) -> None:
    """Neither a wrong shape nor another format becomes a version."""
    await make_model()
    head = await head_of(replicas[0], tenant)
    wrong = save({name: np.zeros((2, 2), np.float32) for name in ("Wx", "Wh", "b")})
    for data in (wrong, b"", b"\x80\x04pickle", b"PK\x03\x04" + bytes(60)):
        refused = await refusal(
            replicas[0].models.put_weights(
                ModelKey(tenant, "m"), data, expected=None, request_id="put"
            )
        )
        assert refused.reason == "BAD_WEIGHTS"
    assert await head_of(replicas[1], tenant) == head


async def test_a_read_ahead_ends_before_its_replica_does(
    replicas: Pair, tenant: str, make_model: ModelMaker
) -> None:
    """Nobody waits for it, and it would open a connection that nobody closes."""
    await make_model()
    reading = replicas[0].caches.models.start_reading(ModelKey(tenant, "m"))
    await replicas[0].caches.models.drain()
    assert reading.done()


@pytest.mark.parametrize(
    ("port", "method"),
    [
        ("models", "create_model"),
        ("models", "publish_version"),
        ("sessions", "begin_epoch"),
        ("sessions", "mark_tape_consumed"),
    ],
)
async def test_what_goes_on_without_its_caller_ends_before_its_replica_does(
    make_replica: ReplicaMaker, tenant: str, monkeypatch: pytest.MonkeyPatch, port: str, method: str
) -> None:
    """Else the store's connections would be closed under it, and it would be cut off half done."""
    replica = await make_replica()
    began, goes_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    ask = getattr(getattr(replica.store, port), method)

    async def held(*arguments: object, **named: object) -> object:
        began.set()
        await goes_on.wait()
        try:
            return await ask(*arguments, **named)
        finally:
            ended.set()

    async def train_and_step() -> None:
        await replica.models.create(tenant, SPEC, InitialWeights(seed=3), request_id="")
        opened = await open_on(replica, tenant, "s", "m")
        client = Client([replica], tenant, "s", opened.session.epoch)
        await train(client, np.random.default_rng(1), "u")

    monkeypatch.setattr(getattr(replica.store, port), method, held)
    calling = asyncio.create_task(train_and_step())
    await began.wait()
    calling.cancel()
    await asyncio.wait({calling})
    draining = asyncio.ensure_future(replica.drain())
    asyncio.get_running_loop().call_soon(goes_on.set)
    await draining
    assert ended.is_set()


async def test_weights_for_a_model_made_again_meanwhile_are_refused(
    replicas: Pair, tenant: str, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload checked against one model is never installed in its successor of another shape."""
    await make_model()
    _, data = await replicas[0].models.read_weights(
        ModelKey(tenant, "m"), None, include_moments=False
    )
    store = replicas[0].store.models
    read = store.read_update_inputs

    async def overtaken(*arguments: object) -> object:
        monkeypatch.undo()
        await replicas[1].models.delete(ModelKey(tenant, "m"), allow_missing=False)
        await make_model(sizes=(INPUTS + 1, HIDDEN))
        return await read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read_update_inputs", overtaken)
    refused = await refusal(
        replicas[0].models.put_weights(ModelKey(tenant, "m"), data, expected=None, request_id="p")
    )
    assert refused.reason == "MODEL_NOT_FOUND"
    assert (await head_of(replicas[1], tenant)).number == 1


async def test_a_checkpoint_keeps_its_version_and_its_name(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """The same name and version is the same answer; another version is CHECKPOINT_EXISTS."""
    await make_model()
    models = replicas[0].models
    first = await models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    assert (
        await replicas[1].models.create_checkpoint(ModelKey(tenant, "m"), "c", first.version)
        == first
    )
    version = await train(await open_session(), rng, "u")
    other = await refusal(models.create_checkpoint(ModelKey(tenant, "m"), "c", version))
    assert other.reason == "CHECKPOINT_EXISTS"
    gone = await refusal(models.create_checkpoint(ModelKey(tenant, "m"), "d", Version(9)))
    assert gone.reason == "VERSION_GONE"
    forked = await refusal(
        models.create_checkpoint(ModelKey(tenant, "m"), "d", Version(1, b"x" * 16))
    )
    assert forked.reason == "WEIGHTS_FORKED"
    assert await models.list_checkpoints(ModelKey(tenant, "m")) == [first]


async def test_a_restored_checkpoint_trains_on_as_if_nothing_had_been(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Weights and moments come back bit for bit: the next step has the digest it had before."""
    await make_model(optimizer=Adam())
    await train(await open_session(), rng, "u1")
    await replicas[0].models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    xs, dhs = draw(rng), draw(rng, size=HIDDEN)
    made = []
    for name in ("before", "after"):
        client = await open_session(name)
        await client.forward(xs, train=True)
        await client.backward(dhs)
        made.append((await client.update("m", name)).version)
        if name == "before":
            await replicas[1].models.restore_checkpoint(
                ModelKey(tenant, "m"), "c", expected=None, request_id="r"
            )
    assert [version.number for version in made] == [3, 5]
    assert made[0].digest == made[1].digest


async def test_a_restore_sent_again_needs_its_checkpoint_no_more(
    replicas: Pair, tenant: str, make_model: ModelMaker
) -> None:
    """The answer is remembered even when the checkpoint has been deleted since."""
    await make_model()
    models = replicas[0].models
    await models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    first, _ = await models.restore_checkpoint(
        ModelKey(tenant, "m"), "c", expected=None, request_id="r"
    )
    await models.delete_checkpoint(ModelKey(tenant, "m"), "c", allow_missing=False)
    again, replayed = await replicas[1].models.restore_checkpoint(
        ModelKey(tenant, "m"), "c", expected=None, request_id="r"
    )
    assert (again, replayed) == (first, True)
    missing = await refusal(
        models.restore_checkpoint(ModelKey(tenant, "m"), "c", expected=None, request_id="other")
    )
    assert missing.reason == "CHECKPOINT_NOT_FOUND"
    gone = await refusal(models.delete_checkpoint(ModelKey(tenant, "m"), "c", allow_missing=False))
    assert gone.reason == "CHECKPOINT_NOT_FOUND"


async def test_checkpoints_are_bounded(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker
) -> None:
    """Beyond the model's number a checkpoint is MAX_CHECKPOINTS."""
    await make_model()
    replica = await make_replica(Limits(checkpoints_per_model=1))
    await replica.models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    refused = await refusal(replica.models.create_checkpoint(ModelKey(tenant, "m"), "d", None))
    assert refused.reason == "MAX_CHECKPOINTS"


async def test_a_checkpointed_version_stays_while_others_go(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Of superseded versions four stay beside the checkpoint's; after its deletion it ages too."""
    await make_model()
    tight = await make_replica(Limits(superseded_bytes_per_model=1))
    client = await open_session()
    client.replicas = [tight]
    await tight.models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    for k in range(8):
        await train(client, rng, f"u{k}")
    head, kept = await tight.models.find_versions(ModelKey(tenant, "m"), range(1, 12))
    assert [version.number for version in kept] == [1, 5, 6, 7, 8, 9]
    assert kept[-1] == head
    await tight.models.delete_checkpoint(ModelKey(tenant, "m"), "c", allow_missing=False)
    await train(client, rng, "u8")
    await train(client, rng, "u9")
    assert await tight.store.models.find_version(ModelKey(tenant, "m"), 1) is None or (
        await tight.store.models.find_version(ModelKey(tenant, "m"), 5) is None
    )


async def test_superseded_versions_stay_while_their_time_and_bytes_last(
    make_replica: ReplicaMaker, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Within the budget all stay for tape_ttl; without time only four are left."""
    await make_model()
    client = await open_session()
    for k in range(7):
        await train(client, rng, f"u{k}")
    store = client.replicas[0].store.models
    assert all([await store.find_version(ModelKey(tenant, "m"), n) for n in range(1, 9)])
    hasty = await make_replica(Limits(tape_ttl_ms=1))
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    client.replicas = [hasty]
    await client.update("m", "late")
    kept = [n for n in range(1, 10) if await store.find_version(ModelKey(tenant, "m"), n)]
    assert kept == [5, 6, 7, 8, 9]


async def test_an_update_after_a_model_was_made_again_finds_nothing(
    replicas: Pair, tenant: str, make_model: ModelMaker, open_session: ClientMaker,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Contributions go with their model; a Backward of its sessions is MODEL_NOT_FOUND."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await client.forward(draw(rng), train=True)
    await replicas[0].models.delete(ModelKey(tenant, "m"), allow_missing=False)
    await make_model()
    assert (await refusal(replicas[1].updates.update(tenant, step("m", "u")))).reason == (
        "NO_GRADIENTS"
    )
    late = await refusal(client.backward(draw(rng, size=HIDDEN)))
    assert late.reason == "MODEL_NOT_FOUND"


async def test_a_model_too_large_is_refused_before_it_is_drawn(
    make_replica: ReplicaMaker, tenant: str
) -> None:
    """Weights beyond the limit are BAD_FIELD."""
    replica = await make_replica(Limits(weights_bytes=64))
    refused = await refusal(replica.models.create(tenant, SPEC, InitialWeights(), request_id=""))
    assert refused.reason == "BAD_FIELD"


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("weights_bytes", 100),
        ("contribution_bytes_per_model", 100),
        ("request_bytes_in_flight", 60_000),
        ("message_bytes", 1_040),
    ],
)
async def test_a_model_whose_own_step_could_not_fit_is_refused_at_once(
    make_replica: ReplicaMaker, tenant: str, limit: str, value: int
) -> None:
    """The refusal names what is needed and the limit that it goes over."""
    replica = await make_replica(replace(Limits(), **{limit: value}))
    spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
    refused = await refusal(
        replica.models.create(tenant, spec, InitialWeights(seed=1), request_id="")
    )
    assert (refused.reason, refused.field) == ("BAD_FIELD", "spec.hidden_size")
    assert f"over the limit of {value}" in refused.message


async def test_a_step_whose_caller_went_away_is_made_and_found(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A caller that gives up while a version is written finds the step made when it comes again."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    store: Any = replicas[0].store.models
    publish, reached, go_on = store.publish_version, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await publish(*arguments)

    monkeypatch.setattr(store, "publish_version", slow)
    op = step("m", "u", Selector("s", client.epoch, (1,)))
    waiting = asyncio.create_task(replicas[0].updates.update(tenant, op))
    await reached.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go_on.set()
    again = await replicas[0].updates.update(tenant, op)
    assert (again.replayed, again.version.number) == (True, 2)


async def test_a_creation_whose_caller_went_away_is_made_and_found(
    replicas: tuple[Replica, Replica], tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A creation that takes longer than its caller waits is carried on; the retry is answered with it."""
    store: Any = replicas[0].store.models
    create, reached, go_on = store.create_model, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await create(*arguments)

    monkeypatch.setattr(store, "create_model", slow)
    spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", SGD())
    first = InitialWeights(seed=1)
    waiting = asyncio.create_task(replicas[0].models.create(tenant, spec, first, request_id="r"))
    await reached.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go_on.set()
    _, replayed = await replicas[0].models.create(tenant, spec, first, request_id="r")
    assert replayed
