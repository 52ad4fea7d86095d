"""Metrics of several workers on the supervisor's one port.

Each worker answers on a Unix socket with its counts as JSON. A worker that ended takes its counters along:
what was last read of them is kept and added, so that a restart is no drop, which Prometheus would take for
a counter that began anew, and count the other workers' past twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from service.metrics.exposition import merged
from service.metrics.families import FAMILIES, Kind

if TYPE_CHECKING:
    from service.metrics.recorder import Recorder, Snapshot

ANSWER_S: Final = 2.0


class WorkerSocket:
    """A worker's side: whoever connects is sent the counts, and the connection ends."""

    def __init__(self, recorder: Recorder, process: str | None = None) -> None:
        """Keep whose counts.

        Args:
            recorder: Counts.
            process: Names this process among those of its supervisor, past ones too.
        """
        self._recorder = recorder
        self._process = process or f"{os.getpid()}-{os.urandom(8).hex()}"
        self._server: asyncio.Server | None = None

    async def start(self, path: Path) -> None:
        """Listen; only this user may connect, since the folder is private."""
        self._server = await asyncio.start_unix_server(self._answer, path)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            counts = {"process": self._process, "values": self._recorder.snapshot()}
            writer.write(json.dumps(counts).encode())
            await writer.drain()
        except OSError:
            pass  # who asked has gone
        finally:
            writer.close()


class WorkerMetrics:
    """The supervisor's side: the counts of all workers, those that ended included."""

    def __init__(self, count: int) -> None:
        """Make a private folder for the sockets of so many workers."""
        self._folder = tempfile.TemporaryDirectory(prefix="timernn-")
        self._count = count
        self._last: dict[str, Snapshot] = {}
        self._ended: Snapshot = {}

    def path(self, number: int) -> Path:
        """Return where worker `number`, from 1, listens."""
        return Path(self._folder.name) / f"worker-{number}"

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    async def snapshot(self) -> Snapshot:
        """Return the counts of all; a worker that does not answer in time stands as it did last."""
        answers = await asyncio.gather(*(self._ask(number + 1) for number in range(self._count)))
        now = {answer["process"]: answer["values"] for answer in answers if answer}
        if len(now) == self._count:  # else one may only be slow
            for process in set(self._last) - set(now):
                self._ended = merged([self._ended, _counters(self._last.pop(process))])
        self._last.update(now)
        return merged([self._ended, *self._last.values()])

    async def _ask(self, number: int) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self.path(number))
                try:
                    found: dict[str, Any] = json.loads(await reader.read())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError):
            return None
        return found


def _counters(snapshot: Snapshot) -> Snapshot:
    return {
        name: values
        for name, values in snapshot.items()
        if name in FAMILIES and FAMILIES[name].kind is not Kind.GAUGE
    }
