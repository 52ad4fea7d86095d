"""Files that a caller names, read whole: only what is a file or a pipe, and only up to a bound."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from os import PathLike

MAX_BYTES: Final = 16 << 20
"""How large a file is read that people write: of certificates, of keys."""

_PIECE_BYTES: Final = 1 << 20
_KINDS: Final = {stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def read_bytes(path: str | PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file, or what is written into a pipe until all its writers have closed it.

    Raises:
        OSError: If it cannot be read, is something else, or is larger than `max_bytes`.
        ValueError: If it is no path.
    """
    # Without O_NONBLOCK a pipe that nobody writes into would keep us waiting for ever: so it is an empty file.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
        found = os.fstat(file.fileno())
        kind = stat.S_IFMT(found.st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFIFO):
            got = _KINDS.get(kind, "something else")
            raise OSError(errno.EINVAL, f"expected a file, got {got}", os.fspath(path))
        os.set_blocking(file.fileno(), True)
        data = bytearray()
        while found.st_size <= max_bytes and len(data) <= max_bytes:
            if not (piece := file.read(_PIECE_BYTES)):
                return bytes(data)
            data += piece
    text = f"expected at most {max_bytes >> 20:,} MiB, got more"
    raise OSError(errno.EFBIG, text, os.fspath(path))
