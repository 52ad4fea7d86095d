"""How the values of the ports are laid out as bytes, for Python and for the Lua scripts alike.

Numbers are big-endian. What follows is layout 1, the only one that this release reads and writes. The number of
its layout stands in three places, and whoever reads one compares it before anything else:

- the first byte of a session's record. It governs all keys of the session's slot but the tapes: the ring, the
  marker and the entries of the list of tapes, which carry no number of their own;
- the first byte of a tape (service/domain/tapes.py);
- the field `layout` of a model's specification (service/domain/weights.py). It governs all keys of the model's
  slot. Each script that changes a model compares the incarnation first, and who refused a specification
  never learns that: so the scripts need not read the specification.

The scripts compare the byte of a record wherever they read one. What carries no number has a fixed length, which is
compared wherever it is taken apart. Anything else than what is known is UNSUPPORTED_LAYOUT: the scripts answer with
that error before their first write. A later layout has to differ in one of these: a new number, or for a model a
new field of its specification.

Session record: head (80) | tail: model id | ring of `slots` slots, chunk k at k mod slots.

| at | size | head |
| --- | --- | --- |
| 0 | 1 | layout, 1: `RECORD_LAYOUT` |
| 1 | 1 | slots of the ring |
| 2 | 2 | length of the tail |
| 4 | 4 | bytes of a state |
| 8 | 8 | epoch |
| 16 | 8 | chunk_seq |
| 24 | 8 | ttl in ms |
| 32 | 8 | when the entry in the tenant's list was last extended, ms |
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

| entry | holds |
| --- | --- |
| marker (9) | epoch, then `L` while the session lives, `C` once it was closed |
| tape_entry (33) | when the tape expires in ms, its bytes, `W` waiting or `C` consumed, token of its chunk |
| version_entry (30) | digest, bytes, parts, moments' parts, checkpoints that keep it |
| checkpoint (32) | number and digest of the version, time of creation in ms |
| contribution (25, 17) | `W`, digest, bytes of the gradient; or `C`, digest |
| its name (32) | digest of the session, epoch, chunk_seq |
| remembered request (16, 53) | digest of the content; after a step its answer: version, norm, clipped, contributions |
| beat of a replica | layout, 1: `BEAT_LAYOUT`; then its figures as JSON |
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from service.domain.digests import session_digest
from service.domain.ports import (
    Absence,
    AbsentSession,
    ContributionState,
    Remembered,
    SessionHead,
    StepAnswer,
    StoredState,
    WaitingContribution,
)
from service.domain.refusals import unsupported_layout
from service.domain.types import Checkpoint, ContributionKey, SessionKey, Version, WaitingTape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.domain.errors import UnsupportedLayout
    from service.domain.limits_policy import TenantLimits
    from service.domain.ports import (
        ChunkCommit,
        EpochStart,
    )
    from service.domain.types import ChunkKey, RequestDigest, Selector

RECORD_LAYOUT: Final = 1
BEAT_LAYOUT: Final = 1
MODEL_FIELDS: Final = ("incarnation", "spec", "head", "created", "waiting")
HEAD = struct.Struct(">BBHIQQQQ16sIBxxx16s")
SLOT = struct.Struct(">Q16s16sQ16s")
MARKER = struct.Struct(">Qc")
VERSION = struct.Struct(">Q16s")
VERSION_ENTRY = struct.Struct(">16sQHHH")
CHECKPOINT = struct.Struct(">Q16sQ")
TAPE_ENTRY = struct.Struct(">QQc16s")
WAITING_CONTRIBUTION = struct.Struct(">c16sQ")
CONSUMED_CONTRIBUTION = struct.Struct(">c16s")
TAPE_NAME = struct.Struct(">QQ")
CONTRIBUTION_NAME = struct.Struct(">16sQQ")
STEP_ANSWER = struct.Struct(">Q16sd?I")
DIGEST_BYTES = 16
_COMMIT = struct.Struct(">QQ16sIIQ16s16sQ16s")  # the last five are a slot's head
TAPE_LIMITS = struct.Struct(">IIQ")
_EPOCH_TAIL = struct.Struct(">16sIBxxx16s")

DTYPES = {"float32": 1, "float64": 2}
_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}
_NO_DIGEST = bytes(16)
_HALF = 8  # bytes of a request's name, and of its content, in a session's record

REFUSED: Final = (
    "UNSUPPORTED_LAYOUT "  # how a script's refusal begins; what and what was found follow
)
_WHAT_IS_KNOWN: Final = {
    "session": ("the session's record", f"layout {RECORD_LAYOUT}"),
    "marker": ("the session's marker", f"{MARKER.size} bytes"),
    "tape_entry": ("an entry of the session's tapes", f"{TAPE_ENTRY.size} bytes"),
    "model": ("the model's record", "all of " + ", ".join(MODEL_FIELDS)),
    "step_answer": ("the remembered answer of a step", f"{STEP_ANSWER.size} bytes"),
    "version": ("the name of a version", f"{VERSION.size} bytes"),
    "version_entry": ("an entry of the model's versions", f"{VERSION_ENTRY.size} bytes"),
    "checkpoint": ("a checkpoint of the model", f"{CHECKPOINT.size} bytes"),
    "contribution": (
        "an entry of the model's contributions",
        f"{WAITING_CONTRIBUTION.size} bytes waiting, {CONSUMED_CONTRIBUTION.size} consumed",
    ),
}


def unsupported_from_reply(reply: str) -> UnsupportedLayout:
    """Turn a script's refusal into the domain's."""
    what, _, found = reply.removeprefix(REFUSED).partition(" ")
    return _unsupported(what, found)


def fields_missing(missing: Sequence[str]) -> UnsupportedLayout:
    """Make the refusal of a model's record that lacks some of its fields."""
    return _unsupported("model", f"no {', '.join(missing)}")


