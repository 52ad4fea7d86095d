"""A cache of what was used last, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

from service.telemetry import CacheCounts

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key; beyond the limit the least recently used are evicted, but never the last one put.

    Attributes:
        counts: Its hits and misses, and what its values weigh.
    """

    def __init__(self, limit_bytes: int, bytes_of: Callable[[V], int]) -> None:
        """Start empty.

        Args:
            limit_bytes: What the values may weigh together.
            bytes_of: Weighs a value; must give the same for as long as the value is kept.
        """
        self._values: OrderedDict[K, V] = OrderedDict()
        self._bytes_of = bytes_of
        self._limit = limit_bytes
        self.counts = CacheCounts()

    def get(self, key: K) -> V | None:
        """Return a value that is still here, and make it the one used last."""
        value = self._values.get(key)
        if value is None:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        self._values.move_to_end(key)
        return value

    def peek(self, key: K) -> V | None:
        """Return a value that is still here, without counting it as used."""
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value in place of the one before."""
        self.drop(key)
        self._values[key] = value
        self.counts.size_bytes += self._bytes_of(value)
        while self.counts.size_bytes > self._limit and len(self._values) > 1:
            self.drop(next(iter(self._values)))

    def drop(self, key: K) -> None:
        """Forget a value."""
        value = self._values.pop(key, None)
        if value is not None:
            self.counts.size_bytes -= self._bytes_of(value)
