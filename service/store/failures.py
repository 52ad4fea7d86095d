"""What a store's failures mean to the domain. Its texts go to the log, never to a client."""

from __future__ import annotations

import logging
import time

from redis import exceptions as redis_errors

from service.domain.errors import DomainError, ResourceExhausted, Unavailable
from service.domain.refusals import UNCHANGED
from service.store import layouts

_log = logging.getLogger(__name__)
RETRY_AFTER_S = 0.2
_BUGS = ("user_script:", "WRONGTYPE")  # how an error in a script of ours, or in a record, begins
_IN_SCRIPT = "user_script:"  # where it happened, as the server says of an error inside a script
_PRIMARY_REFUSES = ("OOM", "MISCONF", "NOREPLICAS")  # writes; it can be read all the same
_LOG_EVERY_S = 1.0  # a store that is down fails every call: one line a second tells as much


class _Log:
    """Tells of failures, one a second."""

    def __init__(self) -> None:
        self._next_at = 0.0

    def tell(self, error: Exception) -> None:
        now = time.monotonic()
        level = logging.WARNING if now >= self._next_at else logging.DEBUG
        if level == logging.WARNING:
            self._next_at = now + _LOG_EVERY_S
        _log.log(level, "the store failed: %s: %s", type(error).__name__, error)


_failures = _Log()


def as_domain_error(error: Exception, *, is_decision: bool = False) -> Exception:
    """Turn a store's failure into the domain's word for it; bugs and other exceptions pass unchanged.

    Args:
        error: What came in place of an answer.
        is_decision: Whether what failed may have written, which counts once it is written.
    """
    if isinstance(error, DomainError) or not isinstance(error, (redis_errors.RedisError, OSError)):
        return error
    if is_unsupported(error):
        return layouts.unsupported_from_reply(str(error))
    if is_decision and not is_refused(error):
        if _IN_SCRIPT in str(error):
            _log.error("a script failed midway: %s", error)
        _failures.tell(error)
        return unknown_outcome()
    if isinstance(error, redis_errors.ResponseError) and str(error).startswith(_BUGS):
        return error  # no try again helps: it is to be seen as what it is
    _failures.tell(error)
    if _is_full(error):
        return ResourceExhausted("STORE_FULL", f"the store is full; {UNCHANGED}", retry_after_s=1.0)
    return Unavailable(
        "STORE_DOWN",
        "the store cannot be reached now, or refuses; send the same call again",
        retry_after_s=RETRY_AFTER_S,
    )


def unknown_outcome() -> Unavailable:
    """Make the answer to a decision of which nobody knows whether it was made."""
    text = (
        "the store did not answer: it may or may not be applied; send the same call again as it is"
    )
    return Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=RETRY_AFTER_S)


def is_unsupported(error: object) -> bool:
    """Tell whether a script met what another release laid out; it says so before it writes."""
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(layouts.REFUSED)


def is_refusal(error: Exception) -> bool:
    """Tell whether the domain's word for a decision's failure says that nothing was decided."""
    return isinstance(error, DomainError) and error.reason in ("STORE_FULL", "STORE_DOWN")


def is_refused(error: object) -> bool:
    """Tell whether the server refused a command as a whole, before it ran.

    An error that names a line of a script came while it ran, and what it had written by then stays.
    """
    return isinstance(error, redis_errors.ResponseError) and _IN_SCRIPT not in str(error)


def is_refused_by_primary(error: object) -> bool:
    """Tell whether a primary refused to write, so that what it holds may still be read.

    A read-only replica refuses too, but it may lag behind: what it holds decides nothing.
    """
    return is_refused(error) and (_is_full(error) or str(error).startswith(_PRIMARY_REFUSES))


def _is_full(error: object) -> bool:
    return isinstance(error, redis_errors.OutOfMemoryError) or str(error).startswith("OOM")


def is_lost_connection(error: object) -> bool:
    """Tell whether a connection broke under a command, so that another one may do at once.

    A store that is silent has had its time: asked again it would only take the caller's too.
    """
    if isinstance(error, (redis_errors.TimeoutError, TimeoutError)):
        return False
    return isinstance(error, (redis_errors.ConnectionError, OSError))


def is_missing_script(error: object) -> bool:
    """Tell whether the server does not know a script: restarted, promoted or flushed."""
    return isinstance(error, redis_errors.NoScriptError)
