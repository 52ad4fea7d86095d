"""What can go wrong, as one tree of exceptions.

Every class below the second level stands for one `reason` of the contract; the second level stands
for a gRPC status code, so that `except timernn.Unavailable` catches all its reasons.

Error:
    ├── InvalidArgument (also a ValueError)
    │   ├── Malformed, BadField, BadTensor, NonFinite, BadWeights
    ├── NotFound
    │   ├── SessionNotFound, SessionExpired, SessionClosed
    │   ├── ModelNotFound, VersionGone, CheckpointNotFound
    ├── AlreadyExists
    │   ├── SessionExists, ModelExists, CheckpointExists, SeqReused, RequestIdReused
    ├── Aborted
    │   ├── SeqGap, EpochFenced, HistoryForked, VersionConflict
    ├── FailedPrecondition
    │   ├── TapeMissing, WeightsForked, NoGradients, ReplayWindowPassed, NonFiniteResult
    │   ├── SessionMismatch, UnsupportedLayout
    │   ├── HistoryLost      (the client's own: its journal does not reach back to what was lost)
    │   ├── OutcomeLost      (the client's own: too late to find out whether a step was made)
    │   ├── SessionBusy      (the client's own: a stream is using the session)
    │   ├── SessionNotOpen   (the client's own, with asyncio: nobody has awaited its opening)
    │   └── ClientClosed, WrongProcess, WrongLoop      (the client's own: it cannot be used here)
    ├── ResourceExhausted
    │   ├── MaxSessions, MaxModels, MaxCheckpoints
    │   ├── TapeQuota, MessageTooLarge, StoreFull, Overloaded
    ├── Unauthenticated
    │   └── NoCredentials, BadCredentials
    ├── PermissionDenied
    │   └── Role
    ├── Unavailable
    │   ├── StoreDown, Draining, UnknownOutcome
    │   ├── NoServer         (the client's own: nothing accepts connections there)
    │   └── TlsFailed        (the client's own: the two sides cannot agree on TLS)
    ├── DeadlineExceeded
    ├── Cancelled
    ├── Unimplemented
    └── Internal
        └── Bug

A reason that this version does not know becomes the class of its status code, with `reason` set.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar, Self

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = [
    "Aborted",
    "AlreadyExists",
    "BadCredentials",
    "BadField",
    "BadTensor",
    "BadWeights",
    "Bug",
    "Cancelled",
    "CheckpointExists",
    "CheckpointNotFound",
    "ClientClosed",
    "DeadlineExceeded",
    "Draining",
    "EpochFenced",
    "Error",
    "FailedPrecondition",
    "HistoryForked",
    "HistoryLost",
    "Internal",
    "InvalidArgument",
    "Malformed",
    "MaxCheckpoints",
    "MaxModels",
    "MaxSessions",
    "MessageTooLarge",
    "ModelExists",
    "ModelNotFound",
    "NoCredentials",
    "NoGradients",
    "NoServer",
    "NonFinite",
    "NonFiniteResult",
    "NotFound",
    "OutcomeLost",
    "Overloaded",
    "PermissionDenied",
    "ReplayWindowPassed",
    "RequestIdReused",
    "ResourceExhausted",
    "Role",
    "SeqGap",
    "SeqReused",
    "SessionBusy",
    "SessionClosed",
    "SessionExists",
    "SessionExpired",
    "SessionMismatch",
    "SessionNotFound",
    "SessionNotOpen",
    "StoreDown",
    "StoreFull",
    "TapeMissing",
    "TapeQuota",
    "TlsFailed",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownOutcome",
    "UnsupportedLayout",
    "VersionConflict",
    "VersionGone",
    "WeightsForked",
    "WrongLoop",
    "WrongProcess",
]


class Error(Exception):
    """Anything that the service or this library refuses or fails at.

    Attributes:
        message: What was expected, what came, what to do.
        reason: The contract's name of the cause, such as "SEQ_GAP"; empty when the failure came
            from gRPC itself.
        metadata: Details by name, such as {"expected_seq": "4"}.
        code: The gRPC status code.
        retry_after_s: When the server advises to try again, in seconds from the answer; else None.
        attempts: How often the call had been tried when it was given up.
        is_outcome_unknown: Whether an attempt may have been carried out all the same.
        cause: What it was made of, such as gRPC's own error; None if nothing.
    """

    CODE: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    REASON: ClassVar[str] = ""

    def __init__(
        self,
        message: str = "",
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = self.REASON if reason is None else reason
        self.metadata = dict(metadata or {})
        self.code = self.CODE if code is None else code
        self.retry_after_s = retry_after_s
        self.attempts = 1
        self.is_outcome_unknown = False
        # Whether an attempt had an unknown outcome, also where this error settles it: the store may lose
        # what the error was read from, and not what the attempt had written elsewhere.
        self._had_unknown_attempt = False
        self.cause: BaseException | None = None

    def at_chunk(self, chunk_seq: int) -> Self:
        """Return a copy that names the chunk, where one of several may have failed."""
        named = copy.copy(self).with_traceback(self.__traceback__)
        named.message = f"chunk {chunk_seq}: {self.message}"
        named.metadata = {**self.metadata, "chunk_seq": str(chunk_seq)}
        named.__cause__, named.cause = self.__cause__, self.cause
        return named

    def __reduce__(self) -> tuple[type[Self], tuple[str], dict[str, object]]:
        """Copy and pickle without the cause: gRPC's own errors hold locks."""
        return type(self), (self.message,), {**vars(self), "cause": None}

    def __str__(self) -> str:
        name = self.reason or self.code.name
        return f"{name}: {self.message}" if self.message else name


