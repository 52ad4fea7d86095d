"""Snapshots of several processes as one, and as Prometheus' text."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.metrics.families import FAMILIES, Kind, Merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import (
        Metric,
    )

    from service.metrics.families import Family
    from service.metrics.recorder import Labels, Snapshot

_MERGES: Final[dict[Merge, Callable[[list[float]], float]]] = {
    Merge.SUM: sum,
    Merge.MAX: max,
    Merge.MIN: min,
}


def merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Return the values of several processes as those of one server."""
    gathered: dict[str, dict[Labels, list[float | list[float]]]] = {}
    for snapshot in snapshots:
        for name, values in snapshot.items():
            of_name = gathered.setdefault(name, {})
            for labels, value in values:
                of_name.setdefault(tuple(labels), []).append(value)
    return {
        name: [([*labels], _merge(FAMILIES[name], found)) for labels, found in values.items()]
        for name, values in gathered.items()
        if name in FAMILIES  # of a worker of another release
    }


def _merge(family: Family, values: list[float | list[float]]) -> float | list[float]:
    if family.kind is Kind.HISTOGRAM:
        lists = [value for value in values if isinstance(value, list)]
        return [sum(column) for column in zip(*lists, strict=True)]
    numbers = [value for value in values if not isinstance(value, list)]
    return float(_MERGES[family.merge](numbers))


def as_text(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """Return the text that Prometheus reads, and its content type.

    Args:
        snapshot: What to show.
        accept: The header of the request: it chooses between the text form and OpenMetrics.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Shown(snapshot))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Shown(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, values in self._snapshot.items():
            yield _metric(FAMILIES[name], values)


def _metric(family: Family, values: list[tuple[list[str], float | list[float]]]) -> Metric:
    if family.kind is Kind.HISTOGRAM:
        shown = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, counts in values:
            if isinstance(counts, list):
                *in_buckets, total = counts
                bounds = [*map(_bound, family.buckets), "+Inf"]
                shown.add_metric(labels, [*zip(bounds, accumulate(in_buckets), strict=True)], total)
        return shown
    made = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    single = made(family.name.removesuffix("_total"), family.help, labels=family.labels)
    for labels, value in values:
        if not isinstance(value, list):
            single.add_metric(labels, value)
    return single


def _bound(bound: float) -> str:
    return repr(float(bound))
