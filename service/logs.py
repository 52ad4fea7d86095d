"""The log on stderr: one line per event, with the process id and the worker's number if there is one."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: str, worker: int = 0) -> None:
    """Write the log of this process to stderr.

    Args:
        level: The name of the lowest level that is written, in upper or lower case.
        worker: The number of this worker; 0 if the process is none.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    who = f"worker {worker} pid %(process)d" if worker else "pid %(process)d"
    logging.basicConfig(
        stream=sys.stderr,
        level=max(least, logging.INFO),  # gRPC has a debug line of its own for each call
        format=f"%(asctime)s %(levelname)s {who} %(name)s: %(message)s",
    )
    logging.getLogger("service").setLevel(least)
