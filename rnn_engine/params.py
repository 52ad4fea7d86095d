"""The weights of one recurrent layer, and gradients of the same three shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rnn_engine.errors import DTypeError, ShapeError

Array: TypeAlias = NDArray[np.floating[Any]]
"""A float32 or float64 array."""

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Params:
    """The weights of h_t = tanh(x_t Wx + h_{t-1} Wh + b).

    Arrays that are not C-contiguous are copied once here, so that no step of a recurrence has to.
    The others are kept as they are: whoever writes into them changes these weights.

    Attributes:
        Wx: Input weights, shape (D, H), float32 or float64.
        Wh: Recurrent weights, shape (H, H), dtype of Wx.
        b: Bias, shape (H,), dtype of Wx.

    Raises:
        ShapeError: If the three shapes do not agree on D and H, or either is 0.
        DTypeError: If the type is neither float32 nor float64, or they are mixed.
    """

    Wx: Array
    Wh: Array
    b: Array

    def __post_init__(self) -> None:
        """Check the three arrays against one another."""
        _check_triple(self.Wx, self.Wh, self.b, ["Wx", "Wh", "b"])
        for name in ("Wx", "Wh"):
            matrix = getattr(self, name)
            if not matrix.flags.c_contiguous:
                object.__setattr__(self, name, np.ascontiguousarray(matrix))

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

    Raises:
        ShapeError: If the three shapes do not agree on D and H, or either is 0.
        DTypeError: If the type is neither float32 nor float64, or they are mixed.
    """

    dWx: Array  # noqa: N815 - the field's letters
    dWh: Array  # noqa: N815
    db: Array

    def __post_init__(self) -> None:
        """Check the three arrays against one another."""
        _check_triple(self.dWx, self.dWh, self.db, ["dWx", "dWh", "db"])

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Return dWx, dWh and db in this order."""
        return self.dWx, self.dWh, self.db


def _check_triple(Wx: Array, Wh: Array, b: Array, names: list[str]) -> None:
    dtype = Wx.dtype
    if dtype not in (FLOAT32, FLOAT64):
        raise DTypeError(names[0], "float32 or float64", dtype)
    if Wx.ndim != 2 or 0 in Wx.shape:
        raise ShapeError(names[0], "(D, H)", Wx.shape)
    hidden_size = Wx.shape[1]
    if Wh.shape != (hidden_size, hidden_size):
        raise ShapeError(names[1], f"({hidden_size}, {hidden_size})", Wh.shape)
    if b.shape != (hidden_size,):
        raise ShapeError(names[2], f"({hidden_size},)", b.shape)
    if Wh.dtype != dtype:
        raise DTypeError(names[1], f"{dtype} like {names[0]}", Wh.dtype)
    if b.dtype != dtype:
        raise DTypeError(names[2], f"{dtype} like {names[0]}", b.dtype)
