"""Refusals that are held back for a while, so that whoever does not wait when it is refused waits for the refusal."""

from __future__ import annotations

import asyncio
from typing import Final

MOST_HELD: Final = 200


class Holding:
    """Holds refusals back, so many at once; more than these leave at once.

    Attributes:
        count: How many are held.
    """

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    async def hold(self, delay_s: float) -> None:
        """Wait for so many seconds, unless too many wait already."""
        if delay_s <= 0 or self.count >= MOST_HELD:
            return
        self.count += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self.count -= 1
