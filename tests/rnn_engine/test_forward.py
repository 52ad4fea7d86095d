"""The recurrence over one chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnn_engine import DTypeError, Params, ShapeError, rnn_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike

    from rnn_engine import Array
    from tests.rnn_engine.conftest import Case, CaseMaker


# One row by a recipe for small inputs and by one for large ones, then batches.
SIZES = [(1, 1, 3, 2), (1, 6, 3, 2), (1, 1, 900, 8), (1, 6, 900, 8), (4, 1, 2, 3), (4, 6, 2, 3)]


@pytest.mark.parametrize("sizes", SIZES)
def test_forward_is_the_formula(case_of: CaseMaker, sizes: tuple[int, int, int, int]) -> None:
    """Each state is tanh of the input's and the last state's products and the bias."""
    case = case_of(*sizes)
    p, h = case.params, case.h0
    hs = rnn_forward(p, case.xs, case.h0).hs
    for t in range(sizes[1]):
        h = np.tanh(case.xs[:, t] @ p.Wx + h @ p.Wh + p.b)
        np.testing.assert_allclose(hs[:, t], h, rtol=1e-13, atol=1e-14)


@given(n=st.integers(1, 3), t=st.integers(2, 12), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_split_into_chunks_equals_one_shot(
    case_of: CaseMaker, n: int, t: int, seed: int, data: st.DataObject
) -> None:
    """Carrying the last state from chunk to chunk gives the outputs of one call."""
    case = case_of(n, t, 3, 4, seed=seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, t - 1))))
    h, parts = case.h0, []
    for xs in np.split(case.xs, cuts, axis=1):
        parts.append(rnn_forward(case.params, xs, h).hs)
        h = parts[-1][:, -1]
    whole = rnn_forward(case.params, case.xs, case.h0).hs
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_type_of_the_weights_is_kept(case_of: CaseMaker, n: int, dtype: DTypeLike) -> None:
    """Neither type is rounded to, or widened to, the other."""
    case = case_of(n, 4, 3, 5, dtype=dtype)
    assert rnn_forward(case.params, case.xs, case.h0).hs.dtype == dtype


def test_float64_is_not_rounded_on_the_way(row_case: Case) -> None:
    """A difference below float32's resolution in the state reaches the outputs."""
    case = row_case
    hs = rnn_forward(case.params, case.xs, case.h0).hs
    moved = rnn_forward(case.params, case.xs, case.h0 + 1e-12).hs
    assert np.all(hs[:, -1] != moved[:, -1])


def _unaligned(array: Array) -> Array:
    return np.frombuffer(b"1234" + array.tobytes(), array.dtype, offset=4).reshape(array.shape)


def _strided(array: Array) -> Array:
    return np.repeat(array, 2, axis=-1)[..., ::2]


@pytest.mark.parametrize("arrange", [_unaligned, _strided, np.asfortranarray])
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("h", [5, 64, 100, 200])
def test_where_the_inputs_lie_changes_no_bit(
    case_of: CaseMaker, n: int, h: int, arrange: Callable[[Array], Array]
) -> None:
    """Read-only, unaligned, strided and transposed inputs give the same bits as plain ones."""
    case = case_of(n, 5, 100, h, dtype=np.float32)
    p = case.params
    expected = rnn_forward(p, case.xs, case.h0).hs
    for params, xs, h0 in [
        (p, arrange(case.xs), case.h0),
        (p, case.xs, arrange(case.h0)),
        (Params(arrange(p.Wx), arrange(p.Wh), arrange(p.b)), case.xs, case.h0),
    ]:
        assert rnn_forward(params, xs, h0).hs.tobytes() == expected.tobytes()


@pytest.mark.parametrize("n", [1, 3])
def test_inputs_stay_as_they_are_and_apart(case_of: CaseMaker, n: int) -> None:
    """Nothing is written into xs or h0, and the outputs share no memory with them."""
    case = case_of(n, 4, 3, 5)
    xs, h0 = case.xs.copy(), case.h0.copy()
    hs = rnn_forward(case.params, case.xs, case.h0).hs
    assert np.array_equal(case.xs, xs)
    assert np.array_equal(case.h0, h0)
    assert not np.shares_memory(hs, case.xs)
    assert not np.shares_memory(hs, case.h0)


