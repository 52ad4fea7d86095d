"""The compute scheduler: batches of what has queued, never waiting, each chunk for itself."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio

from rnn_engine import Params, TanhNetwork, rnn_forward
from service.compute import scheduler as module
from service.compute.scheduler import Chunk, Scheduler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

INPUTS, HIDDEN = 3, 4


@pytest_asyncio.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    """A scheduler of batches of up to eight rows."""
    made = Scheduler(8)
    yield made
    made.close()


@pytest.fixture
def params(rng: np.random.Generator) -> Params:
    """Weights that all chunks share."""
    shapes = ((INPUTS, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN,))
    return Params(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[Chunk]]:
    """The batches that were computed, in order."""
    seen: list[list[Chunk]] = []
    compute = module._compute

    def watched(batch: Sequence[Chunk]) -> None:
        seen.append(list(batch))
        compute(batch)

    monkeypatch.setattr(module, "_compute", watched)
    return seen


def submit(
    scheduler: Scheduler,
    params: Params,
    *,
    rows: int = 1,
    steps: int = 2,
    inputs: int = INPUTS,
    alone: bool = False,
) -> asyncio.Future[Chunk]:
    """Queue a chunk of ones."""
    done: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
    xs = np.ones((rows, steps, inputs), np.float32)
    state = (np.zeros((rows, HIDDEN), np.float32),)
    network = TanhNetwork(INPUTS, HIDDEN)
    scheduler.submit(Chunk(network, params, xs, state, alone, done.set_result))
    return done


async def test_a_lone_chunk_does_not_wait(
    scheduler: Scheduler, params: Params, batches: list[list[Chunk]]
) -> None:
    """It is computed after a few turns of the loop."""
    done = submit(scheduler, params)
    for _ in range(module.IDLE_ITERATIONS + 1):
        await asyncio.sleep(0)
    assert done.done()
    assert [len(batch) for batch in batches] == [1]


async def test_what_has_queued_is_one_batch_up_to_the_rows(
    scheduler: Scheduler, params: Params, batches: list[list[Chunk]]
) -> None:
    """Ten chunks of three rows go two by two, for eight rows are the most."""
    await asyncio.gather(*(submit(scheduler, params, rows=3) for _ in range(10)))
    assert [len(batch) for batch in batches] == [2] * 5


async def test_what_the_loop_is_about_to_bring_joins_the_batch(
    scheduler: Scheduler, params: Params, batches: list[list[Chunk]]
) -> None:
    """Four chunks, each a turn of the loop after the one before, are one batch."""
    futures = []
    for _ in range(4):
        futures.append(submit(scheduler, params))
        await asyncio.sleep(0)
    await asyncio.gather(*futures)
    assert [len(batch) for batch in batches] == [4]


async def test_a_batch_is_bounded_in_bytes(
    scheduler: Scheduler,
    params: Params,
    batches: list[list[Chunk]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However few rows, hidden states beyond the bound wait for the next batch."""
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 3 * 2 * HIDDEN * 4)
    await asyncio.gather(*(submit(scheduler, params) for _ in range(6)))
    assert [len(batch) for batch in batches] == [3, 3]
    await submit(scheduler, params, steps=100)


