"""The arithmetic of capacity: from what a chunk costs each process to how many processes a load needs.

A worker is one server process on one core. Chunks that arrive while it is busy are its next batch: the
larger its batches, the cheaper a chunk. So a worker has no fixed cost per chunk; the size of its batches at
a given load is the stationary state of a small Markov chain (`Costs.batches`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MAX_BATCH = (
    64  # the largest that was measured; what a worker takes is bounded by the rows of a batch
)


@dataclass(frozen=True)
class TripCosts:
    """Processor time of round trips of commits, by how many they carry.

    Attributes:
        sizes: Commits a round trip, rising from 1.
        server_us: Of the server, for the whole trip, microseconds.
        store_us: Of the store, the same.
    """

    sizes: Sequence[int]
    server_us: Sequence[float]
    store_us: Sequence[float]

    def server(self, commits: float) -> float:
        """Return the server's time for a trip, microseconds."""
        return float(np.interp(commits, self.sizes, self.server_us))

    def store(self, commits: float) -> float:
        """Return the store's time for a trip, microseconds."""
        return float(np.interp(commits, self.sizes, self.store_us))


@dataclass(frozen=True)
class Costs:
    """What was measured of one way of sending, in microseconds of processor time.

    Attributes:
        lone_us: Of the server, a chunk by itself.
        full_us: Of the server, a chunk in a batch of `full_batch`.
        full_batch: Chunks.
        joined: Trips to a store that is no cluster: one script call for all.
        apart: Trips to a master of a cluster: one script call a chunk.
        session_bytes: In the store.
    """

    lone_us: float
    full_us: float
    full_batch: float
    joined: TripCosts
    apart: TripCosts
    session_bytes: float

    def server_us(self, batch: int, masters: float = 0) -> float:
        """Return a server's time for a batch, microseconds.

        It was measured with one store; a cluster adds the difference between one trip and several.

        Args:
            batch: Chunks.
            masters: Of a cluster over which the batch's sessions are spread; 0: one store, no cluster.
        """
        each = (self.full_batch * self.full_us - self.lone_us) / (self.full_batch - 1)
        work = max(self.lone_us - each, 0.0) + each * batch
        if not masters:
            return work
        trips = trip_count(batch, masters)
        return work + trips * self.apart.server(batch / trips) - self.joined.server(batch)

    def store_us(self, batch: int, masters: float = 0) -> float:
        """Return the stores' time for a batch, all together, microseconds; see `server_us`."""
        if not masters:
            return self.joined.store(batch)
        trips = trip_count(batch, masters)
        return trips * self.apart.store(batch / trips)

    def most(self, masters: float = 0) -> float:
        """Return the chunks a second that one worker takes at most: its batches are full then."""
        return 1e6 * MAX_BATCH / self.server_us(MAX_BATCH, masters)

    def batches(self, rate: float, masters: float = 0) -> Array:
        """Return how probable a batch of 1, 2, … MAX_BATCH chunks is at a worker that gets `rate` chunks/s.

        The next batch is what a Poisson stream brings during this one; one chunk where it brings none.
        What comes beyond a full batch is not carried over: near the most a worker takes, use `most`.
        """
        sizes = np.arange(1, MAX_BATCH + 1)
        means = [rate * self.server_us(int(size), masters) / 1e6 for size in sizes]
        moves = np.array([_next_batch(mean) for mean in means])
        # The chain has one stationary state; it is what stays of any start.
        state = np.full(MAX_BATCH, 1 / MAX_BATCH)
        for _ in range(1_000):
            state, before = state @ moves, state
            if np.abs(state - before).max() < 1e-12:
                break
        return state

    def point(self, rate: float, masters: float = 0) -> "Point":
        """Return how a worker that gets `rate` chunks/s works."""
        state = self.batches(rate, masters)
        sizes = np.arange(1, MAX_BATCH + 1)
        chunks = float(state @ sizes)
        server = float(state @ [self.server_us(int(size), masters) for size in sizes])
        store = float(state @ [self.store_us(int(size), masters) for size in sizes])
        return Point(chunks, min(1.0, rate * server / chunks / 1e6), store / chunks)


