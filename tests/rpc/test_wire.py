"""Messages made to cost more than their size are refused before they are parsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from service.domain.errors import InvalidArgument
from service.rpc.wire import MAX_PARTS, Wire
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.tensor_pb2 import Tensor

if TYPE_CHECKING:
    from google.protobuf.message import Message

MIB = 1 << 20


def inside(number: int, raw: bytes) -> bytes:
    """Wrap bytes as a field of another message."""
    size, length = len(raw), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + raw


EMPTY_OPERATIONS = b"\x0a\x00" * (8 * MIB)
EMPTY_SELECTORS = b"\x12\x00" * (8 * MIB)
ONES = b"\x01" * (16 * MIB)
BOMBS: list[tuple[type[Message], bytes]] = [
    (pb.StreamRequest, EMPTY_OPERATIONS),
    (pb.UpdateRequest, EMPTY_SELECTORS),
    (pb.StreamRequest, inside(1, inside(4, EMPTY_SELECTORS))),
    (pb.BackwardRequest, inside(9, EMPTY_SELECTORS)),
    (pb.ForwardRequest, inside(5, inside(2, ONES))),
    (pb.ForwardRequest, inside(5, b"\x10\x01" * (8 * MIB))),
]


@pytest.mark.parametrize(("kind", "raw"), BOMBS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bomb_is_refused_without_being_built(kind: type[Message], raw: bytes) -> None:
    """Millions of empty parts or of dimensions cost a glance."""
    wire = Wire(kind)
    with pytest.raises(InvalidArgument) as caught:
        wire.check(raw)
    assert caught.value.reason == "MALFORMED"


def test_the_largest_honest_messages_pass() -> None:
    """A frame of 256 chunks, a chunk of 15 MiB, an Update over 10,000 contributions."""
    tensor = Tensor(dtype=1, shape=[1, 16, 256], data=bytes(16 * 256 * 4))  # type: ignore[arg-type]
    forward = pb.ForwardRequest(session_id="s", epoch=1, chunk_seq=1, xs=tensor)
    frame = pb.StreamRequest(operations=[pb.Operation(forward=forward)] * 256)
    Wire(type(frame)).check(frame.SerializeToString())
    forward.xs.data = bytes(15 * MIB)
    Wire(type(forward)).check(forward.SerializeToString())
    selectors = [pb.ContributionSelector(session_id=f"s{i}", epoch=1) for i in range(10_000)]
    update = pb.UpdateRequest(contributions=selectors)
    Wire(type(update)).check(update.SerializeToString())
    seqs = range(2**53 - 10_001, 2**53 - 1)
    update = pb.UpdateRequest(contributions=[pb.ContributionSelector(chunk_seqs=seqs)])
    Wire(type(update)).check(update.SerializeToString())


@pytest.mark.parametrize("cut", [5001, 6000, 9999])
def test_bytes_that_end_too_early_are_left_to_the_parser(cut: int) -> None:
    """Looking them over neither fails nor refuses."""
    raw = pb.UpdateRequest(contributions=[pb.ContributionSelector(session_id="s")] * 5000)
    Wire(type(raw)).check(raw.SerializeToString()[:cut])
    assert MAX_PARTS > 5000
