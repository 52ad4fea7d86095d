"""The password of the store's user, from a file: read for each connection, so that it may change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redis import exceptions as redis_errors
from redis.credentials import CredentialProvider

from service.files import read_file

if TYPE_CHECKING:
    from pathlib import Path


class PasswordFileError(Exception):
    """The file of the password cannot be used; one line that names it, without what it holds."""


class PasswordFile(CredentialProvider):
    """Gives redis-py the user and the password.

    A file that goes missing later is a failed login for redis-py: the store cannot be used until it is
    back, which health and the log say.
    """

    def __init__(self, username: str | None, path: Path) -> None:
        """Check that the password can be read.

        Raises:
            PasswordFileError: If it cannot.
        """
        self._username = username
        self._path = path
        self._read()

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return the password, after the user if there is one."""
        try:
            password = self._read()
        except PasswordFileError as error:
            raise redis_errors.AuthenticationError(str(error)) from error
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return the same; a small file is read at once, as certificates are."""
        return self.get_credentials()

    def _read(self) -> str:
        try:
            password = read_file(self._path).decode().rstrip("\r\n")
        except OSError as error:
            raise PasswordFileError(f"{self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise PasswordFileError(f"{self._path}: expected UTF-8 text") from error
        if not password or "\n" in password:
            raise PasswordFileError(f"{self._path}: expected one line, the password")
        return password
