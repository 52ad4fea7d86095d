"""The tapes of sessions: found for a Backward, and marked as consumed once their gradient is recorded."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.domain.digests import contribution_key
from service.domain.errors import Aborted, NotFound, UnsupportedLayout
from service.domain.ports import AbsentSession
from service.domain.refusals import (
    STORE_FAILURES,
    check_epoch,
    history_forked,
    session_absent,
    tape_missing,
)
from service.domain.tapes import check_tape, tape_from_bytes
from service.domain.types import ChunkKey, ModelKey, SessionKey

if TYPE_CHECKING:
    from service.domain.carrying import Carrier
    from service.domain.contributions import Contributions
    from service.domain.model_cache import ModelCache
    from service.domain.ports import SessionHead, SessionStore, TapeSnapshot
    from service.domain.tapes import StoredTape, TapeCache
    from service.domain.types import Backward


@dataclass(frozen=True, slots=True)
class FoundTape:
    """A tape that a Backward may use.

    Attributes:
        session: Where its session stands.
        tape: The tape.
        expires_ms: When it expires, by the store's clock.
    """

    session: SessionHead
    tape: StoredTape
    expires_ms: int


class SessionTapes:
    """Finds tapes, in the cache and in the store, and marks them as consumed."""

    def __init__(
        self,
        sessions: SessionStore,
        cache: TapeCache,
        *,
        model_cache: ModelCache,
        contributions: Contributions,
        carrier: Carrier,
    ) -> None:
        """Keep the parts that are asked for tapes."""
        self._sessions = sessions
        self._cache = cache
        self._model_cache = model_cache
        self._contributions = contributions
        self._carrier = carrier

    def get_cached(self, op: Backward) -> StoredTape | None:
        """Return a Backward's tape from the cache; only the store knows whether it may still be used."""
        return self._cache.get(op.token)

    async def read(self, tenant: str, op: Backward, cached: StoredTape | None) -> FoundTape:
        """Check in the store that a Backward may use its tape, and read the tape unless it is cached.

        Raises:
            DomainError: SESSION_NOT_FOUND and its kin, SEQ_GAP, EPOCH_FENCED, HISTORY_FORKED,
                TAPE_MISSING, UNSUPPORTED_LAYOUT.
        """
        chunk = ChunkKey(SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq)
        found = await self._sessions.read_tape(chunk, with_data=cached is None)
        head = found.session
        if isinstance(head, AbsentSession):
            raise session_absent(op.session_id, head)
        if (op.epoch, op.chunk_seq) > (head.epoch, head.chunk_seq):
            raise _chunk_not_applied(op, head)
        is_of_ended_epoch = op.epoch < head.epoch and not op.resent
        if not found.token or is_of_ended_epoch:
            await self._refuse_unless_recorded(chunk, op, found, head=head)
        if found.token != op.token:
            raise history_forked(op.chunk_seq)
        assert found.data is not None  # noqa: S101 - there is data where there is a token
        check_tape(found.data)
        return FoundTape(head, cached or tape_from_bytes(found.data, head.dtype), found.expires_ms)

    def consume(self, tenant: str, op: Backward) -> asyncio.Future[None]:
        """Let go of a tape whose gradient is recorded, here and in the store; that never fails.

        Whoever awaits it may be cancelled: the tape is marked all the same.

        The cache drops it at once: the arrays allocated next then reuse its memory, which the process has
        touched already. A retry of its Backward reads it from the store.
        """
        self._cache.drop(op.token)
        return asyncio.shield(self._carrier.start(self._mark_consumed(tenant, op)))

    async def _mark_consumed(self, tenant: str, op: Backward) -> None:
        """Mark a tape in its session's slot, so that it does not count as one that waits.

        If that fails, it counts until it expires or the same Backward comes again.
        """
        chunk = ChunkKey(SessionKey(tenant, op.session_id), op.epoch, op.chunk_seq)
        with suppress(*STORE_FAILURES, UnsupportedLayout):
            await self._sessions.mark_tape_consumed(chunk, op.token)

    async def _refuse_unless_recorded(
        self, chunk: ChunkKey, op: Backward, found: TapeSnapshot, *, head: SessionHead
    ) -> None:
        """Refuse a Backward without a usable tape, and say whether its gradient was recorded before.

        A Backward of an ended epoch passes if its gradient was recorded and its tape is still there: then
        it is a retry.
        """
        model = ModelKey(chunk.session.tenant, head.model_id)
        with suppress(NotFound):  # an unknown layout of the model governs its contributions
            await self._model_cache.get_incarnation(model, head.incarnation)
        state = await self._contributions.find(model, contribution_key(chunk))
        if state is None and not op.resent:
            check_epoch(op.epoch, head.epoch, head.chunk_seq)
        if not found.token:
            raise tape_missing(op.chunk_seq, state)


def _chunk_not_applied(op: Backward, head: SessionHead) -> Aborted:
    text = (
        f"chunk {op.chunk_seq} of epoch {op.epoch} was not applied; "
        f"the session is at chunk {head.chunk_seq} of epoch {head.epoch}"
    )
    return Aborted("SEQ_GAP", text, expected_seq=head.chunk_seq + 1, epoch=head.epoch)
