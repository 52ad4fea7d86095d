"""Counts of several workers on one port."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from service.metrics.recorder import Recorder
from service.metrics.workers import WorkerMetrics, WorkerSocket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@asynccontextmanager
async def worker(path: Path, process: str, logins: int) -> AsyncIterator[None]:
    """Run the side of a worker that counted so many logins."""
    recorder = Recorder({})
    recorder.add("timernn_logins_total", "accepted", by=logins)
    recorder.set("timernn_sessions", 3)
    socket = WorkerSocket(recorder, process)
    await socket.start(f"unix:{path}")
    try:
        yield
    finally:
        await socket.stop()


async def logins(metrics: WorkerMetrics) -> float | list[float]:
    """Return how many logins all workers counted."""
    ((_, value),) = (await metrics.snapshot())["timernn_logins_total"]
    return value


@pytest.fixture
def metrics() -> Iterator[WorkerMetrics]:
    """Return the supervisor's side, for two workers."""
    made = WorkerMetrics(2)
    yield made
    made.close()


async def test_the_counts_of_workers_are_added(metrics: WorkerMetrics) -> None:
    """Gauges join as they mean."""
    async with worker(metrics.path(1), "a", 5), worker(metrics.path(2), "b", 7):
        found = await metrics.snapshot()
    assert found["timernn_logins_total"] == [(["accepted"], 12)]
    assert found["timernn_sessions"] == [([], 3)]


async def test_a_worker_started_again_takes_no_count_away(metrics: WorkerMetrics) -> None:
    """What the one before had counted is kept; its gauges go with it."""
    async with worker(metrics.path(1), "a", 5):
        async with worker(metrics.path(2), "b", 7):
            assert await logins(metrics) == 12
        async with worker(metrics.path(2), "c", 1):
            assert await logins(metrics) == 13
            assert (await metrics.snapshot())["timernn_workers"] == [([], 2)]


async def test_a_worker_that_does_not_answer_stands_as_it_did(metrics: WorkerMetrics) -> None:
    """Between its end and the next start nothing drops."""
    async with worker(metrics.path(1), "a", 5):
        async with worker(metrics.path(2), "b", 7):
            assert await logins(metrics) == 12
        assert await logins(metrics) == 12
