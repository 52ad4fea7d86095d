"""Sends chunks' commits to the store, many in a round trip.

What has queued while a round trip is under way goes with the next one; a lone commit goes at once. What
different servers of a cluster decide goes apart: one that is silent holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class _Lane:
    """The commits to one server."""

    waiting: deque[tuple[ChunkCommit, Told]] = field(default_factory=deque)
    under_way: int = 0


class Committer:
    """One replica's commits."""

    def __init__(self, store: SessionStore) -> None:
        """Start idle."""
        self._store = store
        self._lanes: defaultdict[object, _Lane] = defaultdict(_Lane)
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, commit: ChunkCommit, told: Told) -> None:
        """Send a commit; `told` is called on the loop with what came of it."""
        if _size(commit) > BIG_BYTES:
            self._spawn([(commit, told)])
            return
        lane = self._lanes[self._store.node_of(commit.key)]
        lane.waiting.append((commit, told))
        if len(lane.waiting) == 1 and lane.under_way < ROUND_TRIPS:
            asyncio.get_running_loop().call_soon(self._send_waiting, lane)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _send_waiting(self, lane: _Lane) -> None:
        while lane.waiting and lane.under_way < ROUND_TRIPS:
            lane.under_way += 1
            trip = self._spawn(_take_batch(lane))
            trip.add_done_callback(lambda _task: self._landed(lane))

    def _landed(self, lane: _Lane) -> None:
        lane.under_way -= 1
        self._send_waiting(lane)

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


def _take_batch(lane: _Lane) -> list[tuple[ChunkCommit, Told]]:
    batch, size = [], 0
    while lane.waiting and size < TRIP_BYTES:
        batch.append(lane.waiting.popleft())
        size += _size(batch[-1][0])
    return batch


def _size(commit: ChunkCommit) -> int:
    return len(commit.state.h) + len(commit.tape or b"")
