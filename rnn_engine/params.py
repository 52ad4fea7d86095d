"""The weights of the tanh layer."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.arrays import FLOAT32, FLOAT64, Arrays, ArraySpec, Spec, aligned_empty
from rnn_engine.errors import DTypeError, ShapeError

if TYPE_CHECKING:
    from typing import Self

    from rnn_engine.arrays import Array

MATRIX_NDIM = 2
SEQUENCE_NDIM = 3


@lru_cache(maxsize=256)
def tanh_spec(input_size: int, hidden_size: int) -> Spec:
    """Return the arrays of a tanh layer: Wx, Wh, b by name, and in memory Wh over Wx over b."""
    d, h = input_size, hidden_size
    arrays = (ArraySpec("Wx", (d, h)), ArraySpec("Wh", (h, h)), ArraySpec("b", (h,)))
    return Spec(arrays, ("Wh", "Wx", "b"))


class Params(Arrays):
    """The weights of h_t = tanh(x_t Wx + h_{t-1} Wh + b), as its passes want them.

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
    joined: Array

    def __new__(cls, Wx: Array, Wh: Array, b: Array) -> Self:
        """Check the three arrays against one another and join them."""
        _check_triple(Wx, Wh, b)
        d, h = Wx.shape
        joined = aligned_empty((h + d + 1) * h, Wx.dtype).reshape(-1, h)
        np.concatenate((Wh, Wx, b[None]), out=joined)
        return cls.view(tanh_spec(d, h), joined.reshape(-1))

    @classmethod
    def view(cls, spec: Spec, buffer: Array) -> Self:
        """Return the weights that a buffer holds as Wh, Wx and b one after another."""
        d, h = spec.arrays[0].shape
        joined = buffer.reshape(h + d + 1, h)
        made = cls.of((joined[h:-1], joined[:h], joined[-1]), spec, buffer)
        made.joined = joined
        made.Wx, made.Wh, made.b = made
        return made

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
