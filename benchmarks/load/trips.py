"""Round trips of commits to a real store: how long they take, and which process spends the time.

A store that is not a cluster gets a batch as one call of the script. The masters of a cluster get one call
per chunk, and a batch takes one round trip for each master that holds some of its sessions; here all round
trips go to the one store, each over a client of its own.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load.processes import processor_s
from benchmarks.load.stages import TENANT, VERSION
from benchmarks.load.store import Store
from benchmarks.load.workload import SMALL
from service.domain.digests import request_digest
from service.domain.limits_policy import SameLimits
from service.domain.ports import (
    AbsentSession,
    ChunkCommit,
    ChunkOutcome,
    EpochMode,
    EpochStart,
    SessionHead,
    StoredState,
)
from service.domain.types import SessionKey
from service.settings import HOUR_MS, Limits, Settings
from service.store.scripts import ScriptRunner
from service.store.sessions import RedisSessionStore
from service.store.urls import connect

STATE = bytes(4 * SMALL.hidden)
HEAD = SessionHead("m", bytes(16), "float32", 1, 0, 0, HOUR_MS)


@dataclass(frozen=True)
class Shape:
    """How commits go out.

    Attributes:
        batch: Chunks that are committed at once.
        per_trip: How many of them one round trip carries.
        joined: Whether these are one call of the script; in a cluster each chunk has its own.
    """

    batch: int
    per_trip: int
    joined: bool


SHAPES = [
    *(Shape(batch, batch, joined=True) for batch in (1, 16, 64)),
    *(Shape(64, per_trip, joined=False) for per_trip in (64, 16, 4, 1)),
]


class _ClusterRunner(ScriptRunner):
    """Runs scripts as a cluster's masters have to be asked: one slot a call."""

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self.is_cluster = True


class Trips:
    """The sessions of one shape; each sample goes on where the one before it ended."""

    def __init__(self, store: Store, shape: Shape, name: str) -> None:
        """Connect; nothing is sent yet.

        Args:
            store: Where to.
            shape: How commits go out.
            name: Of the sessions, unlike any other's.
        """
        make_runner = ScriptRunner if shape.joined else _ClusterRunner
        settings = Settings(redis_url=store.url)
        self._clients: list[Any] = [
            connect(store.url, settings) for _ in range(shape.batch // shape.per_trip)
        ]
        self._stores = [
            RedisSessionStore(make_runner(client), Limits(), SameLimits(Limits()))
            for client in self._clients
        ]
        self._store_pid = store.pid
        self._names = [f"{name}-{number}" for number in range(shape.batch)]
        self._epochs: list[int] = []
        self._shape = shape
        self._last = 0

    async def open(self) -> None:
        """Begin the sessions."""
        first = StoredState(0, bytes(16), _token(0), VERSION, STATE)
        start = EpochStart(EpochMode.FAIL, HEAD, first, request_digest(""))
        for name in self._names:
            begun = await self._stores[0].begin_epoch(SessionKey(TENANT, name), start)
            if isinstance(begun, AbsentSession):
                raise TypeError(f"session {name} could not be begun: {begun}")
            self._epochs.append(begun.epoch)

    async def close(self) -> None:
        """Give the connections back."""
        for client in self._clients:
            await client.aclose()

    async def measure(self, chunks: int) -> dict[str, float]:
        """Commit about so many chunks.

        Returns:
            wall_us, server_us (processor time of this process) and store_us, microseconds a chunk.

        Raises:
            RuntimeError: If the store does not apply one.
        """
        rounds = [self._next_batch() for _ in range(max(1, chunks // self._shape.batch))]
        started, ours = time.perf_counter(), time.process_time()
        theirs = processor_s(self._store_pid)
        for parts in rounds:
            await self._commit(parts)
        spent = {
            "wall_us": time.perf_counter() - started,
            "server_us": time.process_time() - ours,
            "store_us": processor_s(self._store_pid) - theirs,
        }
        done = len(rounds) * self._shape.batch
        return {name: 1e6 * seconds / done for name, seconds in spent.items()}

    def _next_batch(self) -> list[list[ChunkCommit]]:
        self._last += 1
        state = StoredState(self._last, bytes(16), _token(self._last), VERSION, STATE)
        commits = [
            ChunkCommit(
                SessionKey(TENANT, name), epoch, _token(self._last - 1), state, self._last - 1
            )
            for name, epoch in zip(self._names, self._epochs, strict=True)
        ]
        size = self._shape.per_trip
        return [commits[first : first + size] for first in range(0, len(commits), size)]

    async def _commit(self, parts: Sequence[Sequence[ChunkCommit]]) -> None:
        outcomes = await asyncio.gather(
            *(store.commit_chunks(part) for store, part in zip(self._stores, parts, strict=True))
        )
        wrong = [one for some in outcomes for one in some if one is not ChunkOutcome.OK]
        if wrong:
            raise RuntimeError(f"the store answered a commit with {wrong[0]}")


def _token(number: int) -> bytes:
    return number.to_bytes(16, "big")
