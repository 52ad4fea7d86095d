"""Tapes as bytes: what a TRAIN Forward leaves for its Backward, on whichever replica.

Layout: layout number, N, T, D, H, weights version; then h0, xs and hs, one after another, in C order.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine import Tape
from service.domain.types import Version

if TYPE_CHECKING:
    from rnn_engine import Array

_LAYOUT = 1
_HEAD = struct.Struct(">BxxxIIIIQ16s")


@dataclass(frozen=True, slots=True)
class StoredTape:
    """A tape with the version of the weights that made it."""

    version: Version
    tape: Tape


def tape_to_bytes(version: Version, tape: Tape) -> bytes:
    """Lay out a tape for the store."""
    n, t, d = tape.xs.shape
    head = _HEAD.pack(_LAYOUT, n, t, d, tape.h0.shape[1], version.number, version.digest)
    return b"".join((head, tape.h0.tobytes(), tape.xs.tobytes(), tape.hs.tobytes()))


def tape_from_bytes(data: bytes, dtype: str) -> StoredTape:
    """Read a tape from the store; the arrays are read-only views."""
    _, n, t, d, h, number, digest = _HEAD.unpack_from(data)
    flat: Array = np.frombuffer(data, dtype, offset=_HEAD.size)
    first, second = n * h, n * h + n * t * d
    tape = Tape(
        xs=flat[first:second].reshape(n, t, d),
        h0=flat[:first].reshape(n, h),
        hs=flat[second:].reshape(n, t, h),
    )
    return StoredTape(Version(number, digest), tape)


class RecentTapes:
    """The tapes that this process wrote last, so that they need not be read back.

    A tape is found by its chunk's token, which stands for everything that made it; whether it may
    still be used is for the store to say.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Keep at most this many bytes."""
        self._tapes: OrderedDict[bytes, StoredTape] = OrderedDict()
        self._limit = limit_bytes
        self._bytes = 0

    def put(self, token: bytes, stored: StoredTape) -> None:
        """Remember a tape, and forget the oldest ones over the limit."""
        if token in self._tapes:
            return
        self._tapes[token] = stored
        self._bytes += _size(stored.tape)
        while self._bytes > self._limit:
            _, oldest = self._tapes.popitem(last=False)
            self._bytes -= _size(oldest.tape)

    def get(self, token: bytes) -> StoredTape | None:
        """Return the tape of the chunk with this token, if it is still here."""
        return self._tapes.get(token)


def _size(tape: Tape) -> int:
    return tape.xs.nbytes + tape.h0.nbytes + tape.hs.nbytes + 512
