"""SIGTERM and SIGINT before the server can handle them: the imports of a start take most of a second.

The first process of a container gets no default for a signal, so one that came in that time would be
lost, and the container be killed after its grace period. Python itself takes a while to get here; who
starts `timernn serve` with SIGTERM blocked, as the image and the supervisor of workers do, loses none at
all: a blocked signal waits, also for the first process.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

STOPS: Final = (signal.SIGTERM, signal.SIGINT)


def stop_early(arguments: Sequence[str]) -> None:
    """Let the signals that stop a process in; until `serve` handles them, they end it with exit code 0.

    Args:
        arguments: The words after `timernn`.
    """
    if arguments[:1] == ["serve"]:
        for number in STOPS:
            signal.signal(number, _exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _exit(_number: int, _frame: object) -> None:
    # Nothing has begun that would have to be ended, and an exception could be caught by an import.
    os._exit(0)
