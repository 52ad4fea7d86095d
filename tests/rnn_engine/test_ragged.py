"""One forward pass over many sequences of different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnn_engine import DTypeError, ShapeError, rnn_forward, rnn_forward_many

if TYPE_CHECKING:
    from rnn_engine import Array, Params
    from tests.rnn_engine.conftest import Case, CaseMaker

D, H = 3, 4


def _batch(
    counts: list[tuple[int, int]], rng: np.random.Generator
) -> tuple[list[Array], list[Array]]:
    xs: list[Array] = [rng.normal(size=(n, t, D)) for n, t in counts]
    return xs, [rng.normal(size=(n, H)) for n, _ in counts]


def _assert_as_alone(params: Params, xs: list[Array], h0: list[Array]) -> None:
    together = rnn_forward_many(params, xs, h0)
    assert len(together) == len(xs)
    for hs, x, state in zip(together, xs, h0, strict=True):
        alone = rnn_forward(params, x, state).hs
        np.testing.assert_allclose(hs, alone, rtol=1e-12, atol=1e-14)
        assert hs.flags.c_contiguous


@given(
    counts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_sequence_comes_out_as_if_alone(
    case_of: CaseMaker, counts: list[tuple[int, int]], seed: int
) -> None:
    """Whatever N and T its neighbours have, a sequence's outputs are its own."""
    params = case_of(1, 1, D, H).params
    _assert_as_alone(params, *_batch(counts, np.random.default_rng(seed)))


@pytest.mark.parametrize("counts", [[(1, 5)] * 4, [(2, 5), (1, 5)], [(3, 2)], [(1, 6)]])
def test_sequences_of_one_length_come_out_as_if_alone(
    case_of: CaseMaker, rng: np.random.Generator, counts: list[tuple[int, int]]
) -> None:
    """The unpacked path, where all are equally long or there is only one, computes the same."""
    _assert_as_alone(case_of(1, 1, D, H).params, *_batch(counts, rng))


@pytest.mark.parametrize("counts", [[(1, 2), (1, 5), (2, 3)], [(1, 4), (1, 4), (1, 4)]])
def test_a_nan_stays_in_its_sequence(
    case_of: CaseMaker, rng: np.random.Generator, counts: list[tuple[int, int]]
) -> None:
    """Not a bit of one sequence is in another."""
    params = case_of(1, 1, D, H).params
    xs, h0 = _batch(counts, rng)
    clean = rnn_forward_many(params, xs, h0)
    xs[1] = np.full_like(xs[1], np.nan)
    poisoned = rnn_forward_many(params, xs, h0)
    assert np.isnan(poisoned[1]).all()
    for index in (0, 2):
        assert np.array_equal(poisoned[index], clean[index])


def test_inputs_may_be_read_only_and_strided(case_of: CaseMaker, rng: np.random.Generator) -> None:
    """Views that cannot be written to, or not flattened without a copy, are accepted."""
    params = case_of(1, 1, D, H).params
    xs, h0 = _batch([(2, 4), (1, 2)], rng)
    xs[0] = np.asfortranarray(xs[0])
    for array in (*xs, *h0):
        array.flags.writeable = False
    _assert_as_alone(params, xs, h0)


def test_a_lone_sequence_owns_its_outputs(row_case: Case) -> None:
    """Nothing that comes out shares memory with what went in."""
    (hs,) = rnn_forward_many(row_case.params, [row_case.xs], [row_case.h0])
    assert not np.shares_memory(hs, row_case.xs)
    assert not np.shares_memory(hs, row_case.h0)


def test_a_wrong_sequence_is_refused(case: Case) -> None:
    """One array that does not fit, or a missing state, is refused."""
    with pytest.raises(ShapeError, match=r"^h0: expected shape"):
        rnn_forward_many(case.params, [case.xs, case.xs], [case.h0, case.h0[:1]])
    with pytest.raises(ShapeError, match=r"^h0: expected shape 2 arrays"):
        rnn_forward_many(case.params, [case.xs, case.xs], [case.h0])
    with pytest.raises(DTypeError, match=r"^xs: expected dtype float64"):
        rnn_forward_many(case.params, [case.xs.astype(np.float32)], [case.h0])
