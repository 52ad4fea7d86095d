"""Values that nobody reports and that have to be measured from time to time."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from service.metrics.recorder import Recorder

LAG_S: Final = 0.25
SESSIONS_S: Final = 5.0

_LOGGER = logging.getLogger(__name__)


async def sample_lag(recorder: Recorder) -> None:
    """Measure for ever how late the event loop wakes a task that asked for a moment."""
    while True:
        due = time.perf_counter() + LAG_S
        await asyncio.sleep(LAG_S)
        late_s = max(0.0, time.perf_counter() - due)
        recorder.observe("timernn_event_loop_lag_seconds", late_s)


async def sample_sessions(
    recorder: Recorder,
    count: Callable[[], Awaitable[Mapping[str, int]]],
    *,
    names_tenants: bool = False,
) -> None:
    """Ask the store for ever how many sessions it lists; a store that is down changes nothing.

    Args:
        recorder: Takes the values.
        count: Returns the length of each tenant's list.
        names_tenants: Whether tenants may stand in labels.
    """
    while True:
        try:
            found = await count()
        except Exception as error:  # noqa: BLE001 - health says so already
            _LOGGER.debug("the sessions could not be counted: %s", error)
        else:
            recorder.set("timernn_sessions", sum(found.values()))
            if names_tenants:
                recorder.forget("timernn_tenant_sessions")
                for tenant, sessions in found.items():
                    recorder.set("timernn_tenant_sessions", sessions, tenant)
        await asyncio.sleep(SESSIONS_S)
