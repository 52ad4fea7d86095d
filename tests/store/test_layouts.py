"""Layout 1, byte for byte, and what the scripts do with any other."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.replicas import Backup, refusal
from rnn_engine import SGD, TanhNetwork
from service.domain.errors import UnsupportedLayout
from service.domain.ports import ChunkOutcome, Remembered, StepAnswer, WaitingContribution
from service.domain.tapes import tape_to_bytes
from service.domain.types import (
    ChunkKey,
    ContributionKey,
    ModelKey,
    ModelSpec,
    RequestDigest,
    SessionKey,
    Version,
)
from service.domain.weights import spec_to_bytes
from service.store import keys, layouts, models
from service.store.scripts import Script
from tests.store.test_models import INCARNATION, Model, version
from tests.store.test_sessions import Writer, token

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.store.connect import Store

    Decision = Callable[[Model, bytes], Awaitable[Any]]

OTHER = b"o" * 16
SPEC = (
    '{"cell": "tanh", "dtype": "float32", "hidden_size": 2, "input_size": 3, "layout": 1, '
    '"model_id": "m", "optimizer": {"kind": "SGD", "lr": 0.5}}'
)


@pytest.fixture
def model(opened: Store, tenant: str) -> Model:
    """A model that is not created yet."""
    return Model(opened.models, ModelKey(tenant, "m"))


# --- what is written ----------------------------------------------------------------------------------


async def test_a_sessions_keys_are_written_as_layout_1(
    opened: Store, tenant: str, raw: Any
) -> None:
    """Literal bytes, so that no change of the code goes unseen; the two times are the store's."""
    writer, tag = Writer(opened, tenant), keys.session_tag(SessionKey(tenant, "s"))
    await writer.begin(restored_epoch=7, request=RequestDigest(b"r" * 16, b"c" * 16))
    await writer.commit(1, tape=b"tape")
    record = await raw.get(tag)
    assert record is not None
    head = (
        "01" "02" "0001" "00000020" "0000000000000007" "0000000000000001" "000000000036ee80"
    )  # fmt: skip
    assert record[:32].hex() == head
    assert record[40:80].hex() == "72" * 8 + "63" * 8 + "0000000201000000" + "69" * 16
    first = bytes(24) + token(0) + bytes(24) + bytes(32)
    second = bytes([*bytes(7), 1]) + b"d" * 16 + token(1) + bytes([*bytes(7), 1]) + b"v" * 16
    assert record[80:] == b"m" + first + second + b"\x01" * 32
    assert await raw.get(keys.marker_key(tag)) == bytes([*bytes(7), 7]) + b"L"
    (entry,) = (await raw.hgetall(keys.tape_index_key(tag))).values()
    assert entry[8:] == bytes([*bytes(7), 4]) + b"W" + token(1)


def test_what_is_remembered_of_a_step_is_written_as_layout_1() -> None:
    """Version, norm, whether it was clipped, and the number of contributions."""
    answer = StepAnswer(Version(5, b"v" * 16), 0.5, clipped=True, contribution_count=3)
    written = bytes([*bytes(7), 5]) + b"v" * 16 + bytes.fromhex("3fe00000000000000100000003")
    assert layouts.step_answer_to_bytes(answer) == written
    assert layouts.remembered_from_bytes(b"c" * 16 + written) == Remembered(b"c" * 16, answer)


def test_the_names_of_contributions_sort_as_their_keys() -> None:
    """By session, epoch and chunk: gradients are summed in this order."""
    drawn = [
        ContributionKey(b"%c" % s * 16, e, c) for s in b"ba" for e in (300, 2) for c in (256, 1)
    ]
    assert sorted(drawn, key=layouts.contribution_name) == sorted(drawn)
    waiting = WaitingContribution(drawn[0], b"d" * 16)
    assert layouts.waiting_from_bytes(layouts.waiting_to_bytes(waiting)) == waiting


def test_a_tape_is_written_as_layout_1() -> None:
    """Number of the layout, N, T, D, H, version, h0, xs."""
    xs, h0 = np.full((1, 2, 1), 1, "<f4"), np.full((1, 3), 2, "<f4")
    written = "01000000000000010000000200000001000000030000000000000005"
    expected = bytes.fromhex(written) + b"v" * 16 + h0.tobytes() + xs.tobytes()
    assert tape_to_bytes(Version(5, b"v" * 16), xs, h0) == expected


def test_a_tanh_models_specification_is_written_as_layout_1() -> None:
    """A release that knows layout 1 alone can read it."""
    assert spec_to_bytes(ModelSpec("m", TanhNetwork(3, 2), "float32", SGD(lr=0.5))).decode() == SPEC