def test_rows_of_a_batch_do_not_touch(case: Case) -> None:
    """A NaN in one row stays in that row."""
    xs = case.xs.copy()
    xs[1] = np.nan
    hs = rnn_forward(case.params, xs, case.h0).hs
    assert np.isnan(hs[1]).all()
    expected = rnn_forward(case.params, case.xs, case.h0).hs
    assert np.array_equal(hs[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("sizes", SIZES)
def test_no_step_sees_a_later_one(case_of: CaseMaker, sizes: tuple[int, int, int, int]) -> None:
    """A NaN among the inputs leaves the states before it as they are."""
    case = case_of(*sizes)
    xs = case.xs.copy()
    xs[:, -1] = np.nan
    hs = rnn_forward(case.params, xs, case.h0).hs
    assert np.isnan(hs[:, -1]).all()
    expected = rnn_forward(case.params, case.xs, case.h0).hs
    assert np.array_equal(hs[:, :-1], expected[:, :-1])


@pytest.mark.parametrize(
    ("xs_shape", "h0_shape", "name"),
    [
        ((3, 5), (3, 6), "xs"),
        ((3, 5, 9), (3, 6), "xs"),
        ((3, 0, 4), (3, 6), "xs"),
        ((0, 5, 4), (0, 6), "xs"),
        ((3, 5, 4), (1, 6), "h0"),
        ((1, 5, 4), (3, 6), "h0"),
        ((3, 5, 4), (3, 1), "h0"),
        ((3, 5, 4), (6,), "h0"),
    ],
)
def test_a_wrong_shape_is_named(
    case: Case, xs_shape: tuple[int, ...], h0_shape: tuple[int, ...], name: str
) -> None:
    """Whatever disagrees on N, T, D or H is refused by name, never broadcast."""
    with pytest.raises(ShapeError, match=rf"^{name}: expected shape .*, got ") as caught:
        rnn_forward(case.params, np.zeros(xs_shape), np.zeros(h0_shape))
    assert caught.value.name == name
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["xs", "h0"])
def test_a_mixed_type_is_named(case: Case, name: str) -> None:
    """A float32 array beside float64 weights is refused, not converted."""
    arrays = {"xs": case.xs, "h0": case.h0}
    arrays[name] = arrays[name].astype(np.float32)
    with pytest.raises(DTypeError, match=rf"^{name}: expected dtype float64 .*, got float32"):
        rnn_forward(case.params, **arrays)


def test_weights_must_agree() -> None:
    """Params names the array that does not fit the others."""
    good = {"Wx": np.zeros((3, 4)), "Wh": np.zeros((4, 4)), "b": np.zeros(4)}
    for name, bad in [("Wx", (3,)), ("Wx", (0, 4)), ("Wh", (4, 3)), ("b", (1, 4)), ("b", (1,))]:
        with pytest.raises(ShapeError, match=rf"^{name}:"):
            Params(**good | {name: np.zeros(bad)})
    wrong: list[tuple[str, str]] = [("Wx", "f2"), ("Wx", ">f8"), ("Wh", "f4"), ("b", "i8")]
    for name, dtype in wrong:
        with pytest.raises(DTypeError, match=rf"^{name}:"):
            Params(**good | {name: good[name].astype(dtype)})


def test_params_tell_their_sizes() -> None:
    """D, H and the type can be asked for."""
    params = Params(np.zeros((3, 4)), np.zeros((4, 4)), np.zeros(4))
    assert (params.input_size, params.hidden_size) == (3, 4)
    assert params.dtype == np.float64


def test_params_are_copies_in_one_block(rng: np.random.Generator) -> None:
    """Writing into the arrays that Params was made from changes no weight; `joined` is all three."""
    Wx, Wh, b = rng.normal(size=(3, 4)), rng.normal(size=(4, 4)), rng.normal(size=4)
    params = Params(Wx, Wh, b)
    expected = np.concatenate([Wh, Wx, b[None]])
    for array in (Wx, Wh, b):
        array[...] = 0
    p = params
    for parts in ([p.joined], [p.Wh, p.Wx, p.b[None]], [p.Wh, p.input_part]):
        assert np.array_equal(np.concatenate(parts), expected)
