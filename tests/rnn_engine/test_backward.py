"""Back-propagation through the steps of one chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnn_engine import DTypeError, Params, ShapeError, Tape, rnn_backward, rnn_forward, sum_grads

if TYPE_CHECKING:
    from collections.abc import Callable

    from rnn_engine import Array, ChunkGradients
    from tests.rnn_engine.conftest import Case, CaseMaker

NAMES = ["xs", "h0", "Wx", "Wh", "b"]


def _arrays(case: Case) -> dict[str, Array]:
    p = case.params
    return {"xs": case.xs, "h0": case.h0, "Wx": p.Wx, "Wh": p.Wh, "b": p.b}


def _loss(arrays: dict[str, Array], case: Case, dh_next: Array | None) -> float:
    """Return a function of all inputs whose gradients at hs and h_T are dhs and dh_next."""
    params = Params(arrays["Wx"], arrays["Wh"], arrays["b"])
    hs = rnn_forward(params, arrays["xs"], arrays["h0"]).hs
    later = 0.0 if dh_next is None else np.sum(hs[:, -1] * dh_next)
    return float(np.sum(hs * case.dhs) + later)


def _central_difference(name: str, case: Case, dh_next: Array | None) -> Array:
    arrays = _arrays(case)
    gradient = np.empty(arrays[name].shape)
    for index in np.ndindex(*gradient.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = arrays[name].copy()
            moved[index] += step
            sides.append(_loss(arrays | {name: moved}, case, dh_next))
        gradient[index] = (sides[0] - sides[1]) / 2e-6
    return gradient


def _by_name(result: ChunkGradients) -> dict[str, Array]:
    grads = result.grads
    return dict(zip(NAMES, (result.dxs, result.dh0, *grads), strict=True))


@pytest.mark.parametrize("with_dh_next", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 2, 3), (1, 5, 2, 3), (3, 1, 2, 3), (3, 5, 4, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_central_differences(
    case_of: CaseMaker, sizes: tuple[int, int, int, int], name: str, *, with_dh_next: bool
) -> None:
    """Moving any entry of any input changes the loss as its gradient says."""
    case = case_of(*sizes)
    dh_next = case.dh_next if with_dh_next else None
    tape = rnn_forward(case.params, case.xs, case.h0)
    result = _by_name(rnn_backward(case.params, tape, case.dhs, dh_next))
    numeric = _central_difference(name, case, dh_next)
    np.testing.assert_allclose(result[name], numeric, rtol=1e-6, atol=1e-8)


@given(n=st.integers(1, 3), t=st.integers(2, 10), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_chained_chunks_give_the_gradients_of_one_shot(
    case_of: CaseMaker, n: int, t: int, seed: int, data: st.DataObject
) -> None:
    """Passing each chunk's dh0 to the chunk before it is back-propagation through all of them."""
    case = case_of(n, t, 3, 4, seed=seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, t - 1))))
    h, tapes = case.h0, []
    for xs in np.split(case.xs, cuts, axis=1):
        tapes.append(rnn_forward(case.params, xs, h))
        h = tapes[-1].hs[:, -1]
    dh, parts = case.dh_next, []
    for tape, dhs in zip(tapes[::-1], np.split(case.dhs, cuts, axis=1)[::-1], strict=True):
        parts.append(rnn_backward(case.params, tape, dhs, dh))
        dh = parts[-1].dh0

    whole_tape = rnn_forward(case.params, case.xs, case.h0)
    whole = rnn_backward(case.params, whole_tape, case.dhs, case.dh_next)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(dh, whole.dh0, **close)
    dxs = np.concatenate([part.dxs for part in parts[::-1]], axis=1)
    np.testing.assert_allclose(dxs, whole.dxs, **close)
    total = sum_grads([part.grads for part in parts])
    for ours, expected in zip(total, whole.grads, strict=True):
        np.testing.assert_allclose(ours, expected, **close)