async def test_a_models_entries_are_written_as_layout_1(model: Model, raw: Any) -> None:
    """An entry of each kind."""
    await model.create()
    await model.record(1)
    tag = keys.model_tag(model.key)
    (waiting,) = (await raw.hgetall(keys.contributions_key(tag))).values()
    assert waiting == b"W" + b"g" * 16 + struct.pack(">Q", 8)
    await model.published(2, model.contribution(1))
    (consumed,) = (await raw.hgetall(keys.contributions_key(tag))).values()
    assert consumed == b"C" + b"g" * 16
    await model.store.create_checkpoint(model.key, INCARNATION, "c", version=None)
    (kept,) = (await raw.hgetall(keys.checkpoints_key(tag))).values()
    assert kept[:24] == struct.pack(">Q", 2) + b"d" * 16
    assert len(kept) == layouts.CHECKPOINT.size
    entries = await raw.hgetall(keys.versions_key(tag))
    one, two = (entries[struct.pack(">Q", number)] for number in (1, 2))
    assert one == b"d" * 16 + struct.pack(">QHHH", 8, 1, 0, 0)
    assert two == b"d" * 16 + struct.pack(">QHHH", 8, 1, 1, 1)


# --- what is refused ----------------------------------------------------------------------------------


async def test_a_batch_goes_on_beside_a_refused_session(
    opened: Store, tenant: str, raw: Any
) -> None:
    """Of three chunks in one script the second meets another layout: the others are applied."""
    writers = [Writer(opened, tenant, name) for name in "abc"]
    for writer in writers:
        await writer.begin()
    tag = keys.session_tag(SessionKey(tenant, "b"))
    await raw.setrange(tag, 0, b"\x4d")
    before = (await Backup.take(raw, tag)).entries
    chunks = [writer.chunk(1, tape=b"tape") for writer in writers]
    first, second, third = await opened.sessions.commit_chunks(chunks)
    assert (first, third) == (ChunkOutcome.OK, ChunkOutcome.OK)
    assert isinstance(second, UnsupportedLayout)
    after = (await Backup.take(raw, tag)).entries
    assert {key: data for key, (data, _) in after.items()} == {
        key: data for key, (data, _) in before.items()
    }


async def test_a_ring_of_another_layout_is_not_widened(
    opened: Store, tenant: str, raw: Any
) -> None:
    """A chunk that the ring has no room for would be the one that widens it."""
    writer, tag = Writer(opened, tenant), keys.session_tag(SessionKey(tenant, "s"))
    await writer.begin()
    await writer.commit(1, acknowledged_seq=0)
    await raw.setrange(tag, 0, b"\x4d")
    before = await raw.get(tag)
    (answer,) = await opened.sessions.commit_chunks([writer.chunk(2, acknowledged_seq=0)])
    assert isinstance(answer, UnsupportedLayout)
    assert await raw.get(tag) == before


async def test_a_settled_tape_is_of_a_session_that_is_known(
    opened: Store, tenant: str, raw: Any
) -> None:
    """A contribution may be recorded before another release rewrites the session."""
    writer, tag = Writer(opened, tenant), keys.session_tag(SessionKey(tenant, "s"))
    await writer.begin()
    await writer.commit(1, tape=b"tape")
    await raw.setrange(tag, 0, b"\x4d")
    settle = writer.store.mark_tape_consumed(
        ChunkKey(SessionKey(tenant, "s"), writer.epoch, 1), token(1)
    )
    assert isinstance(await refusal(settle), UnsupportedLayout)
    (entry,) = (await raw.hgetall(keys.tape_index_key(tag))).values()
    assert entry[16:17] == b"W"


# Each script that changes a model, asked in the name of another incarnation.
DECISIONS: dict[str, Decision] = {
    "delete_model": lambda model, name: model.store.delete_model(model.key, name),
    "record_contribution": lambda model, name: model.record(1, incarnation=name),
    "publish_version": lambda model, name: model.published(
        3, model.contribution(1), incarnation=name
    ),
    "discard_contributions": lambda model, name: model.store.discard_contributions(
        model.key, name, ()
    ),
    "create_checkpoint": lambda model, name: model.store.create_checkpoint(
        model.key, name, "new", version=version(2)
    ),
    "delete_checkpoint": lambda model, name: model.store.delete_checkpoint(model.key, name, "kept"),
}
# They make the incarnation, answer with it beside the specification, or see the tenant's list alone.
WITHOUT_ONE = {"create_model", "read_update_inputs", "reserve_model"}


@pytest.mark.parametrize("name", DECISIONS)
async def test_a_models_script_compares_the_incarnation_first(
    model: Model, raw: Any, name: str
) -> None:
    """Who does not know it learns nothing of entries that it would refuse, and changes nothing."""
    await model.create()
    await model.record(1)
    await model.published(2)
    await model.store.create_checkpoint(model.key, INCARNATION, "kept", version=None)
    tag = keys.model_tag(model.key)
    for key in (keys.versions_key(tag), keys.contributions_key(tag), keys.checkpoints_key(tag)):
        for field, entry in (await raw.hgetall(key)).items():
            await raw.hset(key, field, entry + b"+")
    before = (await Backup.take(raw, tag)).entries
    await DECISIONS[name](model, OTHER)
    after = (await Backup.take(raw, tag)).entries
    # The parts of a version that was not made were written under a name with that incarnation.
    assert {key: one for key, one in after.items() if OTHER not in key} == before
    assert isinstance(await refusal(DECISIONS[name](model, INCARNATION)), UnsupportedLayout)


def test_every_script_of_a_model_is_asked() -> None:
    """A script that is added has to compare the incarnation too."""
    scripts = {each.name for each in vars(models).values() if isinstance(each, Script)}
    assert set(DECISIONS) | WITHOUT_ONE == scripts
