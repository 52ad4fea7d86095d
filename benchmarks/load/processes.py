"""Child processes of a benchmark: started, awaited by their ready line, always stopped."""

import json
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import one_thread_environment

ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 20.0
# Beyond the time that it has to measure: a million sessions take minutes.
ANSWER_TIMEOUT_S = 900.0


class StartError(RuntimeError):
    """A process ended before it was ready."""


class Child:
    """A process that printed its ready line."""

    def __init__(self, command: Sequence[str], core: int | None, log: Path) -> None:
        """Start the process and wait until it is ready.

        Args:
            command: What to run, from the repository's root.
            core: The core to pin it to; None leaves it to the scheduler.
            log: Where its stderr goes.

        Raises:
            StartError: If it ends before its ready line.
        """
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(  # noqa: S603 - our own commands
                [*_pinned(core), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                # Every process computes on one thread, whoever's BLAS it is: two threads of one server on
                # two cores, shared with the client, measure the scheduler.
                env={**one_thread_environment(), "PYTHONUNBUFFERED": "1"},
            )
        self._log = log
        self.address = self._read_address()

    def _last_words(self) -> str:
        lines = self._log.read_text().splitlines()
        return "\n".join(lines[-5:]) if lines else "it said nothing"

    def _read_address(self) -> str:
        # Servers may log to stdout before they are ready; MLServer does.
        # readline, not iteration: closing a half-used iterator over a pipe closes the pipe.
        while self.process.stdout is not None and (line := self.process.stdout.readline()):
            if " ready on " in line:
                return line.rsplit(" ", 1)[1].strip()
        self.stop()
        raise StartError(f"the process ended before it was ready: {self._last_words()}")

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send a JSON line and wait for the JSON line that answers it.

        Raises:
            StartError: If the process ended, reports an error or does not answer in time.
        """
        if self.process.stdin is None or self.process.stdout is None:
            message = "the process takes no orders"
            raise StartError(message)
        line = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            patience_s = ANSWER_TIMEOUT_S + order.get("seconds", 0) + order.get("warmup_s", 0)
            if not select.select([self.process.stdout], [], [], patience_s)[0]:
                raise StartError(f"no answer in {patience_s:.0f} s to {order}")
            line = self.process.stdout.readline()
        answer: dict[str, Any] = (
            json.loads(line) if line else {"error": "the process ended: " + self._last_words()}
        )
        if "error" in answer:
            raise StartError(answer["error"])
        return answer

    def resident_bytes(self) -> int:
        """Return the memory the process holds, bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
        return 0

    def stop(self) -> None:
        """End the process: politely first, by force after a while."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _pinned(core: int | None) -> list[str]:
    if core is None:
        return []
    taskset = shutil.which("taskset")
    if taskset is None:
        message = "pinning to one core needs the command taskset (util-linux)"
        raise StartError(message)
    return [taskset, "-c", str(core)]


@contextmanager
def child(command: Sequence[str], *, core: int | None, log: Path) -> Iterator[Child]:
    """Run a process for as long as the block lasts."""
    process = Child(command, core, log)
    try:
        yield process
    finally:
        process.stop()


def processor_s(pid: int) -> float:
    """Return the processor time that all threads of a process have used, seconds, to the nanosecond.

    /proc/PID/stat counts in ticks of 10 ms. The clock's number is made as clock_getcpuclockid(3) makes it.
    """
    return time.clock_gettime((~pid << 3) | 2)


def module(name: str, *arguments: object, python: str = sys.executable) -> list[str]:
    """Return the command that runs one of our modules."""
    return [python, "-m", name, *map(str, arguments)]


def interpreter_of(checkout: Path) -> Path:
    """Return a checkout's own Python where it has an environment, else this one.

    Its stubs may ask for another protobuf than the one that is installed here.
    """
    own = checkout / ".venv" / "bin" / "python"
    return own if own.exists() else Path(sys.executable)