class InvalidArgument(Error, ValueError):
    """The request itself is wrong; sending it again will not help."""

    CODE = grpc.StatusCode.INVALID_ARGUMENT


class Malformed(InvalidArgument):
    """The server could not read the message."""

    REASON = "MALFORMED"


class BadField(InvalidArgument):
    """A field has a value outside its range."""

    REASON = "BAD_FIELD"


class BadTensor(InvalidArgument):
    """An array has the wrong shape, element type or size."""

    REASON = "BAD_TENSOR"


class NonFinite(InvalidArgument):
    """An array holds NaN or infinity."""

    REASON = "NON_FINITE"


class BadWeights(InvalidArgument):
    """A weights file is not a safetensors file of the model's tensors."""

    REASON = "BAD_WEIGHTS"


class NotFound(Error):
    """What was named does not exist."""

    CODE = grpc.StatusCode.NOT_FOUND


class SessionNotFound(NotFound):
    """No session of this name is known."""

    REASON = "SESSION_NOT_FOUND"


class SessionExpired(NotFound):
    """The session was not used for its time to live."""

    REASON = "SESSION_EXPIRED"


class SessionClosed(NotFound):
    """The session was closed."""

    REASON = "SESSION_CLOSED"


class ModelNotFound(NotFound):
    """No model of this name, or the session's model was deleted."""

    REASON = "MODEL_NOT_FOUND"


class VersionGone(NotFound):
    """The weights version is not kept any more, or not known."""

    REASON = "VERSION_GONE"


class CheckpointNotFound(NotFound):
    """No checkpoint of this name."""

    REASON = "CHECKPOINT_NOT_FOUND"


class AlreadyExists(Error):
    """A name or number is taken by other content."""

    CODE = grpc.StatusCode.ALREADY_EXISTS


class SessionExists(AlreadyExists):
    """A live session has this name."""

    REASON = "SESSION_EXISTS"


class ModelExists(AlreadyExists):
    """A model has this name."""

    REASON = "MODEL_EXISTS"


class CheckpointExists(AlreadyExists):
    """A checkpoint of another version has this name."""

    REASON = "CHECKPOINT_EXISTS"


class SeqReused(AlreadyExists):
    """Another writer has applied other content under this chunk's number."""

    REASON = "SEQ_REUSED"


class RequestIdReused(AlreadyExists):
    """The request id was used with other content."""

    REASON = "REQUEST_ID_REUSED"


class Aborted(Error):
    """Something else happened first."""

    CODE = grpc.StatusCode.ABORTED


class SeqGap(Aborted):
    """The chunk's number is not the next one of the session."""

    REASON = "SEQ_GAP"


class EpochFenced(Aborted):
    """The session was reset, or its state set, by somebody else."""

    REASON = "EPOCH_FENCED"


class HistoryForked(Aborted):
    """Another history stands under the same numbers: another writer used a gap."""

    REASON = "HISTORY_FORKED"


class VersionConflict(Aborted):
    """The model's head is not the expected version: another trainer made a step."""

    REASON = "VERSION_CONFLICT"


class FailedPrecondition(Error):
    """Something has to be put right first."""

    CODE = grpc.StatusCode.FAILED_PRECONDITION


class TapeMissing(FailedPrecondition):
    """No Forward in training mode waits for this Backward, or its tape has gone."""

    REASON = "TAPE_MISSING"


class WeightsForked(FailedPrecondition):
    """The version's number exists with other content."""

    REASON = "WEIGHTS_FORKED"


class NoGradients(FailedPrecondition):
    """A contribution that the Update takes is not there, or there is none."""

    REASON = "NO_GRADIENTS"


class ReplayWindowPassed(FailedPrecondition):
    """The chunk was applied, but what its outputs are computed from is not kept any more."""

    REASON = "REPLAY_WINDOW_PASSED"


class NonFiniteResult(FailedPrecondition):
    """A state, a gradient, or a step's weights or moments would be NaN or infinite; nothing was changed."""

    REASON = "NON_FINITE_RESULT"


class SessionMismatch(FailedPrecondition):
    """The live session of this name runs another model."""

    REASON = "SESSION_MISMATCH"


