"""Places where a test can make a replica die, sleep, fail or be cancelled.

Failpoints are outside the code that they disturb: if any is switched on, the stores and the scheduler
are wrapped when the server is built; if none is, nothing of this module runs.

`TIMERNN_FAILPOINTS=before_commit=exit;after_update=sleep(2)@3` kills the process at the first commit
and sleeps 2 s after the third version is published, once each; `@*` means every time. Actions: `exit`,
`sleep(SECONDS)`, `raise`, `cancel`. Each time that a failpoint takes effect, a line is logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.domain.refusals import cancelled_midway

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from service.compute.scheduler import Chunk, Scheduler

EXIT_CODE = 137
_LOGGER = logging.getLogger(__name__)
_EVERY = 0
_FORM = re.compile(
    r"(?P<name>\w+)=(?P<action>exit|raise|cancel|sleep\((?P<s>\d+(\.\d+)?)\))(@(?P<n>\d+|\*))?"
)

# The failpoints around each method of a store: the one before the call, then those after it.
_AROUND = {
    "read_session": ("", "after_read"),
    "commit_chunks": ("before_commit", "after_commit"),
    "read_tape": ("", "after_tape_read"),
    "record_contribution": ("before_count", "after_count"),
    "record_and_read": ("before_count", "after_count", "after_look"),
    "mark_tape_consumed": ("before_settle", ""),
    "read_update_inputs": ("", "after_look"),
    "publish_version": ("before_update", "after_update"),
}
NAMES = {name for around in _AROUND.values() for name in around if name} | {
    "after_compute",
    "before_drain",
}


class FailpointError(Exception):
    """Raised by the action `raise`, and for a text that is not of the form above."""


@dataclass(slots=True)
class _Failpoint:
    action: str
    sleep_s: float
    at: int
    hits: int = 0


class Failpoints:
    """The failpoints that are switched on."""

    def __init__(self, text: str = "") -> None:
        """Read the text of TIMERNN_FAILPOINTS.

        Raises:
            FailpointError: If it is not of the form above.
        """
        self._points: dict[str, _Failpoint] = {}
        for part in filter(None, text.split(";")):
            form = _FORM.fullmatch(part.strip())
            if form is None or form["name"] not in NAMES:
                known = ", ".join(sorted(NAMES))
                raise FailpointError(
                    f"expected NAME=ACTION[@N|@*] with a NAME of {known}; got {part!r}"
                )
            self._points[form["name"]] = _Failpoint(
                form["action"].partition("(")[0],
                float(form["s"] or 0),
                _EVERY if form["n"] == "*" else int(form["n"] or 1),
            )

    def __bool__(self) -> bool:
        """Return whether any is switched on."""
        return bool(self._points)

    async def hit(self, name: str) -> None:
        """Carry out the action of the failpoint of this name, if this hit is the one that it is set for."""
        point = self._points.get(name)
        if point is None:
            return
        point.hits += 1
        if point.at not in (point.hits, _EVERY):
            return
        _LOGGER.warning("failpoint %s: %s", name, point.action)
        if point.action == "exit":
            os._exit(EXIT_CODE)
        if point.action == "raise":
            raise FailpointError(name)
        if point.action == "cancel":
            raise asyncio.CancelledError(name)
        await asyncio.sleep(point.sleep_s)

    def wrap_store(self, store: Any) -> Any:
        """Return a port whose methods hit their failpoints."""
        return _FailingStore(store, self)

    def wrap_scheduler(self, scheduler: Scheduler) -> Scheduler:
        """Make each computed chunk hit `after_compute` before it is delivered."""
        if "after_compute" not in self._points:
            return scheduler
        submit, tasks = scheduler.submit, set[asyncio.Task[None]]()

        def submit_failing(chunk: Chunk) -> None:
            deliver = chunk.deliver

            async def deliver_failing(done: Chunk) -> None:
                try:
                    await self.hit("after_compute")
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the chunk's answer
                    done.step = None
                    done.error = error if isinstance(error, Exception) else cancelled_midway()
                deliver(done)

            def start(done: Chunk) -> None:
                task = asyncio.get_running_loop().create_task(deliver_failing(done))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            chunk.deliver = start
            submit(chunk)

        scheduler.submit = submit_failing  # type: ignore[method-assign]
        return scheduler


class _FailingStore:
    """A store whose methods hit their failpoints."""

    def __init__(self, store: Any, points: Failpoints) -> None:
        self._store = store
        self._points = points

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in _AROUND:
            return method
        return self._around(method, *_AROUND[name])

    def _around(
        self, method: Callable[..., Coroutine[Any, Any, Any]], before: str, *after: str
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*arguments: Any, **named: Any) -> Any:
            await self._points.hit(before)
            answer = await method(*arguments, **named)
            for name in after:
                await self._points.hit(name)
            return answer

        return call
