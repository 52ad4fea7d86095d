"""A cache of sessions: the state after the last chunk that this replica applied or read.

An entry may be out of date. The commit compares the token of the state that was computed from, so an old
state costs a second try, never a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.domain.lru import LruCache
from service.domain.types import ModelKey, SessionKey

if TYPE_CHECKING:
    from rnn_engine import Array
    from service.domain.ports import SessionSnapshot

_ENTRY_BYTES = 1024  # what an entry costs beside its state, roughly


@dataclass(slots=True)
class CachedSession:
    """A session's numbers and its state.

    Attributes:
        state: (N, state size); the array itself is never written to.
        is_listed: False if the last write of its new expiry to the tenant's list failed.
    """

    model_key: ModelKey
    incarnation: bytes
    epoch: int
    chunk_seq: int
    token: bytes
    state: Array
    ttl_ms: int
    is_listed: bool = True

    def advance(self, chunk_seq: int, token: bytes, state: Array) -> None:
        """Move on by one chunk; arrays that were handed out before keep their values."""
        self.chunk_seq, self.token, self.state = chunk_seq, token, state


class SessionCache(LruCache[SessionKey, CachedSession]):
    """The sessions used last, bounded in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        """Start empty."""
        super().__init__(limit_bytes, lambda session: session.state.nbytes + _ENTRY_BYTES)


def cached_from_snapshot(tenant: str, snapshot: SessionSnapshot) -> CachedSession:
    """Return the cache entry for a session as the store has it."""
    head, last = snapshot.head, snapshot.last
    return CachedSession(
        ModelKey(tenant, head.model_id),
        head.incarnation,
        head.epoch,
        last.chunk_seq,
        last.token,
        state_from_bytes(last.state, head.dtype, head.batch_size),
        head.ttl_ms,
    )


def state_from_bytes(data: bytes, dtype: str, batch_size: int) -> Array:
    """Read a state, (N, state size); the array is a read-only view."""
    flat: Array = np.frombuffer(data, dtype)
    return flat.reshape(batch_size, -1)
