"""Joins chunks that wait for the same weights into one forward.

Each set of weights has its own queue, so that long work of one model does not hold up another's. While a batch of a
queue is computed, the chunks that arrive gather and form the next batch. A queue that is idle waits for no further chunk,
but for a few iterations of the event loop, in which chunks that have been received already are submitted. Of a model
whose steps are long, several batches are computed at once, each in a thread. The INFER chunks of a batch run
as one ragged forward. A TRAIN chunk is computed by itself, with matrices of its own shape, so that its result is the same
bit for bit whatever else is in the batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextvars import Context

    from rnn_engine import Array, Network, Prepared, State, Step
    from service.telemetry import Observer

# Work of up to this many multiply-adds, about 2 ms, is done on the event loop itself. A thread would need the GIL at every
# step of the recurrence, and so would the loop: both would be slower.
INLINE_WORK = 1 << 26

# Number of consecutive event-loop iterations without a new chunk after which the batch is dispatched. Between the socket
# and this queue a chunk takes up to three of them. For a lone chunk they add some microseconds.
IDLE_ITERATIONS = 3
# Number of waiting chunks at which the batch is dispatched without waiting for those iterations.
ENOUGH_CHUNKS = 64

# A batch takes no further chunk once it has this many rows, enough to keep a matrix product busy, and this many
# multiply-adds, about 20 ms: its answers are sent while the next batch is computed.
FULL_ROWS = 8
FULL_WORK = 1 << 29

# Least multiply-adds of one step, about 0.2 ms, from which several batches of a model are computed at once. Between two steps
# a batch in a thread needs the GIL. With shorter steps two batches would slow down each other and the loop.
LONG_STEP_WORK = 1 << 23

# Bytes of the outputs that the batches of one model under computation may produce, all of them together.
MAX_BATCH_BYTES = 1 << 26

Result = TypeVar("Result")


def hash_work(size_bytes: int) -> int:
    """Return the work of hashing or copying so many bytes, in multiply-adds that take as long."""
    return 16 * size_bytes


@dataclass(slots=True)
class Chunk:
    """A chunk to compute.

    Attributes:
        network: What computes it.
        prepared: The network's prepared weights, by whose identity chunks are joined.
        inputs: N rows of T steps.
        state: The state before them, N rows.
        alone: Whether it must not be joined with others; then its tape is kept.
        deliver: Called on the event loop with this chunk once it is computed.
        step: The result.
        error: Why there is no result.
        queued_at: When it was submitted, by `time.perf_counter`.
        context: In which it was submitted, and is delivered.
    """

    network: Network
    prepared: Prepared
    inputs: Array
    state: State
    alone: bool
    deliver: Callable[[Chunk], None]
    step: Step | None = None
    error: Exception | None = None
    queued_at: float = 0.0
    context: Context = field(default_factory=copy_context)


@dataclass(slots=True)
class _Batch:
    """Chunks that are computed together, with their rows and their work in multiply-adds."""

    chunks: list[Chunk]
    rows: int
    work: int


@dataclass(slots=True)
class _Queue:
    """The chunks that wait for one set of weights.

    Attributes:
        waiting: The chunks, oldest first.
        is_gathering: Whether a batch is about to be dispatched.
        computing: How many batches are being computed, each in a thread.
    """

    waiting: deque[Chunk] = field(default_factory=deque)
    is_gathering: bool = False
    computing: int = 0

    @property
    def step_work(self) -> int:
        """Multiply-adds of one step of the next batch, roughly."""
        first = self.waiting[0]
        joined = [first] if first.alone else islice(self.waiting, FULL_ROWS)
        return first.network.work(sum(len(chunk.inputs) for chunk in joined), 1)


class Scheduler:
    """Runs arithmetic for one event loop."""

    def __init__(
        self, max_batch_rows: int, threads: int = 1, observer: Observer = NULL_OBSERVER
    ) -> None:
        """Start idle.

        Args:
            max_batch_rows: Rows of a joined forward, at most.
            threads: How many batches of one model are computed at once.
            observer: Sees each batch.
        """
        self._max_rows = max_batch_rows
        self._threads = threads
        self._observer = observer
        self._queues: dict[int, _Queue] = {}
        # Twice as many, so that one model's batches do not take all of them.
        self._pool = ThreadPoolExecutor(2 * threads, thread_name_prefix="compute")

    def submit(self, chunk: Chunk) -> None:
        """Queue a chunk; its `deliver` is called on the event loop when it is computed."""
        chunk.queued_at = perf_counter()
        queue = self._queues.get(id(chunk.prepared))
        if queue is None:
            queue = self._queues[id(chunk.prepared)] = _Queue()
        queue.waiting.append(chunk)
        self._start_batch(queue)

    async def run(self, work: int, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run other arithmetic: on the event loop when it is little, else in a thread."""
        if work <= INLINE_WORK:
            return _quietly(function, *arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _quietly, function, *arguments)

    def close(self) -> None:
        """Let running work finish and take no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start_batch(self, queue: _Queue) -> None:
        """Begin to gather the next batch, unless batches under computation are to end first.

        Half a batch takes nearly as long as a full one. So chunks gather while a batch is computed, and a
        second batch is started beside it only where steps are long.
        """
        if not queue.waiting or queue.is_gathering:
            return
        if queue.computing and (
            queue.computing == self._threads or queue.step_work < LONG_STEP_WORK
        ):
            return
        queue.is_gathering = True
        self._gather(queue)

    def _gather(self, queue: _Queue, known: int = 0, idle: int = 0) -> None:
        """Dispatch the batch once some iterations of the event loop have brought no further chunk.

        Args:
            queue: The queue of the chunks.
            known: How many chunks were queued in the iteration before.
            idle: How many consecutive iterations have brought none.
        """
        count = len(queue.waiting)
        idle = idle + 1 if count == known else 0
        if idle < IDLE_ITERATIONS and count < ENOUGH_CHUNKS:
            asyncio.get_running_loop().call_soon(self._gather, queue, count, idle)
        else:
            self._dispatch(queue)

    def _dispatch(self, queue: _Queue) -> None:
        batch = self._take_batch(queue)
        began_at = perf_counter()
        if batch.work <= INLINE_WORK:
            _quietly(_compute, batch.chunks)
            queue.is_gathering = False
            self._finish(queue, batch, began_at)
            return

        def finish(_computed: object) -> None:
            queue.computing -= 1
            self._finish(queue, batch, began_at)

        queue.computing += 1
        computing = asyncio.get_running_loop().run_in_executor(
            self._pool, _quietly, _compute, batch.chunks
        )
        computing.add_done_callback(finish)
        queue.is_gathering = False
        self._start_batch(queue)

    def _take_batch(self, queue: _Queue) -> _Batch:
        """Take as many of the oldest chunks as may be computed together, at least one."""
        first = queue.waiting.popleft()
        network = first.network
        rows, steps = first.inputs.shape[:2]
        batch = _Batch([first], rows, network.work(rows, steps))
        step_bytes = network.output_size * first.state[0].itemsize
        room = MAX_BATCH_BYTES // self._threads // step_bytes - rows * steps
        while queue.waiting and (batch.rows < FULL_ROWS or batch.work < FULL_WORK):
            chunk = queue.waiting[0]
            n, t = chunk.inputs.shape[:2]
            room -= n * t
            if batch.rows + n > self._max_rows or room < 0:
                break
            batch.rows += n
            batch.work += network.work(n, t)
            batch.chunks.append(queue.waiting.popleft())
        return batch

    def _finish(self, queue: _Queue, batch: _Batch, began_at: float) -> None:
        """Report a batch that was computed, start the next one and deliver the results."""
        chunks = batch.chunks
        # Without their contexts all would run in that of a chunk of an earlier batch.
        chunks[0].context.run(
            self._observer.batch_computed,
            chunks=len(chunks),
            rows=batch.rows,
            work=batch.work,
            wait_s=began_at - chunks[0].queued_at,
            duration_s=perf_counter() - began_at,
        )
        if queue.waiting:
            self._start_batch(queue)
        if not (queue.is_gathering or queue.computing):
            del self._queues[id(chunks[0].prepared)]
        for chunk in chunks:
            chunk.context.run(chunk.deliver, chunk)


def _quietly(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run arithmetic without warnings of overflow: whoever asked for it checks the result."""
    with np.errstate(over="ignore", invalid="ignore"):
        return function(*arguments)


def _compute(batch: Sequence[Chunk]) -> None:
    joined = [chunk for chunk in batch if not chunk.alone]
    try:
        if len(joined) > 1:
            _compute_joined(joined)
        else:
            _compute_each(joined)
    except Exception:  # noqa: BLE001 - one chunk's failure must not fail the others
        _compute_each(joined)
    if len(joined) < len(batch):
        _compute_each([chunk for chunk in batch if chunk.alone])


def _compute_joined(chunks: Sequence[Chunk]) -> None:
    first = chunks[0]
    steps = first.network.forward_many(
        first.prepared, [chunk.inputs for chunk in chunks], [chunk.state for chunk in chunks]
    )
    for chunk, step in zip(chunks, steps, strict=True):
        chunk.step = step


def _compute_each(chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        try:
            chunk.step = chunk.network.forward(
                chunk.prepared, chunk.inputs, chunk.state, keep=chunk.alone
            )
        except Exception as error:  # noqa: BLE001 - it becomes the answer of this chunk alone
            chunk.error = error