def test_no_dh_next_is_a_zero_dh_next(case: Case) -> None:
    """Leaving dh_next out truncates: nothing arrives from later chunks."""
    tape = rnn_forward(case.params, case.xs, case.h0)
    left_out = _by_name(rnn_backward(case.params, tape, case.dhs))
    zero = _by_name(rnn_backward(case.params, tape, case.dhs, np.zeros_like(case.h0)))
    for name in NAMES:
        assert np.array_equal(left_out[name], zero[name])


def test_zero_gradients_give_zero_gradients(case: Case) -> None:
    """A loss that does not depend on hs depends on nothing."""
    tape = rnn_forward(case.params, case.xs, case.h0)
    result = _by_name(rnn_backward(case.params, tape, np.zeros_like(case.dhs)))
    assert not any(gradient.any() for gradient in result.values())


def _unaligned(array: Array) -> Array:
    return np.frombuffer(b"1234" + array.tobytes(), array.dtype, offset=4).reshape(array.shape)


def _strided(array: Array) -> Array:
    return np.repeat(array, 2, axis=-1)[..., ::2]


@pytest.mark.parametrize("arrange", [_unaligned, _strided, np.asfortranarray])
@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("h", [5, 64, 100])
def test_a_tape_from_elsewhere_gives_the_same_bits(
    case_of: CaseMaker, n: int, h: int, arrange: Callable[[Array], Array]
) -> None:
    """However a tape and gradients lie in memory, as read from a store too, no bit changes."""
    case = case_of(n, 5, 100, h, dtype=np.float32)
    tape = rnn_forward(case.params, case.xs, case.h0)
    stored = Tape(arrange(tape.xs), arrange(tape.h0), arrange(tape.hs))
    here = _by_name(rnn_backward(case.params, tape, case.dhs, case.dh_next))
    there = _by_name(rnn_backward(case.params, stored, arrange(case.dhs), arrange(case.dh_next)))
    for name in NAMES:
        assert here[name].tobytes() == there[name].tobytes(), name


@pytest.mark.parametrize("n", [1, 3])
def test_inputs_stay_as_they_are_and_apart(case_of: CaseMaker, n: int) -> None:
    """Nothing is written into the tape, dhs or dh_next, and no result shares their memory."""
    case = case_of(n, 4, 3, 5)
    tape = rnn_forward(case.params, case.xs, case.h0)
    inputs = [tape.xs, tape.h0, tape.hs, case.dhs, case.dh_next]
    before = [array.copy() for array in inputs]
    result = _by_name(rnn_backward(case.params, tape, case.dhs, case.dh_next))
    for array, copy in zip(inputs, before, strict=True):
        assert np.array_equal(array, copy)
        assert not any(np.shares_memory(array, gradient) for gradient in result.values())


@pytest.mark.parametrize("n", [1, 3])
def test_float32_stays_float32(case_of: CaseMaker, n: int) -> None:
    """No gradient is widened."""
    case = case_of(n, 4, 3, 5, dtype=np.float32)
    tape = rnn_forward(case.params, case.xs, case.h0)
    result = _by_name(rnn_backward(case.params, tape, case.dhs, case.dh_next))
    assert {gradient.dtype for gradient in result.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["hs", "dhs", "dh_next"])
def test_a_wrong_array_is_named(case: Case, name: str) -> None:
    """A shape that only broadcasting could fit, or another type, is refused by name."""
    tape = rnn_forward(case.params, case.xs, case.h0)
    arrays = {"hs": tape.hs, "dhs": case.dhs, "dh_next": case.dh_next}

    def run(bad: Array) -> None:
        a = arrays | {name: bad}
        rnn_backward(case.params, Tape(tape.xs, tape.h0, a["hs"]), a["dhs"], a["dh_next"])

    with pytest.raises(ShapeError, match=rf"^{name}: expected shape"):
        run(arrays[name][:1])
    with pytest.raises(DTypeError, match=rf"^{name}: expected dtype"):
        run(arrays[name].astype(np.float32))
