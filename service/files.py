"""Files that an operator names, read whole and up to a bound, and TOML.

The probe, which starts every few seconds, reads its file here: what this module imports is its cost. The client
library has its own `timernn._core.files`, since neither imports the other.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    from os import PathLike

MAX_BYTES: Final = 16 << 20
"""How large a file is read: those of settings, tokens, tenants, certificates, keys, passwords."""

_KINDS: Final = {
    stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
}  # fmt: skip


class TomlError(Exception):
    """A text is no TOML; the message says where, without the file's name."""


def open_file(path: str | PathLike[str], *, takes_pipe: bool = False) -> BinaryIO:
    """Open a file to read it.

    Args:
        path: Where it is.
        takes_pipe: Whether it may be a pipe as well, such as a shell's `<(command)`. What is read again when it
            changes may not.

    Raises:
        OSError: If it cannot be opened, or is something else, such as a device that never ends.
    """
    # Without O_NONBLOCK a pipe that nobody writes into would keep us waiting for ever: so it is an empty file.
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind == stat.S_IFREG or (takes_pipe and kind == stat.S_IFIFO):
        os.set_blocking(file.fileno(), True)
        return file
    file.close()
    got = _KINDS.get(kind, "something else")
    raise OSError(errno.EINVAL, f"expected a file, got {got}", os.fspath(path))


def read_file(path: str | PathLike[str], *, takes_pipe: bool = False) -> bytes:
    """Read a file whole.

    Args:
        path: Where it is.
        takes_pipe: As of `open_file`.

    Raises:
        OSError: If it cannot be read, is something else, or has more than `MAX_BYTES`.
    """
    with open_file(path, takes_pipe=takes_pipe) as file:
        return read_open(file, path)


def read_open(file: BinaryIO, path: str | PathLike[str]) -> bytes:
    """Read what `open_file` returned.

    Raises:
        OSError: If it cannot be read, or has more than `MAX_BYTES`.
    """
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        text = f"expected at most {MAX_BYTES >> 20} MiB, got more"
        raise OSError(errno.EFBIG, text, os.fspath(path))
    return data


def parse_toml(data: bytes, *, is_secret: bool = False) -> dict[str, Any]:
    """Parse TOML.

    Args:
        data: What a file holds.
        is_secret: Whether a message must not show what stands where the text is wrong.

    Raises:
        TomlError: If it is none.
    """
    import tomllib  # noqa: PLC0415 - not for a probe without a file

    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise TomlError("expected UTF-8 text") from error
    except RecursionError:
        raise TomlError("not valid TOML: nested too deeply") from None
    except ValueError as error:
        why = _where(error) if is_secret else str(error)
        raise TomlError(f"not valid TOML: {why}") from None  # a cause would show what stands there


def _where(error: ValueError) -> str:
    found = re.search(r"\(at (.*)\)$", str(error))
    return f"at {found[1]}" if found else "somewhere"
