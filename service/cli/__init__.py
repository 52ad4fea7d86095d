"""The `timernn` command: run a server, manage its models and sessions.

Errors are one line on stderr: exit code 1 when something failed, 2 when the command was not
understood. TIMERNN_TRACEBACK=1 shows where an error came from.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from service.cli.extras import explain_missing
from service.cli.output import fail
from service.cli.stopping import stop_early

# NumPy and gRPC read these once, at import. One BLAS thread, because the same update has to give the
# same weights bit for bit, whatever the machine; no fork support, because nothing here forks after
# gRPC has started and its handlers cost time.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# What fails is reported in a line; gRPC's core would write more beside it, and on a server a line for each failed TLS
# handshake and each header that it cannot read, so that whoever reaches the port could fill a disk.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after `timernn`; those of this process by default.
    """
    if arguments is None:
        arguments = sys.argv[1:]
        stop_early(arguments)
    try:
        from service.cli.app import run  # noqa: PLC0415 - after the environment is set
    except ModuleNotFoundError as error:
        if text := explain_missing(error):
            fail(text)
            return 1
        raise
    return run(list(arguments))
