"""Joins chunks that wait for the same weights into one forward.

A chunk never waits for company: what has queued while the engine was busy is the next batch, and what
has come already but lies in the loop's queue still joins it. Each set of weights has its own queue, so
one model's long work does not hold up another's; of much work, several batches of one queue are computed
at once. INFER chunks of a batch run as one ragged forward; a TRAIN chunk runs by itself, in its own
matrix shapes, so that its result does not depend on who else is there, bit for bit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rnn_engine import Tape, rnn_forward, rnn_forward_many

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rnn_engine import Array, Params

# Up to this many multiply-adds, about 2 ms, arithmetic runs on the loop itself: a thread would have to
# ask the loop for the interpreter at every step of the recurrence and be slower for both.
INLINE_WORK = 1 << 26

# Of the loop, without a new chunk, before what has gathered is computed. From the socket to here a chunk
# takes up to three; of a lone one they take some microseconds.
TURNS = 3
ENOUGH = 64  # chunks are computed without looking for more

# With so many rows, which are enough to keep a matrix product busy, and so many multiply-adds, about 20 ms,
# a batch is full: its answers go out while the next one is computed.
FULL_ROWS = 8
FULL_WORK = 1 << 29

# Between its steps a batch in a thread waits for the interpreter, and so do the loop and other threads for
# it: of steps of fewer multiply-adds, some 0.2 ms, two batches at once would hold up each other and the loop.
LONG_STEP_WORK = 1 << 23

MAX_BATCH_BYTES = 1 << 26  # of the hidden states that a model's batches in work compute

Result = TypeVar("Result")


def hash_work(size_bytes: int) -> int:
    """Return the work of hashing or copying so many bytes, in multiply-adds that take as long."""
    return 16 * size_bytes


@dataclass(slots=True)
class Chunk:
    """A chunk to compute: xs (N, T, D) from h0 (N, H); `alone`: not joined with others.

    When `deliver` is called, either `tape` or `error` is set.
    """

    params: Params
    xs: Array
    h0: Array
    alone: bool
    deliver: Callable[[Chunk], None]
    tape: Tape | None = None
    error: Exception | None = None

    @property
    def work(self) -> int:
        """Multiply-adds, roughly."""
        n, t, _ = self.xs.shape
        return int(n * t * self.params.joined.size)


@dataclass(slots=True)
class _Queue:
    waiting: deque[Chunk] = field(default_factory=deque)
    is_gathering: bool = False
    computing: int = 0  # batches, each in a thread

    @property
    def step_work(self) -> int:
        """Multiply-adds of one step of the next batch, roughly."""
        first = self.waiting[0]
        joined = [first] if first.alone else islice(self.waiting, FULL_ROWS)
        return int(sum(len(chunk.xs) for chunk in joined) * first.params.joined.size)


class Scheduler:
    """Runs arithmetic for one event loop."""

    def __init__(self, max_batch_rows: int, threads: int = 1) -> None:
        """Bound the rows of a joined forward, and the batches of one model that are computed at once."""
        self._max_rows = max_batch_rows
        self._threads = threads
        self._queues: dict[int, _Queue] = {}
        # As many again for other models.
        self._pool = ThreadPoolExecutor(2 * threads, thread_name_prefix="compute")

    def submit(self, chunk: Chunk) -> None:
        """Queue a chunk; its `deliver` is called on the loop when it is computed."""
        queue = self._queues.get(id(chunk.params))
        if queue is None:
            queue = self._queues[id(chunk.params)] = _Queue()
        queue.waiting.append(chunk)
        self._go_on(queue)

    async def run(self, work: int, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run other arithmetic: inline when it is small, else in a thread."""
        if work <= INLINE_WORK:
            return _quietly(function, *arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _quietly, function, *arguments)

    def close(self) -> None:
        """Let running work finish and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _go_on(self, queue: _Queue) -> None:
        """Begin the next batch if nothing is in work; beside others only one of long steps.

        Half a batch takes nearly as long as a whole one: what is short of rows gathers until a batch
        in work has ended.
        """
        if not queue.waiting or queue.is_gathering:
            return
        if queue.computing and (
            queue.computing == self._threads or queue.step_work < LONG_STEP_WORK
        ):
            return
        queue.is_gathering = True
        self._gather(queue)

    def _gather(self, queue: _Queue, known: int = 0, turns: int = 0) -> None:
        """Compute once the loop has turned a few times and brought no other chunk."""
        count = len(queue.waiting)
        turns = turns + 1 if count == known else 0
        if turns < TURNS and count < ENOUGH:
            asyncio.get_running_loop().call_soon(self._gather, queue, count, turns)
        else:
            self._run_next(queue)

    def _run_next(self, queue: _Queue) -> None:
        batch, work = self._take_batch(queue)
        if work <= INLINE_WORK:
            _quietly(_compute, batch)
            queue.is_gathering = False
            self._finish(queue, batch)
            return
        queue.computing += 1
        computing = asyncio.get_running_loop().run_in_executor(
            self._pool, _quietly, _compute, batch
        )
        computing.add_done_callback(lambda _done: self._finish_computing(queue, batch))
        queue.is_gathering = False
        self._go_on(queue)

    def _finish_computing(self, queue: _Queue, batch: Sequence[Chunk]) -> None:
        queue.computing -= 1
        self._finish(queue, batch)

    def _take_batch(self, queue: _Queue) -> tuple[list[Chunk], int]:
        """Return what goes together, and its work."""
        batch = [queue.waiting.popleft()]
        rows, steps, _ = batch[0].xs.shape
        room = MAX_BATCH_BYTES // self._threads // batch[0].h0[0].nbytes - rows * steps
        work = batch[0].work
        while queue.waiting and (rows < FULL_ROWS or work < FULL_WORK):
            n, t, _ = queue.waiting[0].xs.shape
            rows, room = rows + n, room - n * t
            if rows > self._max_rows or room < 0:
                break
            work += queue.waiting[0].work
            batch.append(queue.waiting.popleft())
        return batch, work

    def _finish(self, queue: _Queue, batch: Sequence[Chunk]) -> None:
        self._go_on(queue)
        if not (queue.is_gathering or queue.computing):
            del self._queues[id(batch[0].params)]
        for chunk in batch:
            chunk.deliver(chunk)


def _quietly(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run arithmetic without warnings of overflow: whoever asked looks at the result."""
    with np.errstate(over="ignore", invalid="ignore"):
        return function(*arguments)


def _compute(batch: Sequence[Chunk]) -> None:
    joined = [chunk for chunk in batch if not chunk.alone]
    try:
        if len(joined) > 1:
            _compute_joined(joined)
        else:
            _compute_each(joined)
    except Exception:  # noqa: BLE001 - whatever one chunk brought on, the others must not pay for it
        _compute_each(joined)
    _compute_each([chunk for chunk in batch if chunk.alone])


def _compute_joined(chunks: Sequence[Chunk]) -> None:
    params = chunks[0].params
    results = rnn_forward_many(params, [c.xs for c in chunks], [c.h0 for c in chunks])
    for chunk, hs in zip(chunks, results, strict=True):
        chunk.tape = Tape(chunk.xs, chunk.h0, hs)


def _compute_each(chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        try:
            chunk.tape = rnn_forward(chunk.params, chunk.xs, chunk.h0)
        except Exception as error:  # noqa: BLE001 - it becomes the answer of this chunk alone
            chunk.error = error
