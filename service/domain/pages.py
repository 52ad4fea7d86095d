"""Page tokens: where the next page begins, in a form that nobody need read."""

from __future__ import annotations

import base64
import binascii
import json

from service.domain.errors import InvalidArgument


def token_from_position(position: tuple[str, ...]) -> str:
    """Make the token of a position in a list."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def position_from_token(token: str) -> tuple[str, str] | None:
    """Read a token; None for the first page.

    Raises:
        InvalidArgument: BAD_FIELD if no page answered this token.
    """
    if not token:
        return None
    try:
        name, score = json.loads(base64.urlsafe_b64decode(token.encode()))
        float(score or "0")
    except (ValueError, TypeError, binascii.Error) as error:
        text = "page_token: expected next_page_token of the page before"
        raise InvalidArgument("BAD_FIELD", text, field="page_token") from error
    if not isinstance(name, str) or not isinstance(score, str):
        raise InvalidArgument(
            "BAD_FIELD",
            "page_token: expected next_page_token of the page before",
            field="page_token",
        )
    return name, score
