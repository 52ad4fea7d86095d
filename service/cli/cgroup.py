"""How much memory this process may use, by its control group or its machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_NO_LIMIT: Final = 1 << 60  # version 1 says so of no limit


def memory_limit(root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return the smallest memory limit of this process's control groups, in bytes; None without one.

    Args:
        root: Where control groups are mounted.
        own: Names the groups of this process.
    """
    limits = [
        limit
        for file in _files(root, own)
        if (limit := _read(file)) is not None and limit < _NO_LIMIT
    ]
    return min(limits, default=None)


def machine_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _files(root: Path, own: Path) -> list[Path]:
    """Return the files that may hold a limit: of the process's group and of those around it."""
    files = [root / "memory.max", root / "memory" / "memory.limit_in_bytes"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, path = line.split(":", 2)
        group = Path(path.lstrip("/"))
        for each in (group, *group.parents):
            if not controllers:
                files.append(root / each / "memory.max")
            elif "memory" in controllers.split(","):
                files.append(root / "memory" / each / "memory.limit_in_bytes")
    return files


def _read(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
