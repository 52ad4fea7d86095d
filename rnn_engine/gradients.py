"""Sums, scaling and clipping of gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.arrays import check_alike
from rnn_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine.arrays import Array, Grads


def sum_grads(parts: Sequence[Grads]) -> Grads:
    """Add gradients in the given order, which fixes every bit of the sum.

    Args:
        parts: At least one; all of one specification and dtype.

    Raises:
        EngineError: If there are none.
        ShapeError: If they disagree on a shape.
        DTypeError: If they disagree on the type.
    """
    if not parts:
        raise EngineError("parts: expected at least one gradient, got none")
    first, *others = parts
    for part in others:
        check_alike("d", part, first, whose="the first")
    total = first.buffer.copy()
    for part in others:
        np.add(total, part.buffer, total)
    return first.like(total)


def scale_grads(grads: Grads, factor: float) -> Grads:
    """Return the gradients times a number, in their own type."""
    factor = float(factor)
    return grads.like(grads.buffer * factor)


def global_norm(grads: Grads) -> float:
    """Return the Euclidean norm over all entries, accumulated in float64.

    The squares are summed array by array and then added: one sum over the whole buffer would round otherwise.
    Not by a BLAS dot product, whose order of summation depends on its threads.
    """
    norm = math.sqrt(sum(_sum_of_squares(array, 1.0) for array in grads))
    if math.isinf(norm):
        # Squares beyond 1e308 overflow although the norm may not; divide by the largest entry.
        largest = max(float(np.abs(array).max()) for array in grads)
        if math.isfinite(largest):
            squares = sum(_sum_of_squares(array, largest) for array in grads)
            return largest * math.sqrt(squares)
    return norm


def clip_by_global_norm(grads: Grads, max_norm: float) -> tuple[Grads, float, bool]:
    """Scale gradients down to a global norm of at most `max_norm`.

    factor = max_norm / (norm + 1e-6), applied where it is below 1, as torch's clip_grad_norm_ does.

    Args:
        grads: The gradients, which stay as they are.
        max_norm: The largest norm allowed; 0 turns clipping off.

    Returns:
        The gradients (the same object where nothing was clipped), the norm before clipping, and
        whether they were scaled.

    Raises:
        EngineError: If max_norm is negative or NaN.
    """
    if not max_norm >= 0:
        raise EngineError(f"max_norm: expected a number >= 0, got {max_norm}")
    norm = global_norm(grads)
    if max_norm == 0:
        return grads, norm, False
    factor = max_norm / (norm + 1e-6)
    if not factor < 1:
        return grads, norm, False
    return scale_grads(grads, factor), norm, True


def _sum_of_squares(array: Array, divisor: float) -> float:
    wide = array.astype(np.float64)
    if divisor != 1.0:
        wide /= divisor
    with np.errstate(over="ignore"):
        np.square(wide, out=wide)
        return float(wide.sum())
