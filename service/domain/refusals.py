"""The refusals that several operations share, so that one situation has one text everywhere."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from service.domain.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    UnsupportedLayout,
    bad_tensor,
    quoted,
)
from service.domain.finite import is_finite
from service.domain.ports import Absence, ContributionState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rnn_engine import Array
    from service.domain.errors import DomainError
    from service.domain.ports import AbsentSession
    from service.domain.types import Version


# In the text of each refusal that changed nothing.
UNCHANGED = "nothing was changed"
# What a store's port raises; see service.domain.ports.
STORE_FAILURES = (ResourceExhausted, Unavailable)


def check_tensor(field: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    """Raise BAD_TENSOR unless an array has this shape and dtype."""
    if array.dtype != dtype:
        raise bad_tensor(f"{field}.dtype", f"expected {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise bad_tensor(f"{field}.shape", f"expected {shape}, got {array.shape}")


def check_epoch(named: int, present: int, chunk_seq: int) -> None:
    """Raise unless a request names the present epoch.

    Raises:
        Aborted: EPOCH_FENCED for an older epoch; SEQ_GAP for a newer one, whose beginning the store lost.
    """
    if named < present:
        text = (
            f"another writer uses this session: epoch {named} was ended by a reset, set_state or "
            f"new open; the present is {present}"
        )
        raise Aborted("EPOCH_FENCED", text, epoch=present, chunk_seq=chunk_seq)
    if named > present:
        text = f"epoch {named} has not begun; the present is {present}, with chunk {chunk_seq}"
        raise Aborted("SEQ_GAP", text, epoch=present, expected_seq=chunk_seq + 1)


def session_absent(session_id: str, absent: AbsentSession) -> NotFound:
    """Make the refusal of a session that is not there."""
    texts = {
        Absence.NEVER: "no such session",
        Absence.EXPIRED: "the session has expired",
        Absence.CLOSED: "the session was closed",
    }
    text = f"session {quoted(session_id)}: {texts[absent.why]}"
    if not absent.expired_at_ms:
        return NotFound(absent.why.value, text, session_id=session_id)
    at = datetime.fromtimestamp(absent.expired_at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    text = f"{text}, at the latest at {at}"
    return NotFound(absent.why.value, text, session_id=session_id, expired_at=at)


def seq_gap(last: int, epoch: int) -> Aborted:
    """Make the refusal of a chunk that leaves a gap after the last one."""
    return Aborted(
        "SEQ_GAP",
        f"the last chunk is {last}: expected chunk_seq {last + 1}",
        expected_seq=last + 1,
        epoch=epoch,
    )


def seq_reused(chunk_seq: int) -> AlreadyExists:
    """Make the refusal of a chunk whose number was used for other content."""
    return AlreadyExists(
        "SEQ_REUSED",
        f"chunk {chunk_seq} was already applied with different content: "
        "another writer uses this session, or other data was sent under the same number",
        chunk_seq=chunk_seq,
    )


def history_forked(chunk_seq: int) -> Aborted:
    """Make the refusal of a request whose token belongs to another history of the session."""
    text = (
        f"the state after chunk {chunk_seq} is not the one that the token names: "
        "another writer uses this session, or writes were lost"
    )
    return Aborted("HISTORY_FORKED", text, chunk_seq=chunk_seq)


def replay_window_passed(chunk_seq: int, last_seq: int) -> FailedPrecondition:
    """Make the refusal to replay a chunk that was applied too long ago."""
    text = (
        f"chunk {chunk_seq} was applied, but what its answer needs is not kept any more; "
        f"the last chunk is {last_seq}"
    )
    if last_seq > chunk_seq:
        text += ": unless this one was sent before, another writer uses this session"
    return FailedPrecondition(
        "REPLAY_WINDOW_PASSED", text, applied=True, chunk_seq=chunk_seq, last_seq=last_seq
    )


def tape_quota(limit: int) -> ResourceExhausted:
    """Make the refusal of a TRAIN chunk of a session with too many tapes that wait."""
    text = (
        f"the tapes of this session that wait for their Backward have reached their limit of {limit}; "
        "send Backward or DiscardGradients, or use INFER"
    )
    return ResourceExhausted("TAPE_QUOTA", text, quota="tapes_per_session", limit=limit)


def tenant_tape_quota(limit: int | None) -> ResourceExhausted:
    """Make the refusal of a TRAIN chunk whose tape would be more than a tenant may have waiting."""
    text = (
        f"the tapes of this tenant that wait for their Backward would need more than {limit} bytes, "
        "the most there may be; send Backward or DiscardGradients, or use INFER"
    )
    return ResourceExhausted("TAPE_QUOTA", text, quota="tape_bytes_per_tenant", limit=limit)


def tape_missing(chunk_seq: int, state: ContributionState | None) -> FailedPrecondition:
    """Make the refusal of a Backward whose tape is not there.

    Args:
        chunk_seq: The chunk of the Backward.
        state: What has become of its contribution; None if it was never recorded.
    """
    if state:
        text = f"the gradient of chunk {chunk_seq} was recorded; its tape is not kept any more"
    else:
        text = (
            f"chunk {chunk_seq} has no tape: it ran in INFER mode, or its tape has expired, "
            "was discarded or pushed out"
        )
    return FailedPrecondition("TAPE_MISSING", text, **recorded_metadata(chunk_seq, state))


def recorded_metadata(chunk_seq: int, state: ContributionState | None) -> dict[str, Any]:
    """Return the metadata that say whether a gradient was recorded, and whether it still waits."""
    facts: dict[str, Any] = {"counted": state is not None, "chunk_seq": chunk_seq}
    if state is ContributionState.WAITING:
        facts["recorded"] = True
    return facts


def check_state(h: Array) -> None:
    """Raise NON_FINITE_RESULT if a computed state, (N, H), holds NaN.

    With finite weights NaN arises only from sums that overflow in both directions, and a row keeps it in
    all later steps. So a NaN anywhere in hs shows in the last state.
    """
    if is_finite(h):
        return
    row = int(np.isfinite(h).all(axis=1).argmin())
    text = (
        f"xs[{row}]: the state after it would be NaN, since products of inputs and weights overflow "
        f"{h.dtype}; {UNCHANGED}"
    )
    raise FailedPrecondition("NON_FINITE_RESULT", text, row=row)


def answer_too_large(size: int, limit: int) -> ResourceExhausted:
    """Make the refusal of a chunk whose answer would not fit into a message."""
    text = f"the answer would need {size} bytes, over the limit of {limit}: split along T"
    return ResourceExhausted("MESSAGE_TOO_LARGE", text, limit=limit, size=size)


def model_not_found(model_id: str, why: str = "no such model") -> NotFound:
    """Make the refusal of an unknown model."""
    return NotFound("MODEL_NOT_FOUND", f"model {quoted(model_id)}: {why}", model_id=model_id)


def checkpoint_not_found(checkpoint_id: str) -> NotFound:
    """Make the refusal of an unknown checkpoint."""
    text = f"checkpoint {quoted(checkpoint_id)}: no such checkpoint"
    return NotFound("CHECKPOINT_NOT_FOUND", text, checkpoint_id=checkpoint_id)


def version_gone(version: Version, head: Version) -> NotFound:
    """Make the refusal of a version that is not there."""
    text = f"weights version {version.number} is not there; the head is {head.number}"
    return NotFound(
        "VERSION_GONE", text, version=version.number, head=head.number, head_digest=head.digest
    )


def weights_forked(version: Version, found: Version) -> FailedPrecondition:
    """Make the refusal of a version whose digest is not that of its number."""
    text = (
        f"weights version {version.number} has other content than the one named "
        f"({version.digest.hex()} was named, {found.digest.hex()} is there)"
    )
    return FailedPrecondition("WEIGHTS_FORKED", text, version=version.number, digest=found.digest)


def version_conflict(expected: Version, head: Version) -> Aborted:
    """Make the refusal of a step from another head than the present one."""
    text = f"expected the head to be version {expected.number}, it is {head.number}"
    if expected.number == head.number:
        text = f"version {head.number} is the head, but with other content than expected"
    return Aborted("VERSION_CONFLICT", text, head=head.number, head_digest=head.digest)


def unsupported_layout(what: str, found: str, known: str) -> UnsupportedLayout:
    """Make the refusal of a record in the store whose layout is of another release.

    Args:
        what: The record, such as "the session's record".
        found: What is in it, such as "layout 77".
        known: What this release expects there, such as "layout 1".
    """
    text = (
        f"{what}: found {found}, this server knows {known}: another release wrote it; "
        f"{UNCHANGED}; ask a server of a release that knows it"
    )
    return UnsupportedLayout("UNSUPPORTED_LAYOUT", text, found=found, known=known)


def request_id_reused(what: str = "request") -> AlreadyExists:
    """Make the refusal of a request id that was used with other content, in a request or for a model."""
    text = f"request_id: it was used for a {what} with other content"
    return AlreadyExists("REQUEST_ID_REUSED", text, field="request_id")


@contextmanager
def after_decision() -> Iterator[None]:
    """Turn failures of the store into UNKNOWN_OUTCOME, once a part of a request was carried out.

    Raises:
        Unavailable: UNKNOWN_OUTCOME. The same call, sent again, finds what was done.
    """
    try:
        yield
    except STORE_FAILURES as error:
        text = "a part of it was carried out; send the same call again as it is"
        raise Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=error.retry_after_s) from error


def still_recorded(error: DomainError, chunk_seq: int) -> DomainError:
    """Add to the failure of a Backward's Update that the Backward itself was carried out.

    Its contribution waits, so the caller may name it in an Update of its own.
    """
    why = error.message.replace(UNCHANGED, "no step was made")
    text = f"{why}; the contribution of chunk {chunk_seq} is recorded: an Update may take it"
    return type(error)(
        error.reason,
        text,
        field=error.field,
        retry_after_s=error.retry_after_s,
        **{**error.metadata, "recorded": True},
    )


def cancelled_midway() -> Unavailable:
    """Make the answer to cancelled work: it may or may not have been carried out."""
    text = "the call was cut off midway: it may or may not be applied; send it again as it is"
    return Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=0.05)


def contended() -> Unavailable:
    """Make the refusal of a request that lost the race against other writers too often."""
    text = "other writers were faster each time; send the same call again"
    return Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=0.05)
