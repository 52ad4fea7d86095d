"""Work that runs to its end although its caller is cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class Carrier:
    """Runs coroutines as tasks of their own, which no caller's cancellation reaches.

    What a request has begun is then not left half done, and its retry finds it done.
    """

    def __init__(self) -> None:
        """Start idle."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def carry(self, steps: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns; a cancellation ends the wait and not the coroutine."""
        return await asyncio.shield(self.start(steps))

    def start(self, steps: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start the coroutine, and keep its task referenced: the event loop does not."""
        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def drain(self) -> None:
        """Wait until nothing runs any more, what is started meanwhile included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not log it if nobody waits any more
