"""How records are laid out as bytes, for Python and for the Lua scripts alike.

Numbers are big-endian. Each record begins with the number of its layout, so that a later one can be
told apart.

Session record: head (80) | tail: model id | ring of `slots` slots, chunk k at k mod slots.

| at | size | head |
| --- | --- | --- |
| 0 | 1 | layout, 1 |
| 1 | 1 | slots of the ring |
| 2 | 2 | length of the tail |
| 4 | 4 | bytes of a state |
| 8 | 8 | epoch |
| 16 | 8 | chunk_seq |
| 24 | 8 | ttl in ms |
| 32 | 8 | when the tenant's list was last told, ms |
| 40 | 16 | names the request which began the epoch (8) and its content (8) |
| 56 | 4 | batch size |
| 60 | 1 | dtype; three bytes of padding |
| 64 | 16 | incarnation of the model |

| at | size | slot |
| --- | --- | --- |
| 0 | 8 | chunk_seq |
| 8 | 16 | digest of the chunk's content |
| 24 | 16 | state token |
| 40 | 8 | weights version: number |
| 48 | 16 | weights version: digest |
| 64 | … | h |
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from service.domain.ports import (
    Absence,
    AbsentSession,
    SessionHead,
    StoredState,
)
from service.domain.types import Version, WaitingTape

if TYPE_CHECKING:
    from service.domain.ports import (
        ChunkCommit,
        EpochStart,
    )

HEAD = struct.Struct(">BBHIQQQQ16sIBxxx16s")
SLOT = struct.Struct(">Q16s16sQ16s")
MARKER = struct.Struct(">Qc")
VERSION = struct.Struct(">Q16s")
VERSION_ENTRY = struct.Struct(">16sQHHH")
CHECKPOINT = struct.Struct(">Q16sQ")
TAPE_NAME = struct.Struct(">QQ")
CONTRIBUTION_NAME = struct.Struct(">16sQQ")
_COMMIT = struct.Struct(">QQ16sQ16s16sQ16sII")
_EPOCH_TAIL = struct.Struct(">16sIBxxx16s")

DTYPES = {"float32": 1, "float64": 2}
_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}
_NO_REQUEST = bytes(16)


def head_from_bytes(data: bytes) -> SessionHead:
    """Read the head and tail of a session's record."""
    _, _, tail, _, epoch, seq, ttl, _, _, batch, dtype, incarnation = HEAD.unpack_from(data)
    return SessionHead(
        model_id=data[HEAD.size : HEAD.size + tail].decode(),
        incarnation=incarnation,
        dtype=_DTYPE_NAMES[dtype],
        batch_size=batch,
        epoch=epoch,
        chunk_seq=seq,
        ttl_ms=ttl,
    )


def epoch_tail_to_bytes(start: EpochStart) -> bytes:
    """Lay out what follows the times in a session's record, up to the ring."""
    head = start.head
    fixed = _EPOCH_TAIL.pack(
        start.request or _NO_REQUEST, head.batch_size, DTYPES[head.dtype], head.incarnation
    )
    return fixed + head.model_id.encode()


def state_from_bytes(slot: bytes) -> StoredState | None:
    """Read a slot of the ring; None for an empty answer."""
    if not slot:
        return None
    seq, digest, token, number, version_digest = SLOT.unpack_from(slot)
    return StoredState(seq, digest, token, Version(number, version_digest), slot[SLOT.size :])


def state_to_bytes(state: StoredState) -> bytes:
    """Lay out a slot of the ring."""
    version = state.version
    head = SLOT.pack(
        state.chunk_seq, state.digest, state.token, version.number, version.digest or _NO_REQUEST
    )
    return head + state.h


def commit_to_parts(commit: ChunkCommit) -> tuple[bytes, bytes]:
    """Lay out a chunk's commit without its tape, as commit_chunks.lua reads it."""
    state = commit.state
    fixed = _COMMIT.pack(
        commit.epoch,
        commit.acknowledged_seq,
        commit.base_token,
        state.chunk_seq,
        state.digest,
        state.token,
        state.version.number,
        state.version.digest,
        len(state.h),
        len(commit.tape or b""),
    )
    return fixed, state.h


def waiting_tape_from_bytes(data: bytes) -> WaitingTape:
    """Read a tape's name and token."""
    epoch, chunk_seq = TAPE_NAME.unpack_from(data)
    return WaitingTape(epoch, chunk_seq, data[TAPE_NAME.size :])


def absence_from_marker(marker: bytes) -> AbsentSession:
    """Tell from its marker why a session is not there."""
    if not marker:
        return AbsentSession(Absence.NEVER)
    epoch, state = MARKER.unpack(marker)
    return AbsentSession(Absence.CLOSED if state == b"C" else Absence.EXPIRED, epoch)


def version_to_bytes(version: Version) -> bytes:
    """Lay out the name of a weights version."""
    return VERSION.pack(version.number, version.digest)


def version_from_bytes(data: bytes) -> Version:
    """Read the name of a weights version."""
    return Version(*VERSION.unpack_from(data))
