"""From an exception to the status that a client sees. The only table of its kind.

A status carries the gRPC code, one line for people, and for programs an ErrorInfo with reason and
metadata; RetryInfo where trying again helps, BadRequest where one field is at fault, QuotaFailure
where a bound is reached. A unary call sends it in its trailers, a Stream in an OperationResult.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # has no stubs

from service.domain.errors import (
    Aborted,
    AlreadyExists,
    DomainError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from service.logs import FIELDS, REPEATED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

ERROR_DOMAIN: Final = "timernn"
DETAILS_KEY: Final = "grpc-status-details-bin"
OVERLOADED: Final = "OVERLOADED"

# Trailers are cut off at 8 KiB, which would hide the code itself, and base64 adds a third: the parts
# below keep a status under 4 KiB.
MAX_DETAILS_BYTES: Final = 4096
MAX_MESSAGE_BYTES: Final = 512
MAX_METADATA_BYTES: Final = 1024
MAX_FIELD_BYTES: Final = 128

_LOGGER = logging.getLogger(__name__)


class DeadlineExceeded(DomainError):
    """Not done in the time that there was."""


class Unauthenticated(DomainError):
    """There is no credential, or it is not good, or not any more."""


class PermissionDenied(DomainError):
    """The credential is good, but not for this."""


class UnknownService(NotFound):
    """What the health protocol answers for a name that is not served; it has no details."""


class Bug(DomainError):
    """A fault of the server's own code."""


_CODES: Final[dict[type[DomainError], grpc.StatusCode]] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    Aborted: grpc.StatusCode.ABORTED,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Bug: grpc.StatusCode.INTERNAL,
}


def refusal_of(error: BaseException, method: str) -> DomainError:
    """Return the refusal that an exception is to a client.

    Args:
        error: What a handler raised. A CancelledError here is one that the call did not ask for.
        method: What was called, for the log.
    """
    if isinstance(error, DomainError) and _code_for(type(error)):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(
            "DEADLINE_EXCEEDED",
            "not done in time; whether it was applied is unknown: send the same again",
        )
    if isinstance(error, asyncio.CancelledError):
        return Unavailable(
            "UNKNOWN_OUTCOME",
            "interrupted; whether it was applied is unknown: send the same again",
            retry_after_s=0.1,
        )
    if isinstance(error, MemoryError):
        return overloaded("memory", "is used up")
    error_id = secrets.token_hex(8)
    _LOGGER.error(
        "internal error %s in %s",
        error_id,
        method,
        exc_info=error,
        # A client that has found a bug can bring it about as often as it likes.
        extra={FIELDS: {"error_id": error_id}, REPEATED: ("bug", method, type(error).__name__)},
    )
    return Bug("BUG", f"internal error, id {error_id}", id=error_id)


def code_of(refusal: DomainError) -> grpc.StatusCode:
    """Return the status code of a refusal's branch."""
    return _code_for(type(refusal)) or grpc.StatusCode.INTERNAL


def refusal_to_status(refusal: DomainError) -> status_pb2.Status:
    """Return a refusal as a message: code, text and details."""
    code = code_of(refusal)
    status = status_pb2.Status(code=code.value[0], message=_cut(refusal.message, MAX_MESSAGE_BYTES))
    if not isinstance(refusal, UnknownService):
        for detail in _details_of(refusal, code, status.message):
            status.details.add().Pack(detail)
    return status


def overloaded(
    bound: str,
    state: str,
    *,
    owner: str = "this replica",
    retry_after_s: float = 0.1,
    limit: float | None = None,
) -> ResourceExhausted:
    """Make the refusal of more work than this replica takes at once, of everybody or of one tenant.

    Args:
        bound: What is bounded, in the name of its setting.
        state: How it stands.
        owner: Whose bound it is.
        retry_after_s: When it may be better, in seconds.
        limit: How much it is, if it is a number.
    """
    facts: dict[str, Any] = {} if limit is None else {"limit": f"{limit:.15g}"}
    return ResourceExhausted(
        OVERLOADED,
        f"{bound} of {owner} {state}: try again, or another replica",
        retry_after_s=retry_after_s,
        bound=bound,
        **facts,
    )


def malformed(message_name: str) -> InvalidArgument:
    """Make the refusal of bytes that are no message."""
    return InvalidArgument("MALFORMED", f"request is not a valid {message_name}")


def message_too_large(
    what: str,
    size_bytes: int,
    limit_bytes: int,
    *,
    advice: str = "split the chunk along T, or ask for less in return",
) -> ResourceExhausted:
    """Make the refusal of a message beyond the limit; `what` is "request" or "answer"."""
    return ResourceExhausted(
        "MESSAGE_TOO_LARGE",
        f"{what} of {size_bytes} bytes exceeds the limit of {limit_bytes}: {advice}",
        limit_bytes=limit_bytes,
        size_bytes=size_bytes,
    )


def draining() -> Unavailable:
    """Make the refusal of a call that comes while the server stops."""
    return Unavailable(
        "DRAINING", "this replica is about to stop: send the same to another", retry_after_s=0.0
    )


def idle_stream(idle_s: float) -> DeadlineExceeded:
    """Make the end of a stream on which nothing comes."""
    return DeadlineExceeded(
        "IDLE_STREAM", f"nothing came for {idle_s:g} s: open another stream", retry_after_s=0.0
    )


def slow_message(limit_s: float) -> DeadlineExceeded:
    """Make the end of a call whose message does not come."""
    return DeadlineExceeded(
        "SLOW_MESSAGE",
        f"the message did not arrive within {limit_s:g} s, and nothing was applied: send less at once",
    )


def _code_for(kind: type[BaseException]) -> grpc.StatusCode | None:
    return next((_CODES[each] for each in kind.__mro__ if each in _CODES), None)


def _details_of(error: DomainError, code: grpc.StatusCode, message: str) -> Iterator[Message]:
    yield _error_info(error)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    if error.field:
        yield _bad_request(error, message)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        yield _quota_failure(error, message)


def _error_info(error: DomainError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    room = MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        room -= len(key) + len(value.encode())
        if room >= 0:
            info.metadata[key] = value
    return info


def _bad_request(error: DomainError, message: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=_cut(error.field, MAX_FIELD_BYTES), description=message
    )
    return error_details_pb2.BadRequest(field_violations=[violation])


def _quota_failure(error: DomainError, message: str) -> error_details_pb2.QuotaFailure:
    violation = error_details_pb2.QuotaFailure.Violation(subject=error.reason, description=message)
    return error_details_pb2.QuotaFailure(violations=[violation])


def _cut(text: str, limit_bytes: int) -> str:
    raw = text.encode()
    if len(raw) <= limit_bytes:
        return text
    return raw[: limit_bytes - 3].decode(errors="ignore") + "..."
