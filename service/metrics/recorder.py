"""Counts what an observer sees, in integers and lists: the streamed chunk that is counted waits for it.

prometheus-client's own counters take a lock and a dictionary each time, about a microsecond. All calls
come on the event loop, so none is needed here; the library writes the text when somebody asks for it.
"""

from __future__ import annotations

import os
import resource
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, TypeAlias

from service.metrics.families import COUNTS, FAMILIES, SECONDS, Kind
from service.telemetry import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from service.telemetry import CacheCounts

Labels: TypeAlias = "tuple[str, ...]"
Histogram: TypeAlias = "list[float]"
"""Counts by bucket, those beyond the last, then the sum of what was observed."""

Snapshot: TypeAlias = "dict[str, list[tuple[list[str], float | list[float]]]]"
"""By family its values: labels, and a number or a histogram; made of what JSON knows."""

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Recorder(Observer):
    """Counts of one process since it began."""

    def __init__(self, rpc_types: Mapping[str, str]) -> None:
        """Start at zero.

        Args:
            rpc_types: "unary", "server_stream", "client_stream" or "bidi_stream" of each method's path.
        """
        self._rpcs = {path: (kind, *path[1:].split("/")) for path, kind in rpc_types.items()}
        self._values: dict[str, dict[Labels, float]] = {
            name: {} for name, family in FAMILIES.items() if family.kind is not Kind.HISTOGRAM
        }
        self._histograms: dict[str, dict[Labels, Histogram]] = {
            name: {} for name, family in FAMILIES.items() if family.kind is Kind.HISTOGRAM
        }
        self._caches: dict[str, CacheCounts] = {}
        self._gauges: list[Callable[[], Mapping[str, float]]] = []
        # What a chunk adds to, without a lookup by name.
        self._operations: dict[tuple[str, str], int] = {}
        self._operation_costs: dict[str, tuple[Histogram, list[int]]] = {}
        self._batch_rows = self._histogram("timernn_batch_rows")
        self._batch_chunks = self._histogram("timernn_batch_chunks")
        self._batch_wait = self._histogram("timernn_batch_wait_seconds")
        self._batch_time = self._histogram("timernn_batch_seconds")
        self._batch_work = 0
        self._trip_time = self._histogram("timernn_store_round_trip_seconds")
        self._trips: dict[str, int] = {}
        self._trip_sums = [0, 0, 0, 0]  # commands, lost, bytes sent, bytes received
        self._applied = self._replayed = self._tape_bytes = 0

    # --- what the observer sees -------------------------------------------------------------------

    def rpc_started(self, method: str, metadata: object = None) -> None:  # noqa: ARG002
        """Count it; a method that the contract does not have never comes here."""
        self.add("grpc_server_started_total", *self._rpcs[method])

    def rpc_ended(self, method: str, *, code: str, duration_s: float) -> None:
        """Count it by its code, which go-grpc's dashboards know in camel case."""
        labels = self._rpcs[method]
        self.add("grpc_server_handled_total", *labels, _camel(code))
        self.observe("grpc_server_handling_seconds", duration_s, *labels)

    def operation_ended(
        self,
        kind: str,
        *,
        outcome: str,
        code: str,  # noqa: ARG002 - as the observer's
        duration_s: float,
        request_bytes: int,
        answer_bytes: int,
    ) -> None:
        """Count it, its duration and its bytes."""
        key = (kind, outcome)
        self._operations[key] = self._operations.get(key, 0) + 1
        costs = self._operation_costs.get(kind)
        if costs is None:
            costs = self._histogram("timernn_operation_seconds", kind), [0, 0]
            self._operation_costs[kind] = costs
        counts, sizes = costs
        counts[bisect_left(SECONDS, duration_s)] += 1
        counts[-1] += duration_s
        sizes[0] += request_bytes
        sizes[1] += answer_bytes

    def chunk_applied(self, *, tape_bytes: int) -> None:
        """Count it and its tape."""
        self._applied += 1
        self._tape_bytes += tape_bytes

    def chunk_replayed(self) -> None:
        """Count it."""
        self._replayed += 1

    def contribution_recorded(self, *, gradient_bytes: int) -> None:
        """Count it and its bytes."""
        self.add("timernn_contributions_total")
        self.add("timernn_contribution_bytes_total", by=gradient_bytes)

    def version_published(self, *, contributions: int, version_bytes: int) -> None:
        """Count it; it is a step if it took contributions."""
        if contributions:
            self.add("timernn_steps_total")
        self.add("timernn_versions_published_total")
        self.add("timernn_version_bytes_total", by=version_bytes)

    def batch_computed(
        self, *, chunks: int, rows: int, work: int, wait_s: float, duration_s: float
    ) -> None:
        """Count its size, its wait and its duration."""
        histogram = self._batch_chunks
        histogram[bisect_left(COUNTS, chunks)] += 1
        histogram[-1] += chunks
        histogram = self._batch_rows
        histogram[bisect_left(COUNTS, rows)] += 1
        histogram[-1] += rows
        histogram = self._batch_wait
        histogram[bisect_left(SECONDS, wait_s)] += 1
        histogram[-1] += wait_s
        histogram = self._batch_time
        histogram[bisect_left(SECONDS, duration_s)] += 1
        histogram[-1] += duration_s
        self._batch_work += work

    def round_trip_ended(
        self,
        name: str,
        *,
        commands: int,
        duration_s: float,
        sent_bytes: int,
        received_bytes: int,
        is_lost: bool,
    ) -> None:
        """Count it, its duration and its bytes."""
        self._trips[name] = self._trips.get(name, 0) + 1
        histogram = self._trip_time
        histogram[bisect_left(SECONDS, duration_s)] += 1
        histogram[-1] += duration_s
        sums = self._trip_sums
        sums[0] += commands
        sums[1] += is_lost
        sums[2] += sent_bytes
        sums[3] += received_bytes

    def cache_added(self, name: str, counts: CacheCounts) -> None:
        """Read the cache's counts when a snapshot is taken."""
        self._caches[name] = counts

    # --- what others add --------------------------------------------------------------------------

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        values = self._values[name]
        values[labels] = values.get(labels, 0) + by

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._values[name][labels] = value

    def forget(self, name: str) -> None:
        """Drop the values of a gauge: what its labels named may be gone."""
        self._values[name].clear()

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add to a histogram."""
        histogram = self._histogram(name, *labels)
        histogram[bisect_left(FAMILIES[name].buckets, value)] += 1
        histogram[-1] += value

    def ask(self, source: Callable[[], Mapping[str, float]]) -> None:
        """Ask this for gauges without labels whenever a snapshot is taken."""
        self._gauges.append(source)

    # --- what comes of it -------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return every value now."""
        self._gather()
        found: Snapshot = {}
        for name, values in self._values.items():
            if values:
                found[name] = [([*labels], value) for labels, value in values.items()]
        for name, histograms in self._histograms.items():
            if histograms:
                found[name] = [([*labels], [*counts]) for labels, counts in histograms.items()]
        return found

    def _gather(self) -> None:
        """Bring what is counted apart to its name."""
        put = self._values
        refusals: dict[Labels, float] = {}
        for (kind, outcome), count in self._operations.items():
            put["timernn_operations_total"][kind, outcome] = count
            if outcome != "OK":
                refusals[outcome,] = refusals.get((outcome,), 0) + count
        put["timernn_refusals_total"] = refusals
        for kind, (_, (request_bytes, answer_bytes)) in self._operation_costs.items():
            put["timernn_request_bytes_total"][kind,] = request_bytes
            put["timernn_answer_bytes_total"][kind,] = answer_bytes
        put["timernn_chunks_applied_total"][()] = self._applied
        put["timernn_chunks_replayed_total"][()] = self._replayed
        put["timernn_tape_bytes_total"][()] = self._tape_bytes
        put["timernn_batch_work_total"][()] = self._batch_work
        for command, count in self._trips.items():
            put["timernn_store_round_trips_total"][command,] = count
        for name, total in zip(_TRIP_SUMS, self._trip_sums, strict=True):
            put[name][()] = total
        for cache, counts in self._caches.items():
            put["timernn_cache_hits_total"][cache,] = counts.hits
            put["timernn_cache_misses_total"][cache,] = counts.misses
            put["timernn_cache_bytes"][cache,] = counts.size_bytes
        for name in ("timernn_contributions_total", "timernn_steps_total"):
            put[name].setdefault((), 0)
        put["timernn_resident_memory_bytes"][()] = resident_bytes()
        used = resource.getrusage(resource.RUSAGE_SELF)
        put["timernn_cpu_seconds_total"][()] = used.ru_utime + used.ru_stime
        put["timernn_workers"][()] = 1
        for source in self._gauges:
            for name, value in source().items():
                put[name][()] = value

    def _histogram(self, name: str, *labels: str) -> Histogram:
        histograms = self._histograms[name]
        histogram = histograms.get(labels)
        if histogram is None:
            histogram = histograms[labels] = [0.0] * (len(FAMILIES[name].buckets) + 2)
        return histogram


_TRIP_SUMS: Final = (
    "timernn_store_commands_total",
    "timernn_store_lost_round_trips_total",
    "timernn_store_sent_bytes_total",
    "timernn_store_received_bytes_total",
)


def resident_bytes() -> int:
    """Return the memory that this process occupies now; its largest so far where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - read often
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _camel(code: str) -> str:
    return code if code == "OK" else "".join(word.capitalize() for word in code.split("_"))
