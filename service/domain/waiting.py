"""Lists and discards what waits in training: tapes for a Backward, contributions for an Update.

Tapes are in the slot of their session and contributions in the slot of their model, so each operation
here asks the store more than once, in an order that never misses or loses a chunk.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.domain.ports import AbsentSession
from service.domain.refusals import after_decision, session_absent
from service.domain.rules import check_id
from service.domain.types import DiscardResult, ModelKey, SessionKey, Waiting

if TYPE_CHECKING:
    from service.domain.contributions import Contributions
    from service.domain.model_cache import ModelCache
    from service.domain.ports import SessionStore
    from service.domain.rules import InputRules
    from service.domain.types import DiscardGradients


class WaitingWork:
    """The DiscardGradients and ListWaiting operations."""

    def __init__(
        self,
        sessions: SessionStore,
        model_cache: ModelCache,
        contributions: Contributions,
        *,
        rules: InputRules,
    ) -> None:
        """Keep the parts that the operations use."""
        self._rules = rules
        self._sessions = sessions
        self._model_cache = model_cache
        self._contributions = contributions

    async def discard(self, tenant: str, op: DiscardGradients) -> DiscardResult:
        """Drop waiting contributions, and the waiting tapes of the sessions named."""
        self._rules.check_discard(op)
        model = await self._model_cache.get(ModelKey(tenant, op.model_id), fresh=True)
        keys = [SessionKey(tenant, one.session_id) for one in op.selectors]
        # A session of an unknown layout is refused here, before anything is dropped.
        await asyncio.gather(*(self._sessions.list_tapes(key) for key in keys))
        contribution_count = await self._contributions.discard(model, op.selectors)
        tape_count = 0
        with after_decision():
            for key, one in zip(keys, op.selectors, strict=True):
                tape_count += await self._sessions.discard_tapes(key, one.epoch, one.chunk_seqs)
        return DiscardResult(contribution_count, tape_count)

    async def list_waiting(self, key: SessionKey) -> Waiting:
        """List what waits of one session.

        The tapes are read first. One whose gradient is recorded between the two reads is then listed as
        a contribution, or was consumed; it is never missing from both lists.
        """
        check_id("session_id", key.session_id)
        head, tapes = await self._sessions.list_tapes(key)
        if isinstance(head, AbsentSession):
            raise session_absent(key.session_id, head)
        model = ModelKey(key.tenant, head.model_id)
        listed = await self._contributions.list_of_session(model, key, head.incarnation)
        # A replica that died after it had recorded a gradient left its tape marked as waiting.
        waiting = await self._contributions.without_recorded(model, key, tapes)
        return Waiting(tuple(waiting), tuple(listed))
