"""This project's server under cProfile, which can count its Python calls for a while.

Run by path, as ``python -P profiled_server.py serve ...``, with the checkout to be measured on PYTHONPATH: an earlier
one does not have this file. On SIGUSR1 it prints ``counting``, on the next one ``counted N``, and so on.
"""

import cProfile
import pstats
import signal
import sys
from typing import Any

from service.cli import main

_PROFILE: Any = None  # of a count that has begun


def _begin_or_end(_signal: int, _frame: object) -> None:
    global _PROFILE  # noqa: PLW0603 - a signal handler has no other place to keep it
    if _PROFILE is None:
        print("counting", flush=True)
        _PROFILE = cProfile.Profile()
        _PROFILE.enable()
    else:
        _PROFILE.disable()
        calls: Any = pstats.Stats(_PROFILE)
        _PROFILE = None
        print("counted", calls.total_calls, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _begin_or_end)
    sys.exit(main())
