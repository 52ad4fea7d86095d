"""Checks for NaN and infinity, in arrays that come in and in arrays that were computed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from service.domain.errors import InvalidArgument

if TYPE_CHECKING:
    from rnn_engine import Array


def is_finite(array: Array) -> bool:
    """Return whether no element is NaN or infinite."""
    # A dot product of the array with itself costs less than half of isfinite. Large finite values
    # overflow it, and only then each element is tested. vdot, because dot warns of the overflow.
    flat = array.ravel("K")
    return math.isfinite(np.vdot(flat, flat)) or bool(np.isfinite(flat).all())


def check_finite(name: str, array: Array) -> None:
    """Refuse a tensor that came in and holds NaN or infinity.

    Raises:
        InvalidArgument: NON_FINITE, with the first index.
    """
    if is_finite(array):
        return
    index = np.unravel_index(int(np.isfinite(array).argmin()), array.shape)
    at = f"{name}[{','.join(str(i) for i in index)}]"
    value = "NaN" if np.isnan(array[index]) else "infinite"
    raise InvalidArgument("NON_FINITE", f"{at} is {value}", field=name, index=at)
