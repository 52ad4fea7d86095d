"""Work that goes on to its end though whoever asked for it goes away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


class Carrier:
    """Carries steps to their end: what they have begun is not left half done, and a retry finds it."""

    def __init__(self) -> None:
        """Start idle."""
        self._under_way: set[asyncio.Task[Any]] = set()

    async def carry(self, steps: Coroutine[Any, Any, T]) -> T:
        """Return what the steps return; a cancellation ends the wait and not the steps."""
        task = asyncio.create_task(steps)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever still waits
