"""Child processes that can be paused, killed and restarted, and that never outlive the tests.

Every child leads a process group of its own, so that its own children go with it. A small reaper
process holds one end of a pipe; when the test run is gone, whichever way it went, the reaper kills
the groups and deletes the directories that are still noted.
"""

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

# Until something that has to come is given up: long, since other work may share the machine.
PATIENCE_S = 60.0
_POLL_S = 0.01
_LOG_TAIL_CHARS = 2000
# Below the range that the kernel takes for outgoing connections, so that a port which a killed
# server gave up is still free when it restarts.
_PORTS = range(15000, 32000)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    while True:
        port = _PORTS[secrets.randbelow(len(_PORTS))]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(
    what: str,
    is_true: Callable[[], object],
    timeout_s: float = PATIENCE_S,
    *,
    ignored: tuple[type[Exception], ...] = (OSError,),
) -> float:
    """Wait for another process to bring something about; there is no event to wait on.

    Args:
        what: What is waited for, for the error message.
        is_true: Asked again and again.
        timeout_s: How long to wait, in seconds.
        ignored: Exceptions of `is_true` that mean no.

    Returns:
        How long it took, in seconds.

    Raises:
        TimeoutError: If it did not happen in time.
    """
    start = time.monotonic()
    while time.monotonic() - start < timeout_s:
        with contextlib.suppress(*ignored):
            if is_true():
                return time.monotonic() - start
        time.sleep(_POLL_S)
    raise TimeoutError(f"waited {timeout_s} s for {what}")


_REAPER = """
import os, shutil, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
noted = set()
for line in sys.stdin:
    sign, kind, name = line.rstrip("\\n").split(" ", 2)
    (noted.add if sign == "+" else noted.discard)((kind, name))
for kind, name in sorted(noted, reverse=True):
    if kind == "group":
        try:
            os.killpg(int(name), signal.SIGKILL)
        except OSError:
            pass
for kind, name in noted:
    if kind == "dir":
        shutil.rmtree(name, ignore_errors=True)
"""


class _Reaper:
    """The writing end of the reaper's pipe, opened with the first child."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def note(self, kind: str, name: object) -> None:
        self._say("+", kind, name)

    def forget(self, kind: str, name: object) -> None:
        self._say("-", kind, name)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _say(self, sign: str, kind: str, name: object) -> None:
        if self._process is None:
            command = [sys.executable, "-S", "-c", _REAPER]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            atexit.register(self.close)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{sign} {kind} {name}\n")
        self._process.stdin.flush()


_reaper = _Reaper()


class Child:
    """One process with a directory of its own, which also holds its log."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, name: str = "child"
    ) -> None:
        """Prepare a child; `start` runs it.

        Args:
            command: Program and arguments, given again at each restart.
            env: Variables on top of this process's own.
            name: What messages and the directory call it.
        """
        self.command = list(command)
        self.env = dict(env or {})
        self.name = name
        self.dir = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.log_path = self.dir / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []
        self._log_start = 0
        self.is_paused = False
        _reaper.note("dir", self.dir)

    def start(self) -> Self:
        """Start the process, or start it again after its end, and wait until it is ready."""
        assert not self.is_alive, f"{self.name} is running"
        self.log_path.touch()
        self._log_start = self.log_path.stat().st_size
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.dir,
                env=os.environ | self.env,
                start_new_session=True,
            )
        self.is_paused = False
        self._groups.append(self.pid)
        _reaper.note("group", self.pid)
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the process serves; a plain child is ready at once."""

    @property
    def pid(self) -> int:
        """The id of the running process."""
        assert self._process is not None, f"{self.name} has not been started"
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs (a stopped one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it has written since its last start."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def pause(self) -> None:
        """Stop it in its tracks (SIGSTOP), as a long pause of a garbage collector does."""
        self.signal(signal.SIGSTOP)
        self.is_paused = True

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self.signal(signal.SIGCONT)
        self.is_paused = False

    def kill(self) -> None:
        """Kill it without a word (SIGKILL) and wait for its end; its own children live on."""
        self.signal(signal.SIGKILL)
        self.wait()

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Ask it to end (SIGTERM) and return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def wait_for_line(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait for a line of the log that matches `pattern` as a whole.

        Raises:
            RuntimeError: If the process ends first.
            TimeoutError: If the line does not come in time.
        """
        line = re.compile(f"^{pattern}$", re.MULTILINE)
        wait_until(f"{self.name}: {pattern}", lambda: line.search(self._live_log()), timeout_s)
        match = line.search(self.log)
        assert match is not None
        return match

    def _live_log(self) -> str:
        """Return the log; fail if the process has ended without the line that is waited for."""
        alive, log = self.is_alive, self.log
        if not alive:
            raise RuntimeError(f"{self.name} ended: {log[-_LOG_TAIL_CHARS:]}")
        return log

    def rss_bytes(self) -> int:
        """Return its resident memory, in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak_rss_bytes(self) -> int:
        """Return the most resident memory that it has had, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024

    def cpu_s(self) -> float:
        """Return the processor time that it has used, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Kill it and its own children, and delete its directory."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            _reaper.forget("group", group)
        self._groups.clear()
        if self._process is not None:
            self.wait()
        shutil.rmtree(self.dir, ignore_errors=True)
        _reaper.forget("dir", self.dir)

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class ServiceProcess(Child):
    """A replica of the service: `timernn serve` on a free port, the same after a restart."""

    def __init__(
        self,
        redis_url: str,
        *options: str,
        env: Mapping[str, str] | None = None,
        name: str = "replica",
    ) -> None:
        """Prepare a replica.

        Args:
            redis_url: Its store, given as `--redis-url`; empty leaves it to the embedded one.
            options: Further options of `timernn serve`.
            env: Variables on top of this process's own, failpoints among them.
            name: What messages call it.
        """
        self.port = free_port()
        super().__init__([], env=env, name=name)
        store = ["--redis-url", redis_url] if redis_url else ["--data-dir", str(self.dir / "data")]
        program = Path(sys.executable).with_name("timernn")
        self.command = [str(program), "serve", "--listen", self.address, *store, *options]

    @property
    def address(self) -> str:
        """Where it listens, `host:port`."""
        return f"127.0.0.1:{self.port}"

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait for the line that says that it serves."""
        self.wait_for_line(re.escape(f"timernn ready on {self.address}"), timeout_s)
