"""One forward pass over many sequences of different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.errors import ShapeError
from rnn_engine.forward import check_sequence, hidden_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rnn_engine.arrays import Array
    from rnn_engine.params import Params

    Index = NDArray[np.intp]


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
    if len(xs) == 0:
        return []
    counts = [x.shape[:2] for x in xs]
    if len({t for _, t in counts}) == 1:
        return _forward_equal(params, xs, h0, counts)
    order, active, to_packed, to_sequences = _pack(counts)
    rows = np.empty((len(to_packed), params.input_size + 1), params.dtype)
    rows[:, :-1] = _join_rows(xs).take(to_packed, axis=0)
    rows[:, -1] = 1
    packed = rows.dot(params.input_part)
    _recur_packed(params.Wh, np.concatenate(h0).take(order, axis=0), packed, active)
    return _split(packed.take(to_sequences, axis=0), counts)


def _forward_equal(
    params: Params, xs: Sequence[Array], h0: Sequence[Array], counts: list[tuple[int, int]]
) -> list[Array]:
    """Run sequences of one length as the rows of one batch; one alone as it is."""
    if len(xs) == 1:
        return [np.ascontiguousarray(hidden_states(params, xs[0], h0[0]))]
    hs = hidden_states(params, np.concatenate(xs), np.concatenate(h0))
    return _split(hs.reshape(-1, hs.shape[2]), counts)


def _join_rows(xs: Sequence[Array]) -> Array:
    """Return the steps of all rows of all sequences under one another, shape (sum N_i T_i, D)."""
    # A sequence of one row, the common one, needs no reshaping.
    joined = [x if len(x) == 1 else x.reshape(1, -1, x.shape[2]) for x in xs]
    rows: Array = np.concatenate(joined, axis=1)[0]
    return rows


def _pack(counts: list[tuple[int, int]]) -> tuple[Index, list[int], Index, Index]:
    """Lay the steps of all rows out by time, the longest row first at each time.

    Args:
        counts: (N_i, T_i) a sequence.

    Returns:
        The rows by falling length; how many of them have a step t, for t = 1 .. max T_i; for each packed
        step its place in the sequences; for each step of the sequences its place when packed.
    """
    lengths = np.array([t for n, t in counts for _ in range(n)])
    order = (-lengths).argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    # How many rows are at least 1, 2, .. steps long.
    active = np.bincount(lengths)[:0:-1].cumsum()[::-1]
    steps = np.arange(lengths.sum())
    time = steps - (lengths.cumsum() - lengths).repeat(lengths)
    to_sequences = (active.cumsum() - active)[time] + rank.repeat(lengths)
    to_packed = np.empty_like(steps)
    to_packed[to_sequences] = steps
    return order, active.tolist(), to_packed, to_sequences


def _recur_packed(Wh: Array, h: Array, packed: Array, active: list[int]) -> None:
    """Turn packed rows from x Wx + b into the hidden states after h, in place."""
    add, tanh = np.add, np.tanh
    z = np.empty_like(h)
    start = 0
    for count in active:
        rows = packed[start : start + count]
        product = z[:count]
        h[:count].dot(Wh, product)
        add(rows, product, rows)
        tanh(rows, rows)
        h = rows
        start += count


def _split(hs: Array, counts: list[tuple[int, int]]) -> list[Array]:
    """Cut rows in the order of the sequences into one (N_i, T_i, H) array a sequence."""
    batch = hs[None]
    parts = []
    start = 0
    for n, t in counts:
        stop = start + n * t
        part = batch[:, start:stop]
        parts.append(part if n == 1 else part.reshape(n, t, -1))
        start = stop
    return parts
