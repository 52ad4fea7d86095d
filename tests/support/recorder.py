"""An observer that keeps all that it sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.telemetry import Observer

if TYPE_CHECKING:
    from service.telemetry import CacheCounts

NOTED = (
    "rpc_started",
    "rpc_ended",
    "operation_started",
    "operation_ended",
    "chunk_applied",
    "chunk_replayed",
    "contribution_recorded",
    "version_published",
    "batch_computed",
    "round_trip_ended",
)


class Recorder(Observer):
    """Keeps each report, by the name of its method, as its arguments.

    Attributes:
        seen: The reports; a positional argument is kept as "name".
        caches: The counts of each cache.
    """

    def __init__(self) -> None:
        self.caches: dict[str, CacheCounts] = {}
        self.clear()
        for event in NOTED:
            setattr(self, event, self._noting(event))

    def cache_added(self, name: str, counts: CacheCounts) -> None:
        """Keep the counts of a cache."""
        assert name not in self.caches
        self.caches[name] = counts

    def clear(self) -> None:
        """Forget what was seen; caches count on."""
        self.seen: dict[str, list[dict[str, Any]]] = {event: [] for event in NOTED}

    def lookups(self) -> dict[str, tuple[int, int]]:
        """Return the hits and misses of each cache so far."""
        return {name: (counts.hits, counts.misses) for name, counts in self.caches.items()}

    def _noting(self, event: str) -> Any:
        def note(*name: str, **values: Any) -> None:
            self.seen[event].append({**dict(zip(["name"], name, strict=False)), **values})

        return note
