"""A login on the page: a signed statement which token logged in, and until when it counts.

The browser never keeps the token itself: a cookie goes to every port of its host. All replicas of a store share
the secret that signs, so a login on one counts on each; what the token may do is asked of the file of tokens
each time.

A copy of a cookie must not outlive the login. So the statement also says how often logins of the token had been ended
when it was made, and the store keeps how often they have been by now: logging out ends all logins of the token, on
every replica. That is one small number for a token, however often somebody logs in and out.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, NamedTuple

COOKIE: Final = "timernn-login"
LOGIN_S: Final = 12 * 3600
_PURPOSE: Final = b"timernn page"


class Login(NamedTuple):
    """What a cookie states.

    Attributes:
        token_id: The id of the token that logged in.
        ended_before: How often the token's logins had been ended by then.
    """

    token_id: str
    ended_before: int


def signed(login: Login, now_s: float, secret: bytes) -> str:
    """Return the cookie's value for a login."""
    stated = f"{login.token_id}.{login.ended_before}.{int(now_s) + LOGIN_S}"
    return f"{stated}.{_signature(stated, secret)}"


def verified(value: str, now_s: float, secret: bytes) -> Login | None:
    """Return the login that a cookie states; None if the value is not ours, or its time is over."""
    stated, _, signature = value.rpartition(".")
    if not hmac.compare_digest(_signature(stated, secret).encode(), signature.encode()):
        return None
    token_id, *numbers = stated.rsplit(".", 2)
    if len(numbers) != 2:  # of an earlier release, which stated less
        return None
    ended_before, expires_s = map(int, numbers)
    return Login(token_id, ended_before) if now_s < expires_s else None


def _signature(stated: str, secret: bytes) -> str:
    return hmac.new(secret, _PURPOSE + stated.encode(), hashlib.sha256).hexdigest()
