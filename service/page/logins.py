"""A login on the page: a signed statement which token logged in, and until when it counts.

The browser never keeps the token itself: a cookie goes to every port of its host. All replicas of a store share
the secret that signs, so a login on one counts on each; what the token may do is asked of the file of tokens
each time.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

COOKIE: Final = "timernn-login"
LOGIN_S: Final = 12 * 3600
_PURPOSE: Final = b"timernn page"


def signed(token_id: str, now_s: float, secret: bytes) -> str:
    """Return the cookie's value for the bearer of a token."""
    stated = f"{token_id}.{int(now_s) + LOGIN_S}"
    return f"{stated}.{_signature(stated, secret)}"


def verified(value: str, now_s: float, secret: bytes) -> str | None:
    """Return the id of the token that logged in; None if the value is not ours, or its time is over."""
    stated, _, signature = value.rpartition(".")
    if not hmac.compare_digest(_signature(stated, secret).encode(), signature.encode()):
        return None
    token_id, _, expires_s = stated.rpartition(".")
    return token_id if now_s < int(expires_s) else None


def _signature(stated: str, secret: bytes) -> str:
    return hmac.new(secret, _PURPOSE + stated.encode(), hashlib.sha256).hexdigest()
