"""Commits chunks, many in one round trip to the store.

Commits that are submitted while a round trip is under way are coalesced into the next one; a lone commit
is sent at once. The store says which may be sent together: each server of a cluster has a queue of its own,
so that one that does not answer holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from service.domain.refusals import cancelled_midway

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from service.domain.ports import ChunkCommit, ChunkOutcome, SessionStore

    OnDone = Callable[[ChunkOutcome | Exception], None]
    Submitted = tuple[ChunkCommit, OnDone, int, Context]  # its bytes; where it was submitted

# Round trips to one server at once: one is encoded while the store works on the other.
ROUND_TRIPS = 2
# A larger commit is sent by itself, so that small ones do not wait behind it.
BIG_BYTES = 1 << 18
# About what one round trip carries: it has to end within the store's time limit.
TRIP_BYTES = 1 << 22


@dataclass(slots=True)
class _CommitQueue:
    """The commits that may be sent together.

    Attributes:
        waiting: Those that were not sent yet, with their callbacks.
        trips: The number of round trips under way.
    """

    waiting: deque[Submitted] = field(default_factory=deque)
    trips: int = 0


class Committer:
    """Sends the commits of one replica."""

    def __init__(self, store: SessionStore) -> None:
        """Start idle."""
        self._store = store
        self._queues: defaultdict[object, _CommitQueue] = defaultdict(_CommitQueue)
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, commit: ChunkCommit, on_done: OnDone) -> None:
        """Send a commit, at once or with the next round trip.

        Args:
            commit: The commit.
            on_done: Called on the event loop with the outcome or the error.
        """
        size = len(commit.state.state) + len(commit.tape or b"")
        submitted = commit, on_done, size, copy_context()
        if size > BIG_BYTES:
            self._spawn([submitted])
            return
        queue = self._queues[self._store.queue_of(commit)]
        queue.waiting.append(submitted)
        if len(queue.waiting) == 1 and queue.trips < ROUND_TRIPS:
            asyncio.get_running_loop().call_soon(self._send_waiting, queue)

    async def drain(self) -> None:
        """Wait until no round trip is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _send_waiting(self, queue: _CommitQueue) -> None:
        while queue.waiting and queue.trips < ROUND_TRIPS:
            queue.trips += 1
            trip = self._spawn(_take_batch(queue))
            trip.add_done_callback(partial(self._end_trip, queue))

    def _end_trip(self, queue: _CommitQueue, _trip: asyncio.Task[None]) -> None:
        queue.trips -= 1
        self._send_waiting(queue)

    def _spawn(self, batch: list[Submitted]) -> asyncio.Task[None]:
        # In the context of its first commit, whatever ended so that there is room for it.
        context = batch[0][3]
        task = asyncio.get_running_loop().create_task(self._send(batch), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, batch: list[Submitted]) -> None:
        try:
            outcomes = await self._store.commit_chunks([commit for commit, *_ in batch])
        except Exception as error:  # noqa: BLE001 - it becomes each chunk's answer
            outcomes = [error] * len(batch)
        except asyncio.CancelledError:  # nobody may wait for ever, whoever cancelled
            outcomes = [cancelled_midway()] * len(batch)
        for (_, on_done, *_), outcome in zip(batch, outcomes, strict=True):
            on_done(outcome)


def _take_batch(queue: _CommitQueue) -> list[Submitted]:
    batch, size = [], 0
    while queue.waiting and size < TRIP_BYTES:
        submitted = queue.waiting.popleft()
        batch.append(submitted)
        size += submitted[2]
    return batch
