"""Translates failures of the store into domain errors. The store's texts go to the log, never to a client."""

from __future__ import annotations

import logging
import re

from redis import exceptions as redis_errors

from service.connection_failures import in_words
from service.domain.errors import DomainError, ResourceExhausted, Unavailable
from service.domain.refusals import UNCHANGED
from service.logs import REPEATED
from service.store import layouts

# How redis-py names the server that it could not connect to.
_PLACE = re.compile(r" connecting to (\S+)\.(?: |$)")
_log = logging.getLogger(__name__)
RETRY_AFTER_S = 0.2
# How the message of an error in one of our scripts, or in a record's type, begins.
_BUGS = ("user_script:", "WRONGTYPE")
# The server adds this to the message of an error that was raised inside a script.
_IN_SCRIPT = "user_script:"
# Refusals of a primary that does not accept writes now, but can still be read.
_PRIMARY_REFUSES = ("OOM", "MISCONF", "NOREPLICAS")


def as_domain_error(error: Exception, *, is_decision: bool = False) -> Exception:
    """Translate a failure of the store into a domain error; bugs and other exceptions pass unchanged.

    Args:
        error: The failure of a command.
        is_decision: Whether the command may have taken effect before it failed.

    Returns:
        The error, whose cause is the failure.
    """
    made = _translated(error, is_decision=is_decision)
    if made is not error:
        made.__cause__ = error
    return made


def _translated(error: Exception, *, is_decision: bool) -> Exception:
    if isinstance(error, DomainError) or not isinstance(error, (redis_errors.RedisError, OSError)):
        return error
    if is_unsupported(error):
        return layouts.unsupported_from_reply(str(error))
    if is_decision and not is_refused(error):
        _report(error)
        return unknown_outcome()
    if isinstance(error, redis_errors.ResponseError) and str(error).startswith(_BUGS):
        return error  # a bug: a retry would not help
    _report(error)
    if _is_full(error):
        return ResourceExhausted("STORE_FULL", f"the store is full; {UNCHANGED}", retry_after_s=1.0)
    return Unavailable(
        "STORE_DOWN",
        "the store cannot be reached now, or refuses; send the same call again",
        retry_after_s=RETRY_AFTER_S,
    )


def _report(error: Exception) -> None:
    """Log a failure: a store that is down fails every call, so the lines are repeated ones."""
    name = type(error).__name__
    if _IN_SCRIPT in str(error):
        level, what = logging.ERROR, "a script failed midway: %s: %s"
    else:
        level, what = logging.WARNING, "the store failed: %s: %s"
    _log.log(level, what, name, error, extra={REPEATED: (what, name)})


def why(error: Exception) -> str:
    """Return in plain words, for an operator, why a store cannot be used: what the failure was made from."""
    found: BaseException = error
    if isinstance(error, DomainError) and error.__cause__ is not None:
        found = error.__cause__
    # Only these are no more than what the system or OpenSSL said; they name the server that was tried.
    if type(found) not in (redis_errors.ConnectionError, redis_errors.TimeoutError):
        return str(found)
    place = _PLACE.search(str(found))
    within = found
    while inner := within.__cause__ or within.__context__:
        within = inner
        if isinstance(within, OSError) and (words := in_words(within)):
            return f"{place[1]}: {words}" if place else words
    return str(found)


def unknown_outcome() -> Unavailable:
    """Make the error for a decision whose outcome is not known."""
    text = (
        "the store did not answer: it may or may not be applied; send the same call again as it is"
    )
    return Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=RETRY_AFTER_S)


def is_unsupported(error: object) -> bool:
    """Return whether a script refused a record with an unknown layout, which it does before it writes."""
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith(layouts.REFUSED)


def is_refusal(error: Exception) -> bool:
    """Return whether a domain error says that the decision was not made."""
    return isinstance(error, DomainError) and error.reason in ("STORE_FULL", "STORE_DOWN")


def is_refused(error: object) -> bool:
    """Return whether the server refused a command as a whole, before it ran.

    An error that names a line of a script was raised while the script ran, and what the script had
    written by then stays.
    """
    return isinstance(error, redis_errors.ResponseError) and _IN_SCRIPT not in str(error)


def is_refused_by_primary(error: object) -> bool:
    """Return whether a primary refused to write, so that its contents may still be read.

    A read-only replica refuses too, but it may lag behind: no decision may be based on its contents.
    """
    return is_refused(error) and (_is_full(error) or str(error).startswith(_PRIMARY_REFUSES))


def _is_full(error: object) -> bool:
    return isinstance(error, redis_errors.OutOfMemoryError) or str(error).startswith("OOM")


def is_lost_connection(error: object) -> bool:
    """Return whether a connection broke during a command, so that a retry on another one makes sense.

    After a timeout it does not: a silent store would use up the caller's time as well.
    """
    if isinstance(error, (redis_errors.TimeoutError, TimeoutError)):
        return False
    return isinstance(error, (redis_errors.ConnectionError, OSError))


def is_missing_script(error: object) -> bool:
    """Return whether the server does not know a script, after a restart, a promotion or SCRIPT FLUSH."""
    return isinstance(error, redis_errors.NoScriptError)
