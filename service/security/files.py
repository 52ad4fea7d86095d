"""Files with secrets: who may read them, how they are replaced, and that a change is noticed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from service.files import open_file, read_open

if TYPE_CHECKING:
    from collections.abc import Iterator

Stamp: TypeAlias = "tuple[int, int, int, int] | None"

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class SecretFileError(Exception):
    """A file with secrets cannot be used; one line that names it and says what to change."""


def read_private(path: Path) -> str:
    """Return the text of a file that only its owner may read.

    Where an orchestrator mounts a secret, root owns it and the server may read it by its group.

    Raises:
        SecretFileError: If it cannot be read, or if others may read or write it.
    """
    try:
        with open_file(path) as file:
            found = os.fstat(file.fileno())
            mode, is_own = found.st_mode, found.st_uid == os.geteuid()
            if stat.S_IMODE(mode) & (_OTHERS if is_own else _OTHERS & ~stat.S_IRGRP):
                text = f"{path}: expected mode 0600, got {stat.S_IMODE(mode):04o}: run `chmod 600 {path}`"
                raise SecretFileError(text)
            return read_open(file, path).decode()
    except OSError as error:
        raise SecretFileError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SecretFileError(f"{path}: expected UTF-8 text") from error


def replace_private(path: Path, text: str) -> None:
    """Replace a file by one of mode 0600 with this text: a reader sees the old one or the new one.

    Raises:
        SecretFileError: If the folder cannot be written.
    """
    try:
        # mkstemp makes it 0600. Only a file of the same folder can be renamed atomically.
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SecretFileError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other commands that change a file waiting meanwhile; the lock is `FILE.lock` beside it.

    The file itself cannot be the lock, because each change replaces it.

    Raises:
        SecretFileError: If the lock cannot be made.
    """
    try:
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SecretFileError(f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def stamp(path: Path) -> Stamp:
    """Return what changes with a file's content, mode or owner, through symbolic links; None if there is none.

    Secrets that an orchestrator mounts change by a swap of symbolic links: then the inode is another.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
