"""Back-propagation through the steps of one chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.arrays import Arrays
from rnn_engine.errors import DTypeError, ShapeError
from rnn_engine.forward import check_sequence, time_major_rows

if TYPE_CHECKING:
    from rnn_engine.arrays import Array, Grads
    from rnn_engine.forward import Tape
    from rnn_engine.params import Params


@dataclass(slots=True, eq=False)  # Not frozen, as a tape is not.
class ChunkGradients:
    """The gradients of a loss with respect to all that went into one chunk.

    Attributes:
        dxs: Of the inputs, shape (N, T, D).
        dh0: Of the hidden state before the chunk, shape (N, H): as the previous chunk's `dh_next` it gives
            full BPTT over chunks.
        grads: Of the weights: dWx, dWh, db.
    """

    dxs: Array
    dh0: Array
    grads: Grads


def rnn_backward(
    params: Params, tape: Tape, dhs: Array, dh_next: Array | None = None
) -> ChunkGradients:
    """Propagate the gradients of the hidden states back through one chunk.

    dz_t = (dhs_t + dz_{t+1} Wh^T) * (1 - h_t^2), t = T..1, where dz_{T+1} Wh^T is `dh_next`.

    Args:
        params: The weights that the tape was made with.
        tape: What `rnn_forward` returned, or the same values from elsewhere.
        dhs: Gradient of the loss with respect to hs, shape (N, T, H), dtype of the weights.
        dh_next: Gradient that arrives at the last hidden state from later chunks, shape (N, H);
            None (zero) truncates back-propagation at the end of this chunk.

    Returns:
        The gradients of xs, h0 and the weights, in memory of their own.

    Raises:
        ShapeError: If N, T, D or H disagree, or a dimension is 0.
        DTypeError: If an array has another type than the weights.
    """
    check_sequence(params, tape.xs, tape.h0)
    _check_gradients(params, tape, dhs, dh_next)
    n, t, d = tape.xs.shape
    h, dtype = params.hidden_size, params.Wx.dtype
    hs = tape.hs.swapaxes(0, 1)
    dzs = np.square(hs, order="C")
    np.subtract(1, dzs, dzs)
    dh0 = np.zeros((n, h), dtype) if dh_next is None else np.array(dh_next, order="C")
    if n == 1:
        _recur_back_vector(params.Wh, dhs[0], dzs[:, 0], dh0[0])
    else:
        _recur_back_batch(params.Wh, dhs.swapaxes(0, 1), dzs, dh0)
    dzs = dzs.reshape(t * n, h)
    # Copied whatever its layout was: the same numbers give the same bits, from memory or from a store.
    h_prev = np.empty((t, n, h), dtype)
    h_prev[0] = tape.h0
    h_prev[1:] = hs[:-1]
    joined = np.empty((h + d + 1, h), dtype)
    dWh, d_input_part = joined[:h], joined[h:]
    time_major_rows(tape.xs).T.dot(dzs, d_input_part)
    h_prev.reshape(t * n, h).T.dot(dzs, dWh)
    arrays = (d_input_part[:-1], dWh, d_input_part[-1])
    grads = Arrays.of(arrays, params.spec, joined.reshape(-1))
    dxs = dzs.dot(params.Wx.T).reshape(t, n, d).swapaxes(0, 1)
    return ChunkGradients(dxs, dh0, grads)


def _check_gradients(params: Params, tape: Tape, dhs: Array, dh_next: Array | None) -> None:
    n, t, _ = tape.xs.shape
    h = params.hidden_size
    for name, array in (("hs", tape.hs), ("dhs", dhs)):
        if array.shape != (n, t, h):
            raise ShapeError(name, f"({n}, {t}, {h})", array.shape)
        if array.dtype != params.Wx.dtype:
            raise DTypeError(name, f"{params.dtype} like the weights", array.dtype)
    if dh_next is None:
        return
    if dh_next.shape != (n, h):
        raise ShapeError("dh_next", f"({n}, {h})", dh_next.shape)
    if dh_next.dtype != params.Wx.dtype:
        raise DTypeError("dh_next", f"{params.dtype} like the weights", dh_next.dtype)


def _recur_back_vector(Wh: Array, dhs: Array, dzs: Array, dh: Array) -> None:
    """Turn dzs (T, H) from 1 - h_t^2 into dz_t and dh (H,) into dh0, in place."""
    add, multiply = np.add, np.multiply
    times_WhT = Wh.dot
    # The range ends the loop: an array ends one by raising IndexError, which costs half a step.
    for _, dh_t, dz in zip(range(len(dzs)), dhs[::-1], dzs[::-1]):  # noqa: B905 - strict costs more
        add(dh, dh_t, dh)
        multiply(dz, dh, dz)
        times_WhT(dz, dh)


def _recur_back_batch(Wh: Array, dhs: Array, dzs: Array, dh: Array) -> None:
    """Turn dzs (T, N, H) from 1 - h_t^2 into dz_t and dh (N, H) into dh0, in place."""
    add, multiply = np.add, np.multiply
    # BLAS multiplies by a plain matrix 1.1-1.8 times as fast as by a transposed one.
    WhT = np.ascontiguousarray(Wh.T)
    for dh_t, dz in zip(dhs[::-1], dzs[::-1], strict=True):
        add(dh, dh_t, dh)
        multiply(dz, dh, dz)
        dz.dot(WhT, dh)
