"""One timeout for many coroutines, with one timer.

`asyncio.timeout` makes a timer for each wait and cancels it again, which often takes longer than the
wait itself. If the timeout is the same for all, the one that began first is due first, so that one timer
is enough.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

T = TypeVar("T")


class Deadlines:
    """Cancels what takes longer than a timeout, within one event loop."""

    def __init__(self, limit_s: float) -> None:
        """Set the timeout, in seconds."""
        self.limit_s = limit_s
        self._due: dict[asyncio.Task[Any], float] = {}  # in the order in which they are due
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def bound(self, steps: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine under the timeout; a task may do this once at a time.

        Raises:
            TimeoutError: If it took longer than the timeout; it was cancelled.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - a coroutine runs in one
        cancels_before = task.cancelling()
        self._due[task] = loop.time() + self.limit_s
        if self._timer is None:
            self._timer = loop.call_later(self.limit_s, self._on_timer, loop)
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

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the tasks that are due, and set the timer for the next one."""
        now, self._timer = loop.time(), None
        for task, due in list(self._due.items()):
            if due > now:
                self._timer = loop.call_at(due, self._on_timer, loop)
                return
            del self._due[task]
            self._overdue.add(task)
            task.cancel()
