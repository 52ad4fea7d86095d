"""Sends chunks' commits to the store, many in a round trip.

What has queued while a round trip is under way goes with the next one; a lone commit goes at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from service.domain.refusals import cancelled_midway

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.domain.ports import ChunkCommit, ChunkOutcome, SessionStore

    Told = Callable[[ChunkOutcome | Exception], None]

ROUND_TRIPS = 2  # under way at once: the next is laid out while the store works on the one before
BIG_BYTES = 1 << 18  # a commit of more goes by itself, so that small ones do not wait behind it
TRIP_BYTES = (
    1 << 22
)  # carried by one round trip, about: it has to end within the store's time limit


class Committer:
    """One replica's commits."""

    def __init__(self, store: SessionStore) -> None:
        """Start idle."""
        self._store = store
        self._waiting: deque[tuple[ChunkCommit, Told]] = deque()
        self._under_way = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, commit: ChunkCommit, told: Told) -> None:
        """Send a commit; `told` is called on the loop with what came of it."""
        if _size(commit) > BIG_BYTES:
            self._spawn([(commit, told)])
            return
        self._waiting.append((commit, told))
        if len(self._waiting) == 1 and self._under_way < ROUND_TRIPS:
            asyncio.get_running_loop().call_soon(self._send_waiting)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _send_waiting(self) -> None:
        while self._waiting and self._under_way < ROUND_TRIPS:
            self._under_way += 1
            self._spawn(self._take_batch()).add_done_callback(self._landed)

    def _take_batch(self) -> list[tuple[ChunkCommit, Told]]:
        batch, size = [], 0
        while self._waiting and size < TRIP_BYTES:
            batch.append(self._waiting.popleft())
            size += _size(batch[-1][0])
        return batch

    def _landed(self, _task: asyncio.Task[None]) -> None:
        self._under_way -= 1
        self._send_waiting()

    def _spawn(self, batch: list[tuple[ChunkCommit, Told]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._send(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, batch: list[tuple[ChunkCommit, Told]]) -> None:
        try:
            outcomes = await self._store.commit_chunks([commit for commit, _ in batch])
        except Exception as error:  # noqa: BLE001 - it becomes each chunk's answer
            outcomes = [error] * len(batch)
        except asyncio.CancelledError:  # whoever cancelled, nobody may wait for ever
            outcomes = [cancelled_midway()] * len(batch)
        for (_, told), outcome in zip(batch, outcomes, strict=True):
            told(outcome)


def _size(commit: ChunkCommit) -> int:
    return len(commit.state.h) + len(commit.tape or b"")
