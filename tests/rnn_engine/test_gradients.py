"""Sums, scaling and clipping of gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnn_engine import (
    DTypeError,
    EngineError,
    ShapeError,
    TanhNetwork,
    clip_by_global_norm,
    global_norm,
    scale_grads,
    sum_grads,
)

if TYPE_CHECKING:
    from rnn_engine import Grads


def _grads(seed: int, scale: float = 1.0, dtype: type[np.floating] = np.float64) -> Grads:
    rng = np.random.default_rng(seed)
    shapes = ((3, 4), (4, 4), (4,))
    arrays = [(rng.normal(size=shape) * scale).astype(dtype) for shape in shapes]
    return TanhNetwork(3, 4).weight_spec.pack(arrays)


def _flat(grads: Grads) -> np.ndarray:
    return np.concatenate([array.ravel() for array in grads])


def test_global_norm_is_over_all_entries() -> None:
    """The norm is that of one long vector."""
    grads = _grads(0)
    assert math.isclose(global_norm(grads), float(np.linalg.norm(_flat(grads))), rel_tol=1e-14)


def test_a_norm_beyond_the_squares_is_finite() -> None:
    """Entries whose squares overflow still have a norm, in both types."""
    large = _grads(0, scale=1e200)
    assert math.isclose(global_norm(large), global_norm(_grads(0)) * 1e200, rel_tol=1e-12)
    single = _grads(0, scale=1e30, dtype=np.float32)
    assert math.isclose(global_norm(single), global_norm(_grads(0)) * 1e30, rel_tol=1e-6)


def test_a_norm_over_infinity_or_nan_is_not_finite() -> None:
    """What is not finite shows in the norm."""
    for bad in (np.inf, np.nan):
        grads = _grads(0)
        grads[2][1] = bad
        assert not math.isfinite(global_norm(grads))


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-12, 1e12),
    max_norm=st.floats(1e-9, 1e9),
)
def test_a_clipped_norm_is_at_most_the_limit(seed: int, scale: float, max_norm: float) -> None:
    """Clipping keeps the direction and brings the norm to the limit; below it, nothing changes."""
    grads = _grads(seed, scale)
    clipped, norm, was_clipped = clip_by_global_norm(grads, max_norm)
    assert norm == global_norm(grads)
    assert global_norm(clipped) <= max_norm * (1 + 1e-12) or not was_clipped
    if was_clipped:
        ratio = _flat(clipped) / _flat(grads)
        np.testing.assert_allclose(ratio, max_norm / (norm + 1e-6), rtol=1e-12)
    else:
        assert clipped is grads
        assert norm <= max_norm


def test_a_limit_of_zero_turns_clipping_off() -> None:
    """The gradients come back as they are, with their norm."""
    grads = _grads(0)
    assert clip_by_global_norm(grads, 0.0) == (grads, global_norm(grads), False)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_senseless_limit_is_refused(max_norm: float) -> None:
    """A negative limit and NaN are errors, not "off"."""
    with pytest.raises(EngineError, match=r"^max_norm: expected a number >= 0"):
        clip_by_global_norm(_grads(0), max_norm)


@pytest.mark.torch
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    """clip_grad_norm_ of torch gives the same gradients and norm."""
    import torch

    grads = _grads(0)
    tensors = [torch.zeros(array.shape, dtype=torch.float64) for array in grads]
    for tensor, array in zip(tensors, grads, strict=True):
        tensor.grad = torch.tensor(array)
    their_norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    clipped, norm, _ = clip_by_global_norm(grads, max_norm)
    assert math.isclose(norm, float(their_norm), rel_tol=1e-12)
    for ours, tensor in zip(clipped, tensors, strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-12)


def test_a_sum_is_made_in_the_given_order() -> None:
    """float32 sums are those of adding one after the other, bit for bit; the parts stay."""
    parts = [_grads(seed, dtype=np.float32) for seed in range(5)]
    before = [_flat(part) for part in parts]
    expected = _flat(parts[0]).copy()
    for part in parts[1:]:
        expected += _flat(part)
    total = sum_grads(parts)
    assert _flat(total).tobytes() == expected.tobytes()
    assert total.dtype == np.float32
    assert all(np.array_equal(_flat(p), b) for p, b in zip(parts, before, strict=True))


def test_a_sum_of_one_is_a_copy() -> None:
    """Even one gradient comes back in memory of its own."""
    grads = _grads(0)
    total = sum_grads([grads])
    assert np.array_equal(_flat(total), _flat(grads))
    assert not np.shares_memory(total.buffer, grads.buffer)


def test_sums_of_what_does_not_fit_are_refused() -> None:
    """Nothing, other shapes that would broadcast, and other types raise."""
    grads = _grads(0)
    with pytest.raises(EngineError, match=r"at least one"):
        sum_grads([])
    with pytest.raises(ShapeError, match=r"^dWx:"):
        sum_grads([grads, TanhNetwork(1, 4).weight_spec.pack([grads[0][:1], *grads[1:]])])
    with pytest.raises(DTypeError, match=r"^dWx:"):
        sum_grads([grads, _grads(0, dtype=np.float32)])


def test_scaling_keeps_the_type() -> None:
    """A NumPy number as the factor does not widen float32."""
    scaled = scale_grads(_grads(0, dtype=np.float32), np.float64(0.5))
    assert scaled.dtype == np.float32
    assert np.array_equal(_flat(scaled), _flat(_grads(0, dtype=np.float32)) * np.float32(0.5))
