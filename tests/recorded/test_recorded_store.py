"""What an earlier release left in a store: this one goes on with all of it.

Each recording holds a session inside its replay window, tapes and contributions that wait and that
are done with, a contribution in parts, superseded versions, a checkpoint and remembered requests;
and the calls that its own server answered next. The same calls get the same answers here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import redis
from recorded_store import Recording, to_bytes, to_text

from instruments.processes import ServiceProcess
from service.domain.errors import UnsupportedLayout
from service.domain.tapes import tape_from_bytes, tape_to_bytes
from service.domain.weights import spec_from_bytes, spec_to_bytes
from service.store import layouts
from service.store.embedded import EmbeddedStore
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub
from timernn.v1.session_service_pb2_grpc import SessionServiceStub
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

DAY_MS = 86_400_000
RECORDINGS = sorted(Path(__file__).parent.glob("*.jsonl"))
# Of the day of the recording, or of a step that another processor makes with other last bits.
NOT_COMPARED = {"expire_time", "create_time", "digest"}


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> Recording:
    """The recorded store of one release."""
    return Recording.load(request.param)


@pytest.fixture
def restored(recording: Recording, tmp_path: Path) -> Iterator[EmbeddedStore]:
    """A store that holds what was recorded, as of now: as if the recording were a year old."""
    with EmbeddedStore(tmp_path, durable=False) as store:
        with redis.Redis.from_url(store.url) as client:
            recording.moved(-365 * DAY_MS).restore(client)
        yield store


@pytest.fixture
def stubs(restored: EmbeddedStore) -> Iterator[list[Any]]:
    """The stubs of today's server on that store."""
    with ServiceProcess(restored.url) as server, grpc.insecure_channel(server.address) as channel:
        yield [stub(channel) for stub in (ModelServiceStub, SessionServiceStub, TimeRnnServiceStub)]


def call_of(entry: dict[str, Any], stubs: list[Any]) -> tuple[Message, Message]:
    """Make a recorded call again; returns its answer then, and now."""
    kind = entry["request"]
    module: Any = next(each for each in (model_pb, session_pb, pb) if hasattr(each, kind))
    name = kind.removesuffix("Request")
    stub = next(each for each in stubs if hasattr(each, name))
    then = getattr(module, f"{name}Response").FromString(to_bytes(entry["answer"]))
    request = getattr(module, kind).FromString(to_bytes(entry["sent"]))
    return then, getattr(stub, name)(request, timeout=60)


def check_same(then: Any, now: Any, where: str) -> None:
    """Compare two answers field by field, tensors up to rounding."""
    if then.DESCRIPTOR.name == "Tensor":
        assert (then.dtype, list(then.shape)) == (now.dtype, list(now.shape)), where
        dtype = "<f4" if then.dtype == 1 else "<f8"
        old, new = (np.frombuffer(each.data, dtype) for each in (then, now))
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-6, err_msg=where)
        return
    for field in then.DESCRIPTOR.fields:
        if field.name in NOT_COMPARED:
            continue
        at, old, new = f"{where}.{field.name}", getattr(then, field.name), getattr(now, field.name)
        if field.message_type is None:
            assert old == pytest.approx(new, rel=1e-4) if isinstance(old, float) else old == new, at
        elif hasattr(old, "DESCRIPTOR"):
            check_same(old, new, at)
        else:
            assert len(old) == len(new), at
            for index, pair in enumerate(zip(old, new, strict=True)):
                check_same(*pair, f"{at}[{index}]")


def test_every_state_goes_on_as_its_own_release_would_have(
    recording: Recording, stubs: list[Any]
) -> None:
    """Replays, the next chunk, the Backward of a waiting tape, the step over what waits, the checkpoint."""
    assert recording.answers
    for entry in recording.answers:
        then, now = call_of(entry, stubs)
        check_same(then, now, entry["request"])


def test_what_was_recorded_is_what_this_release_writes(recording: Recording) -> None:
    """Read and written again, specifications, states and tapes are the same bytes."""
    found = dict.fromkeys(("specification", "state", "tape"), 0)
    for record in recording.records:
        slot, _, role = to_bytes(record["key"]).partition(b"}")
        if slot.startswith(b"m{") and not role:
            spec = to_bytes(record["value"][to_text(b"spec")])
            assert spec_to_bytes(spec_from_bytes(spec)) == spec
            found["specification"] += 1
        elif slot.startswith(b"s{") and not role:
            for state in states_of(to_bytes(record["value"])):
                read = layouts.state_from_bytes(state)
                assert read is not None
                assert layouts.state_to_bytes(read) == state
                found["state"] += 1
        elif slot.startswith(b"s{") and role.startswith(b"t") and record["type"] == "string":
            check_tape_again(to_bytes(record["value"]))
            found["tape"] += 1
    assert all(found.values()), found


def states_of(record: bytes) -> Iterator[bytes]:
    """Return the slots of a session's ring that hold a state."""
    number, slots, tail, size, *_ = layouts.HEAD.unpack_from(record)
    assert number == layouts.RECORD_LAYOUT
    first, each = layouts.HEAD.size + tail, layouts.SLOT.size + size
    assert len(record) == first + slots * each
    for at in range(first, len(record), each):
        if record[at] != 0xFF:
            yield record[at : at + each]


def check_tape_again(tape: bytes) -> None:
    """Read a tape, of either dtype, and write it again."""
    try:
        read = tape_from_bytes(tape, "float32")
    except UnsupportedLayout:  # of another length, if it is not of this dtype
        read = tape_from_bytes(tape, "float64")
    assert tape_to_bytes(read.version, read.inputs, read.state) == tape


def test_what_is_written_back_is_what_was_recorded(
    recording: Recording, restored: EmbeddedStore
) -> None:
    """Keys, types and values are all there; times alone are later, all by the same."""
    with redis.Redis.from_url(restored.url) as client:
        again = Recording.of(client, recording.release)
    expected = recording.moved(again.time_ms - recording.time_ms)
    for found, wanted in zip(again.records, expected.records, strict=True):
        assert (found["key"], found["type"]) == (wanted["key"], wanted["type"])
        assert abs(found["ttl_ms"] - wanted["ttl_ms"]) < DAY_MS
