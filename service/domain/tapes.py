"""Tapes: what a TRAIN Forward stores for its Backward, which may run on another replica.

Layout 1 is: the number of the layout in the first byte, then N, T, D, the size of a state and the weights version,
then the state before the chunk and the inputs, in C order. Whatever else the network keeps for its way back, here the
hidden states, is not stored. The replica that computed it has it cached, and any other computes it again, bit for bit, for
a fraction of what it costs to store it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from service.domain.lru import LruCache
from service.domain.refusals import unsupported_layout
from service.domain.types import Version

if TYPE_CHECKING:
    from rnn_engine import Array, NetworkTape
    from service.domain.errors import UnsupportedLayout
    from service.domain.model_cache import LoadedWeights

_LAYOUT = 1
_HEAD = struct.Struct(">BxxxIIIIQ16s")


@dataclass(frozen=True, slots=True)
class StoredTape:
    """What a Backward starts from.

    Attributes:
        version: The weights that the chunk was computed with.
        inputs: Its inputs, (N, T, D).
        state: The state before it, (N, state size).
        tape: What its forward pass kept, if this process computed it.
        incarnation: The incarnation of its model, if this process computed it.
    """

    version: Version
    inputs: Array
    state: Array
    tape: NetworkTape | None = None
    incarnation: bytes = b""

    def complete(self, loaded: LoadedWeights) -> NetworkTape | None:
        """Return what the forward pass kept; if it is missing, the pass is run again."""
        if self.tape is not None:
            return self.tape
        network = loaded.network
        state = network.state_spec.split_rows(self.state)
        return network.forward(loaded.prepared, self.inputs, state, keep=True).tape


def tape_to_bytes(version: Version, inputs: Array, state: Array) -> bytes:
    """Return a tape as the store keeps it."""
    n, t, d = inputs.shape
    head = _HEAD.pack(_LAYOUT, n, t, d, state.shape[1], version.number, version.digest)
    return b"".join((head, np.ascontiguousarray(state).data, np.ascontiguousarray(inputs).data))


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
    _, n, t, d, s, number, digest = _HEAD.unpack_from(data)
    size = _HEAD.size + n * (s + t * d) * np.dtype(dtype).itemsize
    if len(data) != size:
        raise _unsupported(f"{len(data)} bytes", f"{size} bytes")
    flat: Array = np.frombuffer(data, dtype, offset=_HEAD.size)
    state, inputs = flat[: n * s].reshape(n, s), flat[n * s :].reshape(n, t, d)
    return StoredTape(Version(number, digest), inputs, state)


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
    kept = stored.inputs.nbytes + stored.state.nbytes if stored.tape is None else stored.tape.nbytes
    return kept + 512