async def test_a_batch_of_much_work_is_full_with_the_rows_that_keep_a_product_busy(
    scheduler: Scheduler,
    params: Params,
    batches: list[list[Chunk]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its answers go out while the rest is computed; of little work all goes at once."""
    monkeypatch.setattr(module, "FULL_ROWS", 3)
    await asyncio.gather(*(submit(scheduler, params) for _ in range(6)))
    monkeypatch.setattr(module, "FULL_WORK", 1)
    await asyncio.gather(*(submit(scheduler, params) for _ in range(6)))
    assert [len(batch) for batch in batches] == [6, 3, 3]


async def test_more_rows_than_a_batch_go_by_themselves(
    scheduler: Scheduler, params: Params, batches: list[list[Chunk]]
) -> None:
    """A chunk wider than the bound is computed all the same."""
    await asyncio.gather(submit(scheduler, params, rows=9), submit(scheduler, params))
    assert [len(batch) for batch in batches] == [1, 1]


async def test_sets_of_weights_do_not_wait_for_each_other(
    scheduler: Scheduler, params: Params, batches: list[list[Chunk]]
) -> None:
    """Chunks of two models never share a batch."""
    other = Params(params.Wx.copy(), params.Wh, params.b)
    await asyncio.gather(*(submit(scheduler, one) for one in (params, other) * 3))
    assert all(len({id(chunk.prepared) for chunk in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("alone", [True, False])
async def test_a_failing_chunk_fails_alone(
    scheduler: Scheduler, params: Params, *, alone: bool
) -> None:
    """One of a wrong shape brings its own error; its batch is computed."""
    futures = [submit(scheduler, params, inputs=INPUTS + (i == 1), alone=alone) for i in range(4)]
    done = await asyncio.gather(*futures)
    assert [chunk.error is not None for chunk in done] == [False, True, False, False]
    assert [chunk.step is not None for chunk in done] == [True, False, True, True]


async def test_a_chunk_alone_has_the_bits_it_has_by_itself(
    scheduler: Scheduler, params: Params
) -> None:
    """In whatever company, a TRAIN chunk is computed in its own matrix shapes."""
    futures = [submit(scheduler, params, alone=i == 2) for i in range(5)]
    chunk = (await asyncio.gather(*futures))[2]
    here = rnn_forward(params, chunk.inputs, *chunk.state)
    assert chunk.step is not None
    np.testing.assert_array_equal(chunk.step.outputs, here.hs)


async def test_long_work_leaves_the_loop_free(scheduler: Scheduler) -> None:
    """Arithmetic beyond the inline bound runs in a thread; the loop turns meanwhile."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        go_on.wait(10)
        return threading.get_ident()

    running = asyncio.create_task(scheduler.run(module.INLINE_WORK + 1, work))
    assert await asyncio.to_thread(begun.wait, 10)
    go_on.set()
    assert await running != threading.get_ident()
    assert await scheduler.run(1, threading.get_ident) == threading.get_ident()


async def test_of_much_work_two_batches_are_computed_at_once(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two threads, and steps that are long, the second batch begins while the first is in work."""
    together = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(module, "INLINE_WORK", 0)
    monkeypatch.setattr(module, "LONG_STEP_WORK", 1)
    monkeypatch.setattr(module, "_compute", lambda _batch: together.wait())
    scheduler = Scheduler(8, threads=2)
    await asyncio.gather(*(submit(scheduler, params, rows=8) for _ in range(4)))
    scheduler.close()
    assert not together.broken


@pytest.mark.parametrize("alone", [True, False])
async def test_beside_a_batch_in_work_only_one_of_long_steps_begins(
    params: Params, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    """What is short of it gathers until the batch in work has ended; of chunks alone each counts for itself."""
    sizes: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def compute(batch: Sequence[Chunk]) -> None:
        sizes.append(len(batch))
        begun.set()
        assert go_on.wait(10)

    count = 7
    monkeypatch.setattr(module, "INLINE_WORK", 0)
    monkeypatch.setattr(module, "LONG_STEP_WORK", (1 if alone else count) * params.joined.size + 1)
    monkeypatch.setattr(module, "_compute", compute)
    scheduler = Scheduler(1024, threads=2)
    futures = [submit(scheduler, params)]
    assert await asyncio.to_thread(begun.wait, 10)
    for _ in range(count):
        futures.append(submit(scheduler, params, alone=alone))
        await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*futures)
    scheduler.close()
    assert sizes == [1, count]


async def test_nothing_is_kept_of_weights_that_are_done_with(
    scheduler: Scheduler, params: Params
) -> None:
    """A queue goes when it is empty, so that no later weights can meet it."""
    await asyncio.gather(*(submit(scheduler, params) for _ in range(3)))
    assert not scheduler._queues
