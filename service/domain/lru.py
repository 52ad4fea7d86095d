"""What this process used last, up to a number of bytes: nothing that it forgets can be missed."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key, those unused longest forgotten first; the last one stays, whatever its size."""

    def __init__(self, limit_bytes: int, bytes_of: Callable[[V], int]) -> None:
        """Keep values up to a limit; `bytes_of` must not change while a value is kept."""
        self._values: OrderedDict[K, V] = OrderedDict()
        self._bytes_of = bytes_of
        self._limit = limit_bytes
        self._bytes = 0

    def get(self, key: K) -> V | None:
        """Return a value that is still here, as the one used last."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep a value in place of the one before."""
        self.drop(key)
        self._values[key] = value
        self._bytes += self._bytes_of(value)
        while self._bytes > self._limit and len(self._values) > 1:
            self.drop(next(iter(self._values)))

    def drop(self, key: K) -> None:
        """Forget a value."""
        value = self._values.pop(key, None)
        if value is not None:
            self._bytes -= self._bytes_of(value)
