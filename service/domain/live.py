"""The sessions that this replica has in hand: the state after the last chunk that it saw.

Only a hint: the commit compares the token of the state that was computed from, so a state that is not
the session's any more costs a second try, never a wrong answer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rnn_engine import Array
    from service.domain.ports import SessionSnapshot

    SessionKey = tuple[str, str]  # tenant and session_id

_ENTRY_BYTES = 1024  # what an entry costs beside its state, roughly


@dataclass(slots=True)
class LiveSession:
    """A session's numbers and its state h (N, H); the array itself is never written to."""

    model_id: str
    incarnation: bytes
    epoch: int
    chunk_seq: int
    token: bytes
    h: Array
    ttl_ms: int


class LiveSessions:
    """The sessions used last, up to a number of bytes."""

    def __init__(self, limit_bytes: int) -> None:
        """Start empty."""
        self._sessions: OrderedDict[SessionKey, LiveSession] = OrderedDict()
        self._limit = limit_bytes
        self._bytes = 0

    def get(self, key: SessionKey) -> LiveSession | None:
        """Return a session if it is in hand."""
        return self._sessions.get(key)

    def put(self, key: SessionKey, session: LiveSession) -> None:
        """Take a session in hand, and let go of those unused longest over the limit."""
        self.drop(key)
        self._sessions[key] = session
        self._bytes += session.h.nbytes + _ENTRY_BYTES
        while self._bytes > self._limit and len(self._sessions) > 1:
            _, oldest = self._sessions.popitem(last=False)
            self._bytes -= oldest.h.nbytes + _ENTRY_BYTES

    def advance(
        self, key: SessionKey, base: LiveSession, chunk_seq: int, token: bytes, h: Array
    ) -> None:
        """Move a session on from where a chunk was computed, unless something newer is in hand."""
        if self._sessions.get(key) is base:
            base.chunk_seq, base.token, base.h = chunk_seq, token, h
            self._sessions.move_to_end(key)

    def drop(self, key: SessionKey) -> None:
        """Let go of a session."""
        known = self._sessions.pop(key, None)
        if known is not None:
            self._bytes -= known.h.nbytes + _ENTRY_BYTES


def live_from_snapshot(snapshot: SessionSnapshot) -> LiveSession:
    """Make a session in hand from what the store holds."""
    head, last = snapshot.head, snapshot.last
    return LiveSession(
        head.model_id,
        head.incarnation,
        head.epoch,
        last.chunk_seq,
        last.token,
        state_from_bytes(last.h, head.dtype, head.batch_size),
        head.ttl_ms,
    )


def state_from_bytes(data: bytes, dtype: str, batch_size: int) -> Array:
    """Read a hidden state, (N, H); the array is a read-only view."""
    flat: Array = np.frombuffer(data, dtype)
    return flat.reshape(batch_size, -1)
