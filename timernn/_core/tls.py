"""TLS on the client's side: whom it believes, what it shows, and files that are read again."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, fields
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from timernn import errors
from timernn._core.arguments import refusal
from timernn._core.files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    Source: TypeAlias = "str | PathLike[str] | bytes | None"

_CHECK_EVERY_S = 1.0
_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_PEM = b"-----BEGIN "
_ENCRYPTED = re.compile(rb"-----BEGIN ENCRYPTED |^Proc-Type: 4,ENCRYPTED", re.MULTILINE)
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, repr=False)
class TLS:
    """How a client speaks TLS; an argument of `connect`.

    `ca`, `cert` and `key` are each a path, or what such a file holds: PEM, as bytes. Files are read
    again when they change.

    Attributes:
        ca: The authorities that servers' certificates have to be signed by; None: the public ones
            that gRPC brings along.
        cert: The client's own certificate, followed by those that signed it; None: it shows none.
        key: Its private key, without a password.
        server_name: The name that the server's certificate has to hold; None: the address's host.
    """

    ca: Source = None
    cert: Source = None
    key: Source = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse what names no files.

        Raises:
            BadField: If a part has the wrong type, or if only one of `cert` and `key` is given.
        """
        for name in _FILES:
            source = getattr(self, name)
            if isinstance(source, bytes):
                is_one = _PEM in source
            else:
                is_one = source is None or (isinstance(source, str | PathLike) and bool(source))
            if not is_one:
                got = type(source).__name__ if source else "nothing"
                raise _refused(name, "a path, or PEM as bytes", got)
        if (self.cert is None) != (self.key is None):
            missing = "key" if self.key is None else "cert"
            raise _refused(missing, "cert and key together", "one of them")
        host: Any = self.server_name
        if host is not None and not (isinstance(host, str) and _HOST.fullmatch(host)):
            raise refusal("tls.server_name", "a host's name or address", host, str)

    def __repr__(self) -> str:
        """Leave out what is given as bytes: it may be the key."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = [
            f"{name}={'<PEM>' if isinstance(value, bytes) else repr(value)}"
            for name, value in given.items()
            if value is not None
        ]
        return f"TLS({', '.join(shown)})"


_FILES = ("ca", "cert", "key")


def tls_of(value: Any) -> TLS | None:
    """Read the argument `tls` of `connect`: True is TLS without anything of the caller's own.

    Raises:
        BadField: If it is neither a bool nor a TLS.
    """
    if isinstance(value, TLS):
        return value
    if value is None or value is False:
        return None
    if value is True:
        return TLS()
    raise refusal("tls", "True, False or a timernn.TLS", value)


class Certificates:
    """What a TLS names, read: at first, and again when a file has changed.

    Args:
        tls: Names the files.
        clock: Monotonic seconds.

    Attributes:
        credentials: What channels are made with.
        server_name: As in the TLS.

    Raises:
        BadField: If a file cannot be read or holds something else.
    """

    def __init__(self, tls: TLS, clock: Callable[[], float] = time.monotonic) -> None:
        self._tls, self._clock = tls, clock
        self._paths = {
            name: Path(fspath(source))
            for name in _FILES
            if (source := getattr(tls, name)) is not None and not isinstance(source, bytes)
        }
        self.server_name = tls.server_name
        self._stamps, self._checked = self._stamp(), clock()
        self.credentials = self._read()

    def renew(self) -> bool:
        """Read the files again if they have changed; return whether there is something new.

        Files that do not belong together, as in the middle of a change, leave what was read before.
        """
        now = self._clock()
        if not self._paths or now < self._checked + _CHECK_EVERY_S:
            return False
        self._checked = now
        stamps = self._stamp()
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            self.credentials = self._read()
        except errors.BadField as error:
            _LOGGER.warning("what was read before stays in use: %s", error.message)
            return False
        return True

    def _stamp(self) -> list[tuple[int, int, int, int] | None]:
        """Return what changes with the files, their modes and owners, through symbolic links too."""
        return [_stamp(path) for path in self._paths.values()]

    def _read(self) -> grpc.ChannelCredentials:
        ca, cert, key = (self._content(name) for name in _FILES)
        # gRPC would only write on stderr what is wrong, and then fail at every connection.
        for name, content in (("ca", ca), ("cert", cert)):
            if content is not None:
                self._check_certificates(name, content)
        if key is not None:
            self._check_key(key)
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _content(self, name: str) -> bytes | None:
        path = self._paths.get(name)
        if path is None:
            return getattr(self._tls, name)  # type: ignore[no-any-return]  # bytes or None
        try:
            content = read_bytes(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "no path"
            raise _refused(name, "a file that can be read", f"{str(path)!r}: {why}") from error
        if _PEM not in content:
            raise _refused(name, "a file in PEM", repr(str(path)))
        return content

    def _check_certificates(self, name: str, content: bytes) -> None:
        import ssl  # noqa: PLC0415  # not for clients without TLS

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
                cadata=content.decode("ascii", "ignore")
            )
        except (ssl.SSLError, ValueError) as error:
            raise _refused(name, "certificates in PEM", self._shown(name)) from error

    def _check_key(self, content: bytes) -> None:
        import ssl  # noqa: PLC0415  # not for clients without TLS

        if _ENCRYPTED.search(content):
            raise _refused("key", "a key without a password", self._shown("key"))
        cert, key = self._paths.get("cert"), self._paths.get("key")
        if cert is None or key is None:
            return  # Python's ssl takes pairs from files alone
        try:
            # A password would be asked for on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=lambda: b"")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            is_other = "MISMATCH" in (getattr(error, "reason", None) or "")
            expected = f"the key of {str(cert)!r}" if is_other else "a private key in PEM"
            raise _refused("key", expected, self._shown("key")) from error

    def _shown(self, name: str) -> str:
        """Return what a message calls a part: its path, or nothing of what was given as bytes."""
        return repr(str(self._paths[name])) if name in self._paths else "other bytes"


def _refused(name: str, expected: str, got: str) -> errors.BadField:
    """Return the error of a part of `tls`, which shows no content."""
    field = f"tls.{name}"
    return errors.BadField(f"{field}: expected {expected}, got {got}", metadata={"field": field})


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
