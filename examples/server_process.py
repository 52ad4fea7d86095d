"""A timernn server as a process of its own, to start, to kill and to start again."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

READY = "timernn ready on "
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class ServerError(Exception):
    """The server did not start; the message is its own last line."""


class ServerProcess:
    """`timernn serve` on the embedded store, whose files stay in one folder over restarts.

    Attributes:
        address: HOST:PORT; the port is picked at the first start and kept.
    """

    def __init__(self, folder: Path) -> None:
        """Keep the store's files and the server's log in folder, which exists."""
        self.address = "127.0.0.1:0"
        self._folder = folder
        self._log = folder / "server.log"
        self._process: subprocess.Popen[str] | None = None
        self._is_over = False
        # A thread may start the server while Ctrl-C makes the program stop it.
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server and return when it serves.

        Raises:
            ServerError: If it stops first, or is not ready after 60 s.
        """
        with self._lock:
            if self._is_over:
                raise ServerError("the server is not wanted any more")
            self._start()

    def kill_and_start(self) -> None:
        """End the server as a power cut would, without a goodbye; start it on the same port.

        Raises:
            ServerError: If it does not come back.
        """
        with self._lock:
            self._kill()
            self.start()

    def stop(self) -> None:
        """Ask the server to end its work and wait; after 30 s kill it."""
        with self._lock:
            self._is_over = True
            if self._process:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_S)
            self._kill()

    def __enter__(self) -> Self:
        """Start the server."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self.stop()

    def _start(self) -> None:
        command = [sys.executable, "-m", "service", "serve", "--listen", self.address]
        command += ["--data-dir", str(self._folder / "store")]
        with self._log.open("a") as log:
            # A session of its own: Ctrl-C in the terminal reaches this program alone, which stops the
            # server in its own time.
            self._process = subprocess.Popen(  # noqa: S603
                command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        self.address = self._ready_line(self._process).removeprefix(READY)

    def _ready_line(self, process: subprocess.Popen[str]) -> str:
        """Wait for the one line that a server prints; it has none when it died or was too slow."""
        assert process.stdout is not None  # noqa: S101
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline().strip()
        finally:
            watchdog.cancel()
        if not line.startswith(READY):
            self._kill()
            said = self._log.read_text().strip().splitlines() or ["nothing was said"]
            raise ServerError(f"the server did not start: {said[-1]}")
        return line

    def _kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            if self._process.stdout:
                self._process.stdout.close()
            self._process = None
