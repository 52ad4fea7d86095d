"""Names that the client makes: for sessions, and for requests that must not be done twice."""

from __future__ import annotations

import secrets


def new_session_id() -> str:
    """Make a session name of 128 random bits that begins with a letter or a digit."""
    # A name may not begin with one of "._~-", which token_urlsafe also draws.
    return "s" + secrets.token_urlsafe(16)


def new_request_id() -> str:
    """Make a request id of 128 random bits."""
    return secrets.token_urlsafe(16)
