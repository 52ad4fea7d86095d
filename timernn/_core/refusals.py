"""What an error proves about the request that it answers: one table for every kind of call.

A request is sent again when an attempt had no answer, so the error at the end may answer another
attempt than the one that was carried out. What was refused before its session or model had been
read (a full store, a quota, credentials) says nothing about the attempts before it.
"""

from __future__ import annotations

from enum import Enum, auto

from timernn import errors


class Proof(Enum):
    """How much an error proves."""

    NOTHING = auto()
    """Not even that this attempt was not carried out."""

    ATTEMPT = auto()
    """This attempt was not carried out; of the ones before it nothing is known."""

    REQUEST = auto()
    """No attempt of this content will be carried out at this place any more: the content is wrong,
    or the place was read and is taken, has ended or lacks what the request needs."""


# The nearest class decides, so a reason that this version does not know is judged by its status code.
_PROOFS: dict[type[errors.Error], Proof] = {
    errors.Error: Proof.NOTHING,
    errors.InvalidArgument: Proof.REQUEST,
    errors.NotFound: Proof.ATTEMPT,
    errors.SessionNotFound: Proof.REQUEST,
    errors.SessionExpired: Proof.REQUEST,
    errors.SessionClosed: Proof.REQUEST,
    errors.VersionGone: Proof.REQUEST,
    errors.AlreadyExists: Proof.REQUEST,
    errors.Aborted: Proof.NOTHING,
    errors.SeqGap: Proof.REQUEST,
    errors.EpochFenced: Proof.REQUEST,
    errors.HistoryForked: Proof.REQUEST,
    errors.VersionConflict: Proof.REQUEST,
    errors.FailedPrecondition: Proof.ATTEMPT,
    errors.TapeMissing: Proof.REQUEST,
    errors.WeightsForked: Proof.REQUEST,
    errors.NoGradients: Proof.REQUEST,
    errors.ReplayWindowPassed: Proof.REQUEST,
    errors.NonFiniteResult: Proof.REQUEST,
    errors.SessionMismatch: Proof.REQUEST,
    errors.UnsupportedLayout: Proof.ATTEMPT,  # an earlier one may have met a server that knows it
    errors.HistoryLost: Proof.REQUEST,
    errors.OutcomeLost: Proof.REQUEST,
    errors.ResourceExhausted: Proof.ATTEMPT,
    errors.TapeQuota: Proof.REQUEST,  # found by the script that had compared the place
    errors.Unauthenticated: Proof.ATTEMPT,
    errors.PermissionDenied: Proof.ATTEMPT,
    errors.Unimplemented: Proof.ATTEMPT,
    errors.Unavailable: Proof.NOTHING,
    errors.DeadlineExceeded: Proof.NOTHING,
    errors.Cancelled: Proof.NOTHING,
    errors.Internal: Proof.NOTHING,  # a bug may have come after the commit
}


def proof_of(error: BaseException) -> Proof:
    """Return what an error proves; anything but an answer of the service proves nothing."""
    kinds = (kind for kind in type(error).__mro__ if kind in _PROOFS)
    return _PROOFS[kind] if (kind := next(kinds, None)) else Proof.NOTHING


def leaves_in_doubt(error: BaseException, *, before: bool) -> bool:
    """Return whether a request may have been carried out all the same, or still may be.

    Args:
        error: What its last attempt ended with.
        before: Whether an earlier call had left it in doubt, or a part of it is applied.
    """
    proof = proof_of(error)
    if proof is Proof.REQUEST:
        return False
    had_unknown = isinstance(error, errors.Error) and error.is_outcome_unknown
    return before or had_unknown or proof is Proof.NOTHING
