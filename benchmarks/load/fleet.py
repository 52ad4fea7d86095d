"""Simulates a fleet chunk by chunk: sessions are hashed over workers and masters.

Chunks arrive as a Poisson stream, each of a session drawn at random. A worker that is free takes all chunks
that are queued, up to a full batch; when it is done it sends their commits, one round trip per master; a
master does one round trip after another; a chunk is answered when its round trip is. Masters do not affect
workers, so the workers are simulated first and the masters after them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.load.costs import MAX_BATCH, Array, Costs, Fleet

SESSIONS = 1_000_000
WARM_UP = 0.25  # of the time, not counted: the fleet begins empty
INSTANTS = 1_000  # at what is in flight


@dataclass(frozen=True)
class Outcome:
    """What was seen after the warm-up.

    Attributes:
        rate: Chunks answered a second.
        p50_us: Latency from arrival to answer, microseconds.
        p99_us: The same.
        mean_us: The same.
        in_flight: Chunks in the fleet, mean over time.
        batch: Chunks, mean.
        workers_busy: Share of the time, mean over the workers.
        masters_busy: Share of the time, mean over the masters.
    """

    rate: float
    p50_us: float
    p99_us: float
    mean_us: float
    in_flight: float
    batch: float
    workers_busy: float
    masters_busy: float


@dataclass
class _Work:
    """What the workers did.

    Attributes:
        starts: Of each batch, µs.
        ends: Of each batch, µs.
        trip_ready: When each round trip leaves, µs.
        trip_master: To which master.
        trip_size: Commits it carries.
        trip_of: For each chunk its round trip.
    """

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    trip_ready: list[float] = field(default_factory=list)
    trip_master: list[int] = field(default_factory=list)
    trip_size: list[int] = field(default_factory=list)
    trip_of: list[int] = field(default_factory=list)


def simulate(
    costs: Costs, fleet: Fleet, rate: float, *, chunks: int = 100_000, seed: int = 0
) -> Outcome:
    """Play a fleet through.

    Args:
        costs: What a batch and a round trip take.
        fleet: Who serves.
        rate: Chunks a second offered.
        chunks: How many are offered.
        seed: The same one gives the same outcome.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1e6 / rate, chunks))
    session_of = rng.integers(SESSIONS, size=chunks)
    by_name, by_slot = rng.random(SESSIONS), rng.random(SESSIONS)
    place = (by_slot if fleet.routed else by_name)[session_of]
    worker_of = (place * fleet.workers).astype(np.int64)
    master_of = (by_slot[session_of] * fleet.stores).astype(np.int64)

    work = _Work()
    times = _Times(costs, is_cluster=fleet.masters > 0)
    # Where each chunk stands among those of its worker, workers one after another.
    order = np.argsort(worker_of, kind="stable")
    shares = np.split(order, np.cumsum(np.bincount(worker_of, minlength=fleet.workers))[:-1])
    for share in shares:
        _play_worker(times, arrivals[share].tolist(), master_of[share].tolist(), work)
    trip_ends, trip_us = _play_masters(times, work)
    finished = np.empty(chunks)
    finished[order] = trip_ends[work.trip_of]

    end = float(arrivals[-1])
    window = (WARM_UP * end, end)
    span = window[1] - window[0]
    counted = arrivals >= window[0]
    latencies = (finished - arrivals)[counted]
    p50, p99 = np.percentile(latencies, (50, 99))
    instants = np.linspace(*window, INSTANTS)
    in_flight = np.searchsorted(arrivals, instants) - np.searchsorted(np.sort(finished), instants)
    return Outcome(
        rate=1e6 * float(np.sum((finished >= window[0]) & (finished <= window[1]))) / span,
        p50_us=float(p50),
        p99_us=float(p99),
        mean_us=float(latencies.mean()),
        in_flight=float(in_flight.mean()),
        batch=chunks / len(work.starts),
        workers_busy=_overlap(np.array(work.starts), np.array(work.ends), window)
        / (span * fleet.workers),
        masters_busy=_overlap(trip_ends - trip_us, trip_ends, window) / (span * fleet.stores),
    )


class _Times:
    """The costs looked up once: a server's time by batch and trip, a store's by trip, µs."""

    def __init__(self, costs: Costs, *, is_cluster: bool) -> None:
        sizes = range(MAX_BATCH + 1)
        trips = costs.apart if is_cluster else costs.joined
        # A batch as measured, less its one trip; each trip it makes is added.
        self.batch_us = [
            0.0 if not size else costs.server_us(size) - costs.joined.server(size) for size in sizes
        ]
        self.trip_us = [trips.server(size) for size in sizes]
        self.store_us = np.array([trips.store(size) for size in sizes])


def _play_worker(
    times: _Times, arrivals: Sequence[float], masters: Sequence[int], work: _Work
) -> None:
    first, free = 0, 0.0
    while first < len(arrivals):
        start = max(free, arrivals[first])
        after = min(bisect_right(arrivals, start, first), first + MAX_BATCH)
        free = start + times.batch_us[after - first]
        trips: dict[int, int] = {}
        for master in masters[first:after]:
            trip = trips.setdefault(master, len(work.trip_size))
            if trip == len(work.trip_size):
                work.trip_master.append(master)
                work.trip_size.append(0)
            work.trip_size[trip] += 1
            work.trip_of.append(trip)
        free += sum(times.trip_us[work.trip_size[trip]] for trip in trips.values())
        work.trip_ready += [free] * len(trips)
        work.starts.append(start)
        work.ends.append(free)
        first = after


def _play_masters(times: _Times, work: _Work) -> tuple[Array, Array]:
    """Return when each trip is done and how long the store works on it, µs."""
    ready, master_of = np.array(work.trip_ready), np.array(work.trip_master)
    trip_us = times.store_us[work.trip_size]
    ends = np.empty(len(ready))
    order = np.lexsort((ready, master_of))
    shares = np.split(order, np.flatnonzero(np.diff(master_of[order])) + 1)
    for share in shares:
        # Each begins when it is there and the one before is done: Lindley's recursion, unrolled.
        total = np.cumsum(trip_us[share])
        ends[share] = total + np.maximum.accumulate(ready[share] - total + trip_us[share])
    return ends, trip_us


def _overlap(starts: Array, ends: Array, window: tuple[float, float]) -> float:
    return float(np.sum(np.clip(ends, *window) - np.clip(starts, *window)))
