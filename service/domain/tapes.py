"""Tapes: what a TRAIN Forward stores for its Backward, which may run on another replica.

Layout 1 is: the number of the layout in the first byte, then N, T, D, H and the weights version, then h0
and xs in C order. The hidden states are not stored. The replica that computed them has them cached, and
any other computes them again, bit for bit, for a fraction of what it costs to store them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine import Tape, rnn_forward
from service.domain.lru import LruCache
from service.domain.refusals import unsupported_layout
from service.domain.types import Version

if TYPE_CHECKING:
    from rnn_engine import Array, Params
    from service.domain.errors import UnsupportedLayout

_LAYOUT = 1
_HEAD = struct.Struct(">BxxxIIIIQ16s")


@dataclass(frozen=True, slots=True)
class StoredTape:
    """What a Backward starts from.

    Attributes:
        version: The weights that the chunk was computed with.
        xs: Its inputs, (N, T, D).
        h0: The state before it, (N, H).
        hs: Its hidden states, (N, T, H), if this process computed them.
        incarnation: The incarnation of its model, if this process computed them.
    """

    version: Version
    xs: Array
    h0: Array
    hs: Array | None = None
    incarnation: bytes = b""

    def complete(self, params: Params) -> Tape:
        """Return the engine's tape; hidden states that are missing are computed again."""
        if self.hs is None:
            return rnn_forward(params, self.xs, self.h0)
        return Tape(self.xs, self.h0, self.hs)


def tape_to_bytes(version: Version, xs: Array, h0: Array) -> bytes:
    """Return a tape as the store keeps it."""
    n, t, d = xs.shape
    head = _HEAD.pack(_LAYOUT, n, t, d, h0.shape[1], version.number, version.digest)
    return b"".join((head, np.ascontiguousarray(h0).data, np.ascontiguousarray(xs).data))


def check_tape(data: bytes) -> None:
    """Raise UnsupportedLayout unless a tape has the known layout; its first byte is enough."""
    if data[0] != _LAYOUT:
        raise _unsupported(f"layout {data[0]}", f"layout {_LAYOUT}")


def tape_from_bytes(data: bytes, dtype: str) -> StoredTape:
    """Read a tape from the store; the arrays are read-only views.

    Raises:
        UnsupportedLayout: If another release wrote it in another layout.
    """
    check_tape(data)
    if len(data) < _HEAD.size:
        raise _unsupported(f"{len(data)} bytes", f"{_HEAD.size} or more")
    _, n, t, d, h, number, digest = _HEAD.unpack_from(data)
    size = _HEAD.size + n * (h + t * d) * np.dtype(dtype).itemsize
    if len(data) != size:
        raise _unsupported(f"{len(data)} bytes", f"{size} bytes")
    flat: Array = np.frombuffer(data, dtype, offset=_HEAD.size)
    h0, xs = flat[: n * h].reshape(n, h), flat[n * h :].reshape(n, t, d)
    return StoredTape(Version(number, digest), xs, h0)


class TapeCache(LruCache[bytes, StoredTape]):
    """The tapes that this process wrote last, by the state token after their chunk.

    The token stands for everything that led to the tape. Whether it may still be used only the store
    knows.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Start empty."""
        super().__init__(limit_bytes, _size)


def _unsupported(found: str, known: str) -> UnsupportedLayout:
    return unsupported_layout("the tape", found, known)


def _size(stored: StoredTape) -> int:
    hs_bytes = 0 if stored.hs is None else stored.hs.nbytes
    return stored.xs.nbytes + stored.h0.nbytes + hs_bytes + 512
