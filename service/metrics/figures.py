"""What a replica says of itself between two beats, and how that of several becomes one.

Made of what is counted anyway: two snapshots a beat apart, subtracted. Counts and histograms of replicas are
added, so a percentile is one of all their calls and no mean of percentiles.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from service.metrics.families import COUNTS, SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from service.metrics.recorder import Snapshot

_COUNTS: Final = {
    "chunks": "timernn_chunks_applied_total",
    "replayed": "timernn_chunks_replayed_total",
    "operations": "timernn_operations_total",
    "steps": "timernn_steps_total",
    "cpu_seconds": "timernn_cpu_seconds_total",
}
_GAUGES: Final = {
    "store_usable": "timernn_store_usable",
    "operations_in_flight": "timernn_operations_in_flight",
    "memory_bytes": "timernn_resident_memory_bytes",
    "sessions": "timernn_sessions",
}
_DURATIONS: Final = ("forward", "backward", "update")
_SIZES: Final = {"chunks": "timernn_batch_chunks", "rows": "timernn_batch_rows"}
_PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def window(now: Snapshot, before: Snapshot, window_s: float) -> dict[str, Any]:
    """Return what happened between two snapshots of one process.

    Args:
        now: The later one.
        before: The earlier one; empty at the first.
        window_s: The time between them, in seconds.
    """
    histograms = {kind: ("timernn_operation_seconds", kind) for kind in _DURATIONS}
    return {
        "window_s": round(window_s, 3),
        "counts": {
            key: round(_total(now, name) - _total(before, name), 6) for key, name in _COUNTS.items()
        },
        "refusals": _refusals(now, before),
        "durations": {kind: _difference(now, before, *name) for kind, name in histograms.items()}
        | {"store": _difference(now, before, "timernn_store_round_trip_seconds")},
        "batches": {key: _difference(now, before, name) for key, name in _SIZES.items()},
        **{key: _total(now, name) for key, name in _GAUGES.items()},
    }


def joined(windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of all replicas together, as the page and `timernn top` show them.

    Rates are per second; durations in ms; a percentile of nothing is None.
    """
    rates: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for each in windows:
        span_s = max(each["window_s"], 0.001)
        rates.update({key: count / span_s for key, count in each["counts"].items()})
        refusals.update({key: count / span_s for key, count in each["refusals"].items()})
    durations = {
        kind: _spread(windows, "durations", kind, bounds=SECONDS, scale=1000)
        for kind in (*_DURATIONS, "store")
    }
    batches = {
        key: _spread(windows, "batches", key, bounds=COUNTS, is_whole=True) for key in _SIZES
    }
    return {
        "chunks_per_s": round(rates["chunks"], 2),
        "replayed_per_s": round(rates["replayed"], 2),
        "operations_per_s": round(rates["operations"], 2),
        "steps_per_s": round(rates["steps"], 2),
        "refusals_per_s": {key: round(rate, 3) for key, rate in sorted(refusals.items())},
        "duration_ms": durations,
        "batch_chunks": batches["chunks"],
        "batch_rows": batches["rows"],
        "sessions": max((int(each["sessions"]) for each in windows), default=0),
        "operations_in_flight": sum(int(each["operations_in_flight"]) for each in windows),
        "memory_bytes": sum(int(each["memory_bytes"]) for each in windows),
        "cpu_cores": round(rates["cpu_seconds"], 3),
    }


def percentile(
    counts: Sequence[float], bounds: Sequence[float], share: float, *, is_whole: bool = False
) -> float | None:
    """Return the value under which a share of what was observed lies, as Prometheus estimates it.

    Args:
        counts: By bucket, those beyond the last bound included.
        bounds: Upper bounds of the buckets.
        share: Between 0 and 1.
        is_whole: Whether only whole numbers were observed: then the bound is the answer.

    Returns:
        A value between the bounds of its bucket; None if nothing was observed.
    """
    wanted = sum(counts) * share
    if not wanted:
        return None
    below, lower = 0.0, 0.0
    for count, upper in zip(counts, bounds, strict=False):
        if count and below + count >= wanted:
            return upper if is_whole else lower + (upper - lower) * (wanted - below) / count
        below, lower = below + count, upper
    return bounds[-1]


def _spread(
    windows: Iterable[Mapping[str, Any]],
    group: str,
    key: str,
    *,
    bounds: Sequence[float],
    scale: float = 1.0,
    is_whole: bool = False,
) -> dict[str, float | None]:
    """Return how often, how much on average and the percentiles of a histogram of all replicas."""
    *counts, total = [0.0] * (len(bounds) + 2)
    per_s = 0.0
    for each in windows:
        *these, this_total = each[group][key]
        counts = [a + b for a, b in zip(counts, these, strict=True)]
        total += this_total
        per_s += sum(these) / max(each["window_s"], 0.001)
    observed = sum(counts)
    found: dict[str, float | None] = {"per_s": round(per_s, 2)}
    found["mean"] = round(total / observed * scale, 3) if observed else None
    for name, share in _PERCENTILES.items():
        value = percentile(counts, bounds, share, is_whole=is_whole)
        found[name] = None if value is None else round(value * scale, 3)
    return found


def _total(snapshot: Snapshot, name: str) -> float:
    return sum(value for _, value in snapshot.get(name, ()) if not isinstance(value, list))


def _refusals(now: Snapshot, before: Snapshot) -> dict[str, int]:
    name = "timernn_refusals_total"
    past = {labels[0]: value for labels, value in before.get(name, ())}
    found: dict[str, int] = {}
    for (reason,), value in now.get(name, ()):
        earlier = past.get(reason, 0)
        if not isinstance(value, list) and not isinstance(earlier, list) and value > earlier:
            found[reason] = int(value - earlier)
    return found


def _difference(now: Snapshot, before: Snapshot, name: str, *labels: str) -> list[float]:
    bounds = COUNTS if name.startswith("timernn_batch_") else SECONDS
    nothing = [0.0] * (len(bounds) + 2)
    late, early = (_histogram(each, name, labels) or nothing for each in (now, before))
    return [round(a - b, 6) for a, b in zip(late, early, strict=True)]


def _histogram(snapshot: Snapshot, name: str, labels: tuple[str, ...]) -> list[float] | None:
    for found, value in snapshot.get(name, ()):
        if tuple(found) == labels and isinstance(value, list):
            return value
    return None
