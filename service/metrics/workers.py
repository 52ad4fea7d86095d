"""Metrics of several workers on the supervisor's one port.

Each worker answers on a Unix socket: with its counts as JSON, and what the page asks for. A worker that ended takes its counters along:
what was last read of them is kept and added, so that a restart is no drop, which Prometheus would take for
a counter that began anew, and count the other workers' past twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web
from yarl import URL

from service.metrics.exposition import merged
from service.metrics.families import FAMILIES, Kind
from service.metrics.http import (
    FORWARDED_FOR,
    FORWARDED_NAMES,
    FORWARDED_PROTO,
    HttpPort,
    certificate_names_of,
    peer_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.metrics.recorder import Recorder, Snapshot

ANSWER_S: Final = 2.0
RELAY_S: Final = 10.0  # what a worker may take for an answer to the page
_COUNTS: Final = "/counts"
_RELAYED: Final = ("Authorization", "Content-Type", "Cookie")
_RELAYED_BACK: Final = ("Content-Type", "Set-Cookie")


class WorkerSocket(HttpPort):
    """A worker's side: its counts, and what the supervisor relays to it."""

    def __init__(
        self,
        recorder: Recorder,
        process: str | None = None,
        routes: Iterable[web.RouteDef] = (),
    ) -> None:
        """Keep whose counts.

        Args:
            recorder: Counts.
            process: Names this process among those of its supervisor, past ones too.
            routes: What else is served.
        """
        super().__init__([web.get(_COUNTS, self._counts), *routes])
        self._recorder = recorder
        self._process = process or f"{os.getpid()}-{os.urandom(8).hex()}"

    async def _counts(self, _request: web.Request) -> web.Response:
        return web.json_response({"process": self._process, "values": self._recorder.snapshot()})


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

    def relays(self) -> list[web.RouteDef]:
        """Return what hands requests for /api on to a worker: any of them answers for all."""
        return [web.route("*", "/api/{rest:.*}", self._relay)]

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: request.headers[name] for name in _RELAYED if name in request.headers}
        headers |= {
            FORWARDED_FOR: peer_of(request),
            FORWARDED_PROTO: request.scheme,
            FORWARDED_NAMES: json.dumps(certificate_names_of(request)),
        }
        for number in random.sample(range(1, self._count + 1), self._count):
            try:
                async with (
                    self._session(number, RELAY_S) as session,
                    session.request(
                        request.method,
                        URL(f"http://worker{request.raw_path}", encoded=True),
                        headers=headers,
                        data=body,
                        allow_redirects=False,
                    ) as answer,
                ):
                    return web.Response(
                        status=answer.status,
                        body=await answer.read(),
                        headers=[
                            (name, value)
                            for name in _RELAYED_BACK
                            for value in answer.headers.getall(name, ())
                        ],
                    )
            except (OSError, TimeoutError, ClientError):
                continue
        error = {"reason": "UNAVAILABLE", "message": "no worker answers; try again"}
        return web.json_response({"error": error}, status=503)

    def _session(self, number: int, limit_s: float) -> ClientSession:
        return ClientSession(
            connector=UnixConnector(str(self.path(number))), timeout=ClientTimeout(limit_s)
        )

    async def _ask(self, number: int) -> dict[str, Any] | None:
        try:
            async with (
                self._session(number, ANSWER_S) as session,
                session.get(f"http://worker{_COUNTS}") as answer,
            ):
                found: dict[str, Any] = await answer.json()
        except (OSError, TimeoutError, ValueError, ClientError):
            return None
        return found


def _counters(snapshot: Snapshot) -> Snapshot:
    return {
        name: values
        for name, values in snapshot.items()
        if name in FAMILIES and FAMILIES[name].kind is not Kind.GAUGE
    }
