"""The log on stderr: one line an event, with the process and, among workers, which one it is."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: str, worker: int = 0) -> None:
    """Write the log of this process to stderr.

    Args:
        level: The least level that is written, in any case.
        worker: The number of this worker; 0 for none.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    who = f"worker {worker} pid %(process)d" if worker else "pid %(process)d"
    logging.basicConfig(
        stream=sys.stderr,
        level=max(least, logging.INFO),  # gRPC has a debug line of its own for each call
        format=f"%(asctime)s %(levelname)s {who} %(name)s: %(message)s",
    )
    logging.getLogger("service").setLevel(least)
