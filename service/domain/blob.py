"""Arrays as one long byte string without a copy: weights may have hundreds of megabytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rnn_engine import Array


@dataclass(frozen=True)
class Blob:
    """Byte strings that stand for their concatenation."""

    pieces: tuple[bytes | memoryview, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(map(len, self.pieces))

    def part(self, start: int, size: int) -> bytes | memoryview:
        """Return up to `size` bytes from `start`; copied only if they lie in more than one piece."""
        stop, found = min(start + size, self.nbytes), []
        at = 0
        for piece in self.pieces:
            begin, end = max(start - at, 0), min(stop - at, len(piece))
            if begin < end:
                found.append(memoryview(piece)[begin:end])
            at += len(piece)
        return found[0] if len(found) == 1 else b"".join(found)

    def joined(self) -> bytes:
        """Return a copy of all pieces as one byte string."""
        return b"".join(self.pieces)


def blob_of_arrays(arrays: Iterable[Array], *, head: bytes = b"") -> Blob:
    """Return a head and the arrays in C order, one after another, without copying contiguous ones."""
    pieces = (np.ascontiguousarray(array).reshape(-1).data.cast("B") for array in arrays)
    return Blob((head, *pieces) if head else tuple(pieces))
