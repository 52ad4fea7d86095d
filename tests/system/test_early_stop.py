"""SIGTERM at any moment of a server's start."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from instruments.processes import wait_until

if TYPE_CHECKING:
    from pathlib import Path

MOMENTS = 8
LIMIT_S = 60


def start_blocked(*options: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a server as the image does, with SIGTERM blocked until it has a handler."""
    command = [sys.executable, "-m", "service", "serve", "--listen", "127.0.0.1:0", *options]
    with log.open("wb") as output:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return subprocess.Popen(command, stdout=output, stderr=output)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def stop_after(delay_s: float, *options: str, log: Path) -> int:
    """Start a server, send SIGTERM after a while, and return its exit code."""
    process = start_blocked(*options, log=log)
    try:
        time.sleep(delay_s)
        process.terminate()
        return process.wait(LIMIT_S)
    finally:
        process.kill()
        process.wait()


def time_start(*options: str, log: Path) -> float:
    """Return how long a server takes until it is ready, in seconds."""
    start = time.monotonic()
    process = start_blocked(*options, log=log)
    try:
        wait_until("it is ready", lambda: b"timernn ready on" in log.read_bytes())
        return time.monotonic() - start
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_at_any_moment_of_a_start_ends_it_with_0(
    store_url: str, tmp_path: Path, workers: str
) -> None:
    """From the first moment to the ready line no signal is lost, and none ends it as a crash."""
    log, options = tmp_path / "log", ("--redis-url", store_url, "--workers", workers)
    start_s = time_start(*options, log=log)
    for moment in range(MOMENTS):
        delay_s = start_s * moment / (MOMENTS - 1)
        code = stop_after(delay_s, *options, log=log)
        assert code == 0, f"after {delay_s:.2f} s: {log.read_text()}"


def test_a_server_that_is_stopped_early_leaves_no_store_behind(tmp_path: Path) -> None:
    """The embedded store ends with a server that was stopped while it started it."""
    data, log = tmp_path / "data", tmp_path / "log"
    process = start_blocked("--data-dir", str(data), log=log)
    try:
        wait_until("the store starts", data.exists)
        process.terminate()
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
    time_start("--data-dir", str(data), log=log)  # it is the only owner of the folder again
