"""Page tokens: where the next page of a listing begins, in a form opaque to the client."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, TypeGuard

from service.domain.errors import bad_field

if TYPE_CHECKING:
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
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise _refused() from error
    if not isinstance(name, str) or not _is_whole(score):
        raise _refused()
    return name, score


def _is_whole(score: object) -> TypeGuard[str]:
    """Return whether a position is a time in milliseconds, or empty."""
    return isinstance(score, str) and (score == "" or (score.isascii() and score.isdigit()))


def _refused() -> InvalidArgument:
    return bad_field("page_token", "expected next_page_token of the page before")
