"""One timeout for many coroutines, with one timer.

`asyncio.timeout` makes a timer for each wait and cancels it again, which often takes longer than the
wait itself. If the timeout is the same for all, the one that began first is due first, so that one timer
is enough.

A timeout is about the other side, not about this process: while the event loop is held, by a long computation or by a
machine that is too busy, nobody can read the answer that lies in the socket, and perhaps not even the question has left. So
only time counts in which the loop ran. The timer ticks, and however late a tick comes, it counts as one.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

T = TypeVar("T")

_TICKS: Final = 10  # in a timeout
_LONGEST_TICK_S: Final = 0.1


class Deadlines:
    """Cancels what takes longer than a timeout, within one event loop."""

    def __init__(self, limit_s: float) -> None:
        """Set the timeout, in seconds; what takes longer is cancelled up to a tenth of it later."""
        self.limit_s = limit_s
        self._tick_s = min(limit_s / _TICKS, _LONGEST_TICK_S)
        self._ran_s = 0.0  # for how long the loop has run, up to the last tick
        self._ticked_at = 0.0
        self._due: dict[asyncio.Task[Any], float] = {}  # by what has run, in that order
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def bound(self, steps: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine under the timeout; a task may do this once at a time.

        Raises:
            TimeoutError: If it took longer than the timeout; it was cancelled.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        cancels_before = task.cancelling()
        if self._timer is None:
            self._ticked_at = monotonic()  # a loop's own time may be of before it was held
            self._await_tick()
        self._due[task] = self._run_time_s(monotonic()) + self.limit_s
        try:
            return await steps
        except asyncio.CancelledError as error:
            # Unless another caller has cancelled the task as well.
            if task in self._overdue and task.cancelling() == cancels_before + 1:
                raise TimeoutError from error
            raise
        finally:
            self._due.pop(task, None)
            if task in self._overdue:  # whatever the steps ended with
                self._overdue.remove(task)
                task.uncancel()

    def _run_time_s(self, now: float) -> float:
        return self._ran_s + min(now - self._ticked_at, self._tick_s)

    def _await_tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        """Cancel the tasks that are due."""
        now = monotonic()
        self._ran_s, self._ticked_at = self._run_time_s(now), now
        while self._due:
            task, due = next(iter(self._due.items()))
            if due > self._ran_s:
                self._await_tick()
                return
            del self._due[task]
            self._overdue.add(task)
            task.cancel()
        self._timer = None
