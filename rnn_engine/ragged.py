"""One forward pass over many sequences of different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.errors import ShapeError
from rnn_engine.forward import check_sequence, rnn_forward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rnn_engine.params import Array, Params


def rnn_forward_many(params: Params, xs: Sequence[Array], h0: Sequence[Array]) -> list[Array]:
    """Run the recurrence over many sequences at once, each from its own state.

    Every row of every sequence becomes one row of a batch, sorted by length: step t is one product
    over the rows that have a step t. Rows never mix, so a sequence's result is that of
    `rnn_forward` alone, up to rounding (another GEMM shape may sum in another order).

    Args:
        params: Wx (D, H), Wh (H, H), b (H,), one dtype.
        xs: Inputs, one array of shape (N_i, T_i, D) a sequence, dtype of the weights.
        h0: States before, one array of shape (N_i, H) a sequence.

    Returns:
        hs a sequence, shape (N_i, T_i, H), C-contiguous; views of one buffer: copy what outlives
        the others.

    Raises:
        ShapeError: If N, D or H disagree inside a sequence, or the two lists' lengths do.
        DTypeError: If an array has another type than the weights.
    """
    if len(h0) != len(xs):
        raise ShapeError("h0", f"{len(xs)} arrays", (len(h0),))
    for x, state in zip(xs, h0, strict=True):
        check_sequence(params, x, state)
    if len(xs) < 2:
        return [
            np.ascontiguousarray(rnn_forward(params, x, state).hs)
            for x, state in zip(xs, h0, strict=True)
        ]
    d, h = params.Wx.shape
    lengths = np.repeat([x.shape[1] for x in xs], [x.shape[0] for x in xs])
    order = np.argsort(-lengths, kind="stable")
    steps, active = _time_major(lengths, order)
    rows = np.concatenate([x.reshape(-1, d) for x in xs])
    packed = np.dot(rows[steps], params.Wx)
    packed += params.b
    _recur_packed(params.Wh, np.concatenate(h0)[order], packed, active)
    hs = np.empty_like(packed)
    hs[steps] = packed
    return _split(hs, xs, h)


def _time_major(
    lengths: NDArray[np.intp], order: NDArray[np.intp]
) -> tuple[NDArray[np.intp], list[int]]:
    """Return the index that sorts all steps by time, and the active rows at each time.

    Row i of the concatenated batch owns the steps starts[i] .. starts[i] + lengths[i] - 1.
    """
    starts = (np.cumsum(lengths) - lengths)[order]
    lengths = lengths[order]
    time = np.arange(lengths[0])[:, None]
    exists = time < lengths
    return (starts + time)[exists], exists.sum(axis=1).tolist()


def _recur_packed(Wh: Array, h: Array, packed: Array, active: list[int]) -> None:
    """Turn packed rows from x Wx + b into hidden states, in place, step after step."""
    z = np.empty_like(h)
    start = 0
    for count in active:
        rows = packed[start : start + count]
        product = z[:count]
        np.dot(h[:count], Wh, product)
        np.add(rows, product, rows)
        np.tanh(rows, rows)
        h = rows
        start += count


def _split(hs: Array, xs: Sequence[Array], h: int) -> list[Array]:
    parts = []
    start = 0
    for x in xs:
        n, t, _ = x.shape
        stop = start + n * t
        parts.append(hs[start:stop].reshape(n, t, h))
        start = stop
    return parts
