"""What can go wrong, as one tree. A transport maps each branch to a status code.

    DomainError
    ├── InvalidArgument      the request can never be right: BAD_FIELD, BAD_TENSOR, NON_FINITE, …
    ├── NotFound             SESSION_NOT_FOUND, SESSION_EXPIRED, SESSION_CLOSED, MODEL_NOT_FOUND, …
    ├── AlreadyExists        SESSION_EXISTS, MODEL_EXISTS, SEQ_REUSED, REQUEST_ID_REUSED, …
    ├── Aborted              SEQ_GAP, EPOCH_FENCED, HISTORY_FORKED, VERSION_CONFLICT
    ├── FailedPrecondition   TAPE_MISSING, WEIGHTS_FORKED, NO_GRADIENTS, …
    │   └── UnsupportedLayout    UNSUPPORTED_LAYOUT
    ├── ResourceExhausted    MAX_SESSIONS, TAPE_QUOTA, STORE_FULL, OVERLOADED, …
    └── Unavailable          STORE_DOWN, DRAINING, UNKNOWN_OUTCOME

A message says what was expected, what came and, where it helps, what to do. It never carries a
store's text, a path or more than 64 characters of what the client sent.
"""

from __future__ import annotations


class DomainError(Exception):
    """A refusal that the caller gets as a typed error.

    Attributes:
        reason: The stable name of the situation, for programs.
        message: One line for people.
        metadata: Facts for programs, all strings.
        field: The request field at fault, or empty.
        retry_after_s: When trying again makes sense, in seconds, or None where it does not help.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        **metadata: object,
    ) -> None:
        """Keep the facts; metadata values become strings."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = {key: _text(value) for key, value in metadata.items()}


class InvalidArgument(DomainError):
    """The request can never be right."""


class NotFound(DomainError):
    """What the request names is not there, or not any more."""


class AlreadyExists(DomainError):
    """The name is taken by something else."""


class Aborted(DomainError):
    """Another writer was first, or the store lost writes: read again and decide."""


class FailedPrecondition(DomainError):
    """The state does not allow it until something else is done."""


class UnsupportedLayout(FailedPrecondition):
    """Something in the store has a layout of another release: nothing may be concluded from it."""


class ResourceExhausted(DomainError):
    """A bound is reached."""


class Unavailable(DomainError):
    """Not now: the same call may be sent again."""


def bad_field(field: str, message: str) -> InvalidArgument:
    """Make the refusal of a field that is not a tensor."""
    return InvalidArgument("BAD_FIELD", f"{field}: {message}", field=field)


def bad_tensor(field: str, message: str) -> InvalidArgument:
    """Make the refusal of a tensor by its dtype, shape or size."""
    return InvalidArgument("BAD_TENSOR", f"{field}: {message}", field=field)


def quoted(text: str, limit: int = 64) -> str:
    """Return client text for a message: escaped, and cut to `limit` characters."""
    shown = text.encode("unicode_escape").decode("ascii")
    return f"'{shown[:limit]}…'" if len(shown) > limit else f"'{shown}'"


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
