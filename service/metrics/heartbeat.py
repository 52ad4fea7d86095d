"""Says again and again that this replica runs, and how it does: once a beat, nothing for a call."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from service.metrics.figures import window

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.domain.ports import ReplicaStore
    from service.domain.recent_steps import LastStep, RecentSteps
    from service.domain.types import ModelKey
    from service.metrics.recorder import Recorder, Snapshot

BEAT_S: Final = 2.0
_FIRST_S: Final = 0.2  # by then the replica serves

_LOGGER = logging.getLogger(__name__)


class Heartbeat:
    """One replica's.

    Attributes:
        secret: What all replicas of the store share, for the page's logins; this one's own until the store
            has answered.
    """

    def __init__(
        self,
        store: ReplicaStore,
        recorder: Recorder,
        steps: RecentSteps,
        *,
        replica_id: str,
        about: Mapping[str, Any],
    ) -> None:
        """Begin at what has been counted so far.

        Args:
            store: Keeps the beats.
            recorder: What is counted.
            steps: The models' last steps.
            replica_id: This replica's name.
            about: What each beat says beside the figures: version, host, start and the like.
        """
        self.secret = secrets.token_bytes(32)
        self._store, self._recorder, self._steps = store, recorder, steps
        self._replica_id, self._about = replica_id, about
        self._before: Snapshot = recorder.snapshot()
        self._before_steps: dict[ModelKey, LastStep] = {}
        self._at = time.monotonic()

    async def run(self) -> None:
        """Beat for ever; a store that is down lets beats fail, and the replica lapse."""
        await asyncio.sleep(_FIRST_S)
        while True:
            try:
                await self.beat()
            except Exception as error:  # noqa: BLE001 - health says so already
                _LOGGER.debug("a heartbeat failed: %s", error)
            await asyncio.sleep(BEAT_S)

    async def beat(self) -> None:
        """Say how it did since the last beat.

        Raises:
            DomainError: If the store cannot be used.
        """
        now, snapshot, steps = time.monotonic(), self._recorder.snapshot(), self._steps.all()
        figures = {
            **self._about,
            **window(snapshot, self._before, now - self._at),
            "models": self._stepped(steps),
        }
        self._before, self._before_steps, self._at = snapshot, steps, now
        self.secret = await self._store.beat(self._replica_id, figures, self.secret)

    def _stepped(self, steps: Mapping[ModelKey, LastStep]) -> list[list[Any]]:
        """Return by model how many steps there were since the last beat, and the last one."""
        found = []
        for key, last in steps.items():
            before = self._before_steps.get(key)
            # A model that had dropped out counts anew.
            past = before.steps if before and before.steps <= last.steps else 0
            count = last.steps - past
            found.append([key.tenant, key.model_id, count, last.gradient_norm, last.time_ms])
        return found