def _unsupported(what: str, found: str) -> UnsupportedLayout:
    name, known = _WHAT_IS_KNOWN[what]
    return unsupported_layout(name, found, known)


def _unpacked(what: str, layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """Take apart what carries no number of a layout; another length is another layout."""
    if len(data) != layout.size:
        raise _unsupported(what, f"{len(data)} bytes")
    return layout.unpack(data)


def head_from_bytes(data: bytes) -> SessionHead:
    """Read the head and tail of a session's record, whose layout the script has compared."""
    _, _, tail, _, epoch, seq, ttl, _, _, batch, dtype, incarnation = HEAD.unpack_from(data)
    if dtype not in _DTYPE_NAMES:
        raise unsupported_layout(
            _WHAT_IS_KNOWN["session"][0], f"dtype {dtype}", f"dtypes {sorted(_DTYPE_NAMES)}"
        )
    return SessionHead(
        model_id=data[HEAD.size : HEAD.size + tail].decode(),
        incarnation=incarnation,
        dtype=_DTYPE_NAMES[dtype],
        batch_size=batch,
        epoch=epoch,
        chunk_seq=seq,
        ttl_ms=ttl,
    )


def epoch_request_to_bytes(request: RequestDigest) -> bytes:
    """Lay out the request that begins an epoch."""
    return request.name[:_HALF] + request.content[:_HALF]


def epoch_tail_to_bytes(start: EpochStart) -> bytes:
    """Lay out what follows the times in a session's record, up to the ring."""
    head = start.head
    fixed = _EPOCH_TAIL.pack(
        epoch_request_to_bytes(start.request), head.batch_size, DTYPES[head.dtype], head.incarnation
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
        state.chunk_seq, state.digest, state.token, version.number, version.digest or _NO_DIGEST
    )
    return head + state.state


def commit_to_parts(commit: ChunkCommit) -> tuple[bytes, bytes]:
    """Lay out a chunk's commit without its tape, as commit_chunks.lua reads it."""
    state = commit.state
    fixed = _COMMIT.pack(
        commit.epoch,
        commit.acknowledged_seq,
        commit.base_token,
        len(state.state),
        len(commit.tape or b""),
        state.chunk_seq,
        state.digest,
        state.token,
        state.version.number,
        state.version.digest,
    )
    return fixed, state.state


def tape_limits_to_bytes(limits: TenantLimits) -> bytes:
    """Lay out what a session may keep of tapes, as commit_chunks.lua reads it after a commit with a tape."""
    return TAPE_LIMITS.pack(
        limits.tapes_per_session,
        limits.counted_tapes_per_session,
        limits.counted_tape_bytes_per_session,
    )


def tape_name(chunk: ChunkKey) -> bytes:
    """Lay out which tape of its session a chunk's is; names sort by epoch and chunk."""
    return TAPE_NAME.pack(chunk.epoch, chunk.chunk_seq)


def waiting_tape_from_bytes(data: bytes) -> WaitingTape:
    """Read a tape's name and token."""
    epoch, chunk_seq = TAPE_NAME.unpack_from(data)
    return WaitingTape(epoch, chunk_seq, data[TAPE_NAME.size :])


def absence_from_marker(marker: bytes) -> AbsentSession:
    """Tell from its marker why a session is not there."""
    if not marker:
        return AbsentSession(Absence.NEVER)
    epoch, state = _unpacked("marker", MARKER, marker)
    return AbsentSession(Absence.CLOSED if state == b"C" else Absence.EXPIRED, epoch)


def version_to_bytes(version: Version) -> bytes:
    """Lay out the name of a weights version."""
    return VERSION.pack(version.number, version.digest)


def version_from_bytes(data: bytes) -> Version:
    """Read the name of a weights version."""
    return Version(*_unpacked("version", VERSION, data))


def tape_entry_from_bytes(entry: bytes) -> tuple[int, bytes]:
    """Read when a tape expires (ms, by the store's clock) and the token of its chunk, from its entry."""
    expires_ms, _, _, token = _unpacked("tape_entry", TAPE_ENTRY, entry)
    return expires_ms, token


class VersionEntry(NamedTuple):
    """What a model's entry of a version says: its digest, the parts of its weights and its moments."""

    digest: bytes
    weights_parts: int
    moments_parts: int


def version_entry_from_bytes(entry: bytes) -> VersionEntry:
    """Read the entry of a version."""
    digest, _, parts, moment_parts, _ = _unpacked("version_entry", VERSION_ENTRY, entry)
    return VersionEntry(digest, parts, moment_parts)


def checkpoint_from_bytes(name: str, data: bytes) -> Checkpoint:
    """Read a checkpoint."""
    number, digest, created = _unpacked("checkpoint", CHECKPOINT, data)
    return Checkpoint(name, Version(number, digest), created)


def contribution_state_from_bytes(entry: bytes) -> ContributionState:
    """Read from its entry what has become of a contribution."""
    is_waiting = entry[:1] == b"W"
    layout = WAITING_CONTRIBUTION if is_waiting else CONSUMED_CONTRIBUTION
    _unpacked("contribution", layout, entry)
    return ContributionState.WAITING if is_waiting else ContributionState.CONSUMED


def contribution_name(key: ContributionKey) -> bytes:
    """Lay out which contribution it is; names sort as their keys do."""
    return CONTRIBUTION_NAME.pack(*key)


def selectors_to_bytes(tenant: str, selectors: Sequence[Selector]) -> list[bytes]:
    """Lay out selectors as names, or as what names begin with; without any, as what all begin with."""
    names: list[bytes] = []
    for one in selectors:
        session = session_digest(SessionKey(tenant, one.session_id))
        if one.chunk_seqs:
            names += [CONTRIBUTION_NAME.pack(session, one.epoch, seq) for seq in one.chunk_seqs]
        else:
            names.append(session + (one.epoch.to_bytes(8, "big") if one.epoch else b""))
    return names or [b""]


def waiting_to_bytes(waiting: WaitingContribution) -> bytes:
    """Lay out a contribution that waits: its name, then its digest."""
    return CONTRIBUTION_NAME.pack(*waiting.key) + waiting.digest


def waiting_from_bytes(data: bytes) -> WaitingContribution:
    """Read a contribution that waits."""
    key = ContributionKey(*CONTRIBUTION_NAME.unpack_from(data))
    return WaitingContribution(key, data[CONTRIBUTION_NAME.size :])


def step_answer_to_bytes(answer: StepAnswer) -> bytes:
    """Lay out what is remembered of a step."""
    number, digest = answer.version
    return STEP_ANSWER.pack(
        number, digest, answer.gradient_norm, answer.clipped, answer.contribution_count
    )


def step_answer_from_bytes(data: bytes) -> StepAnswer | None:
    """Read what is remembered of a step; None of nothing."""
    if not data:
        return None
    number, digest, norm, clipped, count = _unpacked("step_answer", STEP_ANSWER, data)
    return StepAnswer(Version(number, digest), norm, clipped, count)


def beat_to_bytes(figures: Mapping[str, Any]) -> bytes:
    """Lay out what a replica says of itself."""
    return bytes([BEAT_LAYOUT]) + json.dumps(figures, separators=(",", ":")).encode()


def beat_from_bytes(data: bytes) -> dict[str, Any] | None:
    """Read what a replica says of itself; None if another release laid it out: it is only shown."""
    if data[:1] != bytes([BEAT_LAYOUT]):
        return None
    figures: dict[str, Any] = json.loads(data[1:])
    return figures


def remembered_from_bytes(data: bytes) -> Remembered | None:
    """Read what is remembered of a request id; None of nothing."""
    if not data:
        return None
    return Remembered(data[:DIGEST_BYTES], step_answer_from_bytes(data[DIGEST_BYTES:]))
