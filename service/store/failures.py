"""What a store's failures mean to the domain. Its texts go to the log, never to a client."""

from __future__ import annotations

import logging
import time

from redis import exceptions as redis_errors

from service.domain.errors import DomainError, ResourceExhausted, Unavailable
from service.domain.refusals import UNCHANGED

_log = logging.getLogger(__name__)
RETRY_AFTER_S = 0.2
_BUGS = ("user_script:", "WRONGTYPE")  # how an error in a script of ours, or in a record, begins
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


def as_domain_error(error: Exception) -> Exception:
    """Turn a store's failure into the domain's word for it; bugs and other exceptions pass unchanged."""
    if isinstance(error, DomainError) or not isinstance(error, (redis_errors.RedisError, OSError)):
        return error
    if isinstance(error, redis_errors.ResponseError) and str(error).startswith(_BUGS):
        return error  # no try again helps: it is to be seen as what it is
    if isinstance(error, redis_errors.OutOfMemoryError) or str(error).startswith("OOM"):
        _failures.tell(error)
        return ResourceExhausted("STORE_FULL", f"the store is full; {UNCHANGED}", retry_after_s=1.0)
    _failures.tell(error)
    return Unavailable(
        "STORE_DOWN",
        "the store cannot be reached now; send the same call again",
        retry_after_s=RETRY_AFTER_S,
    )


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