@dataclass(frozen=True)
class Point:
    """How a worker works at some load.

    Attributes:
        batch: Chunks, mean.
        busy: Share of the time.
        store_us: Of the stores' processor time, a chunk.
    """

    batch: float
    busy: float
    store_us: float


@dataclass(frozen=True)
class Fleet:
    """Workers and the masters of their Redis Cluster.

    Attributes:
        workers: Server processes, one core each.
        masters: Of the cluster, each one core; 0: one store that is no cluster.
        routed: Whether a router sends the sessions of a slot to the same worker, so that a worker's
            sessions are one master's; otherwise any worker serves any session.
    """

    workers: int
    masters: int
    routed: bool = False

    @property
    def stores(self) -> int:
        """The number of store processes."""
        return max(1, self.masters)

    @property
    def seen(self) -> int:
        """Over how many masters the sessions of one worker are spread; 0: one store, no cluster."""
        return min(1, self.masters) if self.routed else self.masters

    def masters_busy(self, costs: Costs, rate: float) -> float:
        """Return the share of the time that a store is busy at `rate` chunks/s of all workers."""
        each = costs.point(rate / self.workers, self.seen).store_us
        return rate * each / 1e6 / self.stores


def plan(costs: Costs, rate: float, headroom: float, *, routed: bool) -> Fleet:
    """Return the smallest fleet that takes `rate` chunks/s and is loaded to a share of what it can take.

    Args:
        costs: What was measured.
        rate: Chunks a second.
        headroom: The share, for workers and masters alike.
        routed: Whether a worker sees the sessions of one master only.
    """
    masters = 1
    while True:
        most = costs.most(1 if routed else masters)
        fleet = Fleet(math.ceil(rate / (headroom * most)), masters, routed)
        # More masters make shorter trips, and these cost more: the number only rises until it fits.
        needed = math.ceil(masters * fleet.masters_busy(costs, rate) / headroom)
        if needed <= masters:
            return fleet
        masters = needed


def trip_count(batch: float, masters: float) -> float:
    """Return over how many of `masters` a batch is spread, when each is as likely for each chunk."""
    return float(masters * (1 - (1 - 1 / masters) ** batch)) if masters > 1 else 1.0


def _next_batch(mean: float) -> Array:
    """Return the probabilities of the next batch's sizes 1 to MAX_BATCH, where `mean` chunks are expected."""
    counts = np.arange(MAX_BATCH + 1)
    logarithms = counts * math.log(mean) - mean - [math.lgamma(count + 1) for count in counts]
    poisson = np.exp(logarithms)
    sizes = poisson[1:]
    sizes[0] += poisson[0]
    sizes[-1] += max(0.0, 1 - poisson.sum())
    return np.asarray(sizes, dtype=np.float64)


def read_costs(where: dict[str, Any], scenario: str, lone: str = "stream-1") -> Costs:
    """Take what benchmarks.where measured.

    Args:
        where: Its JSON document.
        scenario: The way of sending that fills batches.
        lone: The one with a chunk at a time.
    """
    ours = {
        one["scenario"]: {
            name: median(result[name] for result in one["results"]) for name in one["results"][0]
        }
        for one in where["processes"]
        if one["server"] == "timernn"
    }
    trips = where["trips"]
    joined = [one for one in trips if one["joined"]]
    # A cluster was measured with as many trips at once as there are masters in a batch of 64.
    apart = [one for one in trips if not one["joined"]]
    return Costs(
        ours[lone]["server_us"],
        ours[scenario]["server_us"],
        ours[scenario]["batch"],
        _trip_costs(joined),
        _trip_costs(apart),
        where["session_bytes"],
    )


def _trip_costs(trips: Sequence[dict[str, Any]]) -> TripCosts:
    ordered = sorted(trips, key=lambda one: one["per_trip"])
    sizes = [one["per_trip"] for one in ordered]
    return TripCosts(
        sizes,
        [one["per_trip"] * one["server_us"] for one in ordered],
        [one["per_trip"] * one["store_us"] for one in ordered],
    )
