"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from service.security.files import SecretFileError, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from service.security.files import Stamp

T = TypeVar("T")

CHECK_S: Final = 1.0  # between two checks; a change has to count within 5 s

_LOGGER = logging.getLogger(__name__)


class Reloaded(Generic[T]):
    """The last good value of some files.

    Attributes:
        value: What was read last without an error.
        error: Why the files as they are now could not be read; None when they could.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        read: Callable[[], T],
        *,
        when_gone: Callable[[], T] | None = None,
    ) -> None:
        """Read the files for the first time.

        Args:
            name: What the log calls them.
            paths: Which files.
            read: Reads them.
            when_gone: Gives the value once a file is deleted; without it the last one stays.

        Raises:
            SecretFileError: If they cannot be read.
        """
        self._name = name
        self._paths = tuple(paths)
        self._read = read
        self._when_gone = when_gone
        # Taken before the files are read: what changes meanwhile is noticed by the next check.
        self._tried = self._stamps()
        self.value = read()
        self.error: str | None = None

    def check(self) -> bool:
        """Read the files again if they changed; return whether there is a new value.

        A failure is logged once, not at each check.
        """
        stamps = self._stamps()
        if stamps == self._tried:
            return False
        self._tried = stamps
        if self._when_gone is not None and None in stamps:
            _LOGGER.warning("%s: deleted", self._name)
            self.value, self.error = self._when_gone(), None
            return True
        try:
            value = self._read()
        except SecretFileError as error:
            self.error = str(error)
            _LOGGER.error("%s: what was read before stays in use: %s", self._name, error)  # noqa: TRY400 - one line
            return False
        self.value, self.error = value, None
        _LOGGER.info("%s: read again", self._name)
        return True

    async def watch(self, on_change: Callable[[T], None] | None = None) -> None:
        """Check for ever, beside the event loop: a file on a network may take its time."""
        while True:
            await asyncio.sleep(CHECK_S)
            try:
                has_changed = await asyncio.to_thread(self.check)
                if has_changed and on_change is not None:
                    on_change(self.value)
            except Exception:  # whatever it is, the next change has to be noticed
                _LOGGER.exception("%s: could not be taken over", self._name)

    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(stamp(path) for path in self._paths)