class UnsupportedLayout(FailedPrecondition):
    """A server of another release wrote what the request needs, and this one does not know its layout.

    Nothing was changed. `metadata` says what was found and what the server knows; a server of a release that
    knows the layout can answer.
    """

    REASON = "UNSUPPORTED_LAYOUT"


class HistoryLost(FailedPrecondition):
    """The store lost writes from before this client's journal begins, which cannot heal them."""

    REASON = "HISTORY_LOST"


class OutcomeLost(FailedPrecondition):
    """A step in doubt is older than the server's memory of it: it may be made or not, for good."""

    REASON = "OUTCOME_LOST"


class SessionBusy(FailedPrecondition):
    """A `stream()` is using the session; finish or close it first."""

    REASON = "SESSION_BUSY"


class SessionNotOpen(FailedPrecondition):
    """The session's opening has not been awaited, or has failed. The client's own."""

    REASON = "SESSION_NOT_OPEN"


class ClientClosed(FailedPrecondition):
    """The client was closed."""

    REASON = "CLIENT_CLOSED"


class WrongProcess(FailedPrecondition):
    """The client was made before a fork, or gRPC cannot run in a forked process."""

    REASON = "WRONG_PROCESS"


class WrongLoop(FailedPrecondition):
    """The asyncio client belongs to another event loop, that of its first call."""

    REASON = "WRONG_LOOP"


class ResourceExhausted(Error):
    """A quota or a size limit is used up."""

    CODE = grpc.StatusCode.RESOURCE_EXHAUSTED


class MaxSessions(ResourceExhausted):
    """The tenant has as many live sessions as it may have."""

    REASON = "MAX_SESSIONS"


class MaxModels(ResourceExhausted):
    """The tenant has as many models as it may have."""

    REASON = "MAX_MODELS"


class MaxCheckpoints(ResourceExhausted):
    """The model has as many checkpoints as it may have."""

    REASON = "MAX_CHECKPOINTS"


class TapeQuota(ResourceExhausted):
    """Tapes or contributions wait in too great a number or size."""

    REASON = "TAPE_QUOTA"


class MessageTooLarge(ResourceExhausted):
    """One message is larger than allowed and cannot be split along T."""

    REASON = "MESSAGE_TOO_LARGE"


class StoreFull(ResourceExhausted):
    """The store has no memory left."""

    REASON = "STORE_FULL"


class Overloaded(ResourceExhausted):
    """The replica has too much in work."""

    REASON = "OVERLOADED"


class Unauthenticated(Error):
    """The call carries no credential that counts."""

    CODE = grpc.StatusCode.UNAUTHENTICATED


class NoCredentials(Unauthenticated):
    """The server wants a token, and none was sent; or the callable that `token` is has given none."""

    REASON = "NO_CREDENTIALS"


class BadCredentials(Unauthenticated):
    """The token is wrong, expired or revoked."""

    REASON = "BAD_CREDENTIALS"


class PermissionDenied(Error):
    """The credential does not allow this."""

    CODE = grpc.StatusCode.PERMISSION_DENIED


class Role(PermissionDenied):
    """The credential's role is too small for the call."""

    REASON = "ROLE"


class Unavailable(Error):
    """The service could not be reached, or not now."""

    CODE = grpc.StatusCode.UNAVAILABLE


class StoreDown(Unavailable):
    """The server's store cannot be reached."""

    REASON = "STORE_DOWN"


class Draining(Unavailable):
    """The server is about to stop."""

    REASON = "DRAINING"


class UnknownOutcome(Unavailable):
    """The server does not know whether its write took effect."""

    REASON = "UNKNOWN_OUTCOME"


class NoServer(Unavailable):
    """Nothing accepts connections at the address, or its name cannot be resolved: then its metadata has the `host`."""

    REASON = "NO_SERVER"


class TlsFailed(Unavailable):
    """No connection, because of TLS: one side speaks it alone, or a certificate is not accepted.

    Its metadata has what is wrong, `problem`, and the part of the argument `tls` that it hangs on, `part`.
    """

    REASON = "TLS_FAILED"


class DeadlineExceeded(Error):
    """The time given for the call is over."""

    CODE = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(Error):
    """The call was cancelled from the other side."""

    CODE = grpc.StatusCode.CANCELLED


class Unimplemented(Error):
    """The server does not have this method."""

    CODE = grpc.StatusCode.UNIMPLEMENTED


class Internal(Error):
    """The server failed in a way that it does not explain."""

    CODE = grpc.StatusCode.INTERNAL


class Bug(Internal):
    """A bug of the server; the message holds an id that stands in its log."""

    REASON = "BUG"


def _tree(root: type[Error]) -> list[type[Error]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


BY_REASON: dict[str, type[Error]] = {kind.REASON: kind for kind in _tree(Error) if kind.REASON}
BY_CODE: dict[grpc.StatusCode, type[Error]] = {
    kind.CODE: kind for kind in _tree(Error) if not kind.REASON
}
