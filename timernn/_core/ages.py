"""How long ago an answer came, by clocks that run on while the machine sleeps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Moment: TypeAlias = tuple[float, ...]
_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def read_clocks() -> Moment:
    """Read the clocks by which an age is known, in seconds.

    A monotonic clock stands still while a laptop or a virtual machine is suspended, and a store's
    time does not. Where no clock of the system counts that time, the wall clock, which may be set, is
    read beside the monotonic one.
    """
    if _BOOTTIME is not None:
        return (time.clock_gettime(_BOOTTIME),)
    return (time.monotonic(), time.time())


class Ages:
    """Reads how long ago something was.

    Args:
        read: Reads the clocks; a test sets it forward.
    """

    def __init__(self, read: Callable[[], Moment] = read_clocks) -> None:
        self.read = read

    def since(self, moment: Moment) -> float:
        """Return the seconds since a moment: of all clocks' progress the largest."""
        return max(now - then for now, then in zip(self.read(), moment, strict=True))


class Lifetime:
    """How long something on the server can live after the last answer that renewed it.

    It begins when the answer came, which is later than on the server: what is over here is over there.

    Args:
        ages: Reads how much time has passed.
        ttl_s: Its time to live in seconds; 0: not known, never over.

    Attributes:
        was_healed: Whether something of it was lost and made again.
    """

    def __init__(self, ages: Ages, ttl_s: float = 0.0) -> None:
        self._ages, self.ttl_s = ages, ttl_s
        self._renewed = ages.read()
        self.was_healed = False

    @property
    def age_s(self) -> float:
        """Seconds since the last answer that renewed it."""
        return self._ages.since(self._renewed)

    @property
    def is_over(self) -> bool:
        """Whether it has ended on the server by itself."""
        return 0.0 < self.ttl_s < self.age_s

    def renew(self, ttl_s: float | None = None) -> None:
        """Let it begin again, with another time to live if one is given."""
        self._renewed = self._ages.read()
        if ttl_s is not None:
            self.ttl_s = ttl_s
