"""Freed memory: kept for the next batch while there is work, given back to the system after a peak."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK_S: Final = 1.0
CALM_CHECKS: Final = 3
WORTH_BYTES: Final = 64 << 20
"""What must have been in work, or the process have grown by, for a return to be worth it."""

_STATM: Final = Path("/proc/self/statm")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the kernel and getting fresh pages again.

    glibc raises its thresholds to the size of the largest block that was ever freed, up to 32 MiB.
    Without this each larger batch pays about 2 us per page. See M_MMAP_THRESHOLD in mallopt(3).
    """
    block = np.empty(31 << 20, np.uint8)
    del block


def resident_bytes() -> int:
    """Return how much memory the process takes; 0 where the system does not say."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def return_freed_memory() -> None:
    """Give free pages back to the system, where the C library can: see malloc_trim(3).

    The garbage collector comes first: gRPC leaves a cycle for each call that was refused.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class FreedMemory:
    """Returns freed memory once the bytes in work have been few for some checks.

    With steady work nothing is returned: the next batch would only fetch it again.
    """

    def __init__(
        self,
        bytes_in_work: Callable[[], int],
        *,
        resident: Callable[[], int] = resident_bytes,
        give_back: Callable[[], None] = return_freed_memory,
    ) -> None:
        """Begin from what the process takes now."""
        self._bytes_in_work = bytes_in_work
        self._resident = resident
        self._give_back = give_back
        self._floor = resident()
        self._calm = 0
        self._is_owed = False

    async def watch(self) -> None:
        """Check once a second, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            if self.is_due():
                await asyncio.to_thread(self._give_back)
                self._floor, self._is_owed = self._resident(), False

    def is_due(self) -> bool:
        """Count this check, and return whether there is something to return."""
        is_calm = self._bytes_in_work() < WORTH_BYTES
        self._calm = self._calm + 1 if is_calm else 0
        if not is_calm or self._resident() > self._floor + WORTH_BYTES:
            self._is_owed = True
        return self._is_owed and self._calm >= CALM_CHECKS
