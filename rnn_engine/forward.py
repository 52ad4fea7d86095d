"""The recurrence over one chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.errors import DTypeError, ShapeError
from rnn_engine.params import SEQUENCE_NDIM

if TYPE_CHECKING:
    from rnn_engine.arrays import Array
    from rnn_engine.params import Params

SMALL_INPUT_BYTES = 48 * 1024
"""Up to this size of Wx, reading it again at each step costs less than one NumPy call."""


@dataclass(slots=True, eq=False)  # Not frozen: that takes as long to make as a small product.
class Tape:
    """What a forward pass leaves for its backward pass.

    Attributes:
        xs: Inputs, shape (N, T, D).
        h0: Hidden state before the chunk, shape (N, H).
        hs: Hidden states after each step, shape (N, T, H), dtype of the weights. From `rnn_forward`
            a view of a time-major buffer: C-contiguous where N or T is 1, else a transposed one, which
            `np.ascontiguousarray` or `tobytes` turn into C order.
    """

    xs: Array
    h0: Array
    hs: Array

    @property
    def nbytes(self) -> int:
        """Return the bytes of the three arrays."""
        return self.xs.nbytes + self.h0.nbytes + self.hs.nbytes


def rnn_forward(params: Params, xs: Array, h0: Array) -> Tape:
    """Run the recurrence over one chunk.

    h_t = tanh(x_t Wx + h_{t-1} Wh + b), t = 1..T.

    Args:
        params: Wx (D, H), Wh (H, H), b (H,), one dtype.
        xs: Inputs, shape (N, T, D), T >= 1, dtype of the weights.
        h0: Hidden state before the chunk, shape (N, H); never broadcast.

    Returns:
        The tape: xs and h0 as given, hs of shape (N, T, H) in memory of its own.

    Raises:
        ShapeError: If N, D or H disagree, or a dimension is 0.
        DTypeError: If xs or h0 has another type than the weights.
    """
    return Tape(xs, h0, hidden_states(params, xs, h0))


def hidden_states(params: Params, xs: Array, h0: Array) -> Array:
    """Return hs as `rnn_forward` does, without the tape."""
    check_sequence(params, xs, h0)
    n, t, _ = xs.shape
    if n == 1 and params.Wx.nbytes <= SMALL_INPUT_BYTES:
        return _recur_joined(params.joined, xs, h0)[None]
    # BLAS sums in another order where an operand is strided: one layout, or bits would depend on it.
    h = np.ascontiguousarray(h0)
    hs: Array = time_major_rows(xs).dot(params.input_part)
    if n == 1:
        _recur_vector(params.Wh, h[0], hs)
        return hs[None]
    hs = hs.reshape(t, n, -1)
    _recur_batch(params.Wh, h, hs)
    return hs.swapaxes(0, 1)


def check_sequence(params: Params, xs: Array, h0: Array) -> None:
    """Raise unless xs is (N, T, D) and h0 is (N, H), both of the weights' type.

    Raises:
        ShapeError: If N, D or H disagree, or a dimension is 0.
        DTypeError: If xs or h0 has another type than the weights.
    """
    shape, dtype = xs.shape, params.Wx.dtype
    d, h = params.Wx.shape
    if len(shape) != SEQUENCE_NDIM or shape[2] != d or 0 in shape:
        raise ShapeError("xs", f"(N, T, {d}) with N, T >= 1", shape)
    if h0.shape != (shape[0], h):
        raise ShapeError("h0", f"({shape[0]}, {h})", h0.shape)
    if xs.dtype != dtype:
        raise DTypeError("xs", f"{dtype} like the weights", xs.dtype)
    if h0.dtype != dtype:
        raise DTypeError("h0", f"{dtype} like the weights", h0.dtype)


def time_major_rows(xs: Array) -> Array:
    """Return xs (N, T, D) as rows [x_t, 1], shape (T N, D + 1) in C order.

    The 1 takes the bias along in a product, and its gradient in the one of the way back.
    """
    n, t, d = xs.shape
    rows = np.empty((t, n, d + 1), xs.dtype)
    rows[..., :-1] = xs.swapaxes(0, 1)
    rows[..., -1] = 1
    return rows.reshape(t * n, d + 1)


def _recur_joined(joined: Array, xs: Array, h0: Array) -> Array:
    """Return the hidden states (T, H) of one row after h0 (1, H).

    A step is two calls, not three: the row [h_{t-1}, x_t, 1] times all weights, which needs no
    addition after it, and tanh, both into the row of the next step.
    """
    t, h = xs.shape[1], joined.shape[1]
    rows = np.empty((t + 1, len(joined)), joined.dtype)
    states = rows[:, :h]
    states[0] = h0
    rows[:-1, h:-1] = xs
    rows[:, -1] = 1
    times_joined, tanh = joined.T.dot, np.tanh
    states = states[1:]
    # The range ends the loop: an array ends one by raising IndexError, which costs half a step.
    for _, row, state in zip(range(t), rows, states):  # noqa: B905 - strict costs more
        times_joined(row, state)
        tanh(state, state)
    return states.copy()  # A view would keep the inputs in memory as well.


def _recur_vector(Wh: Array, h: Array, hs: Array) -> None:
    """Turn hs (T, H) from x_t Wx + b into the hidden states after h (H,), in place."""
    add, tanh = np.add, np.tanh
    # Bound once: a method skips the dispatch that every call of np.dot pays, a third of a small step.
    times_Wh = Wh.T.dot
    z = np.empty_like(hs[0])
    for row in hs:
        times_Wh(h, z)
        add(row, z, row)
        tanh(row, row)
        h = row


def _recur_batch(Wh: Array, h: Array, hs: Array) -> None:
    """Turn hs (T, N, H) from x_t Wx + b into the hidden states after h (N, H), in place."""
    add, tanh = np.add, np.tanh
    z = np.empty_like(hs[0])
    for rows in hs:
        h.dot(Wh, z)
        add(rows, z, rows)
        tanh(rows, rows)
        h = rows
