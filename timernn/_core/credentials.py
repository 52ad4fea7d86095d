"""What goes along with every call of a client: metadata of the caller's own, and a token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from timernn import errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    TokenSource: TypeAlias = "str | Callable[[], str] | Callable[[], Awaitable[str]] | None"
    Metadata: TypeAlias = "Mapping[str, str | bytes] | None"

_AUTHORIZATION = "authorization"
_KEY = re.compile(r"[0-9a-z_.-]+")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_VALUE = re.compile(r"[\x20-\x7e]*")


class Credentials:
    """The token in use and the metadata of every call; safe to share between threads.

    Args:
        token: The token, a callable that returns one, or None.
        metadata: Sent with every call.

    Attributes:
        metadata: What a call sends, as gRPC takes it; None for nothing.
        number: Of the token in use: how many a callable has given so far.
    """

    def __init__(self, token: TokenSource = None, metadata: Metadata = None) -> None:
        self._own = tuple((metadata or {}).items())
        self.source = token if callable(token) else None
        self.metadata: tuple[tuple[str, str | bytes], ...] | None = self._own or None
        self.number = 0
        self._is_refused = False
        if isinstance(token, str):
            self._use(token)

    @property
    def can_renew(self) -> bool:
        """Whether there is a callable to ask for another token."""
        return self.source is not None

    @property
    def is_due(self) -> bool:
        """Whether the callable is to be asked before the next call."""
        return self.can_renew and (not self.number or self._is_refused)

    def refuse(self, number: int) -> None:
        """Note that the server refuses a token; one that has taken its place since is not meant."""
        if number == self.number:
            self._is_refused = True

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Turn what the callable raises into an error of ours; its text may hold a secret.

        Raises:
            NoCredentials: In its place.
        """
        try:
            yield
        except Exception as error:
            text = f"token: the callable raised {type(error).__name__}, see this error's cause"
            raise errors.NoCredentials(text) from error

    def take(self, token: Any) -> None:
        """Use what the callable returned from now on.

        Raises:
            NoCredentials: If it is no token.
        """
        if not _is_token(token):
            got = "other characters" if isinstance(token, str) else type(token).__name__
            text = f"token: expected the callable to return visible ASCII characters, got {got}"
            raise errors.NoCredentials(text)
        self._use(token)
        self._is_refused = False
        self.number += 1

    def _use(self, token: str) -> None:
        self.metadata = (*self._own, (_AUTHORIZATION, f"Bearer {token}"))


def require_token(token: Any) -> None:
    """Refuse what is no token and no callable; the error does not show it.

    Raises:
        BadField: If it is neither.
    """
    if token is None or callable(token) or _is_token(token):
        return
    got = "other characters" if isinstance(token, str) else type(token).__name__
    raise errors.BadField(
        f"token: expected visible ASCII characters or a callable that returns them, got {got}",
        metadata={"field": "token"},
    )


def require_metadata(metadata: Any) -> None:
    """Refuse what gRPC cannot send, and what is the library's to send; values are not shown.

    Raises:
        BadField: If it is no mapping of keys to values, or has a key that is not free.
    """
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise _refused_metadata("a mapping of keys to values", type(metadata).__name__)
    for key, value in metadata.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key) or key.startswith("grpc-"):
            expected = "keys of lower-case letters, digits, '-', '_' and '.', none of gRPC's own"
            raise _refused_metadata(expected, repr(key))
        if key == _AUTHORIZATION:
            raise _refused_metadata("the token as `token`", repr(key))
        if key.endswith("-bin"):
            is_one = isinstance(value, bytes)
        else:
            is_one = isinstance(value, str) and _VALUE.fullmatch(value) is not None
        if not is_one:
            expected = f"ASCII characters for {key!r}, or bytes for a key that ends with '-bin'"
            raise _refused_metadata(expected, f"{type(value).__name__}")


def _refused_metadata(expected: str, got: str) -> errors.BadField:
    return errors.BadField(
        f"metadata: expected {expected}, got {got}", metadata={"field": "metadata"}
    )


def _is_token(value: object) -> bool:
    return isinstance(value, str) and _TOKEN.fullmatch(value) is not None
