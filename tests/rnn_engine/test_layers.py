"""The module with the classic interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from rnn_engine import RNN, EngineError, ShapeError, TimeRNN, rnn_backward, rnn_forward

if TYPE_CHECKING:
    from rnn_engine import Params
    from tests.rnn_engine.conftest import Case


def _weights(params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return params.Wx, params.Wh, params.b


@pytest.fixture
def layer(case: Case) -> TimeRNN:
    """A stateful layer without a state."""
    return TimeRNN(*_weights(case.params), stateful=True)


def test_one_step_and_back(case: Case) -> None:
    """RNN gives the state, dx, dh_prev and gradients of a chunk of one step."""
    rnn = RNN(*_weights(case.params))
    x = case.xs[:, 0]
    h = rnn.forward(x, case.h0)
    dx, dh_prev = rnn.backward(case.dh_next)
    tape = rnn_forward(case.params, x[:, None], case.h0)
    expected = rnn_backward(case.params, tape, case.dh_next[:, None])
    assert np.array_equal(h, tape.hs[:, 0])
    assert np.array_equal(dx, expected.dxs[:, 0])
    assert np.array_equal(dh_prev, expected.dh0)
    for ours, gradient in zip(rnn.grads, expected.grads, strict=True):
        assert np.array_equal(ours, gradient)


def test_params_are_the_given_arrays(case: Case) -> None:
    """The lists hold Wx, Wh, b in this order, and the very arrays that were given."""
    weights = _weights(case.params)
    layer = TimeRNN(*weights)
    assert all(ours is given for ours, given in zip(layer.params, weights, strict=True))
    assert [g.shape for g in layer.grads] == [w.shape for w in weights]


def test_an_update_in_place_is_seen(layer: TimeRNN, case: Case) -> None:
    """A classic optimizer that writes into params changes the next pass."""
    before = layer.forward(case.xs)
    layer.reset_state()
    layer.params[2] += 1.0
    assert not np.allclose(layer.forward(case.xs), before)


def test_grads_are_overwritten_in_place(layer: TimeRNN, case: Case) -> None:
    """Each backward pass writes into the same arrays and adds nothing up."""
    arrays = list(layer.grads)
    layer.forward(case.xs)
    layer.backward(case.dhs)
    first = [gradient.copy() for gradient in layer.grads]
    layer.reset_state()
    layer.forward(case.xs)
    layer.backward(case.dhs)
    assert all(now is then for now, then in zip(layer.grads, arrays, strict=True))
    assert all(np.array_equal(now, then) for now, then in zip(layer.grads, first, strict=True))


def test_a_stateful_layer_goes_on(layer: TimeRNN, case: Case) -> None:
    """The second chunk starts from the state that the first one left."""
    start = np.zeros_like(case.h0)
    parts = [layer.forward(case.xs[:, :2]), layer.forward(case.xs[:, 2:])]
    whole = rnn_forward(case.params, case.xs, start).hs
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12)
    assert layer.h is not None
    np.testing.assert_allclose(layer.h, whole[:, -1], rtol=1e-12)


def test_a_stateless_layer_starts_from_zero(case: Case) -> None:
    """Without stateful, each pass is the first, even after set_state."""
    layer = TimeRNN(*_weights(case.params))
    first = layer.forward(case.xs)
    layer.set_state(case.h0)
    assert np.array_equal(layer.forward(case.xs), first)


def test_set_state_and_reset_state(layer: TimeRNN, case: Case) -> None:
    """A set state is where the next pass starts; a reset goes back to zero."""
    layer.set_state(case.h0)
    hs = layer.forward(case.xs)
    assert np.array_equal(hs, rnn_forward(case.params, case.xs, case.h0).hs)
    layer.reset_state()
    assert layer.h is None
    zero = np.zeros_like(case.h0)
    assert np.array_equal(layer.forward(case.xs), rnn_forward(case.params, case.xs, zero).hs)


def test_a_set_state_is_a_copy(layer: TimeRNN, case: Case) -> None:
    """Writing into the array afterwards does not reach the layer."""
    state = case.h0.copy()
    layer.set_state(state)
    state[:] = 7.0
    assert layer.h is not None
    assert np.array_equal(layer.h, case.h0)


def test_dh_is_the_gradient_of_the_first_state(layer: TimeRNN, case: Case) -> None:
    """After a backward pass, dh is what arrives at the state before the chunk."""
    layer.set_state(case.h0)
    layer.forward(case.xs)
    dxs = layer.backward(case.dhs)
    tape = rnn_forward(case.params, case.xs, case.h0)
    expected = rnn_backward(case.params, tape, case.dhs)
    assert np.array_equal(dxs, expected.dxs)
    assert layer.dh is not None
    assert np.array_equal(layer.dh, expected.dh0)


def test_another_batch_size_than_the_state_is_refused(layer: TimeRNN, case: Case) -> None:
    """A kept state of N rows is never broadcast to another N, and survives the refusal."""
    layer.set_state(case.h0)
    for xs in (case.xs[:1], np.repeat(case.xs, 2, axis=0)):
        with pytest.raises(ValueError, match=r"^h0: expected shape"):
            layer.forward(xs)
    layer.set_state(case.h0[:1])
    with pytest.raises(ShapeError, match=r"^h0: expected shape"):
        layer.forward(case.xs)
    assert layer.h is not None
    assert np.array_equal(layer.h, case.h0[:1])


def test_bad_calls_are_refused(layer: TimeRNN, case: Case) -> None:
    """A backward before any forward, and arrays of another rank or type, raise."""
    rnn = RNN(*_weights(case.params))
    with pytest.raises(EngineError, match=r"forward pass before"):
        layer.backward(case.dhs)
    with pytest.raises(ShapeError, match=r"^x:"):
        rnn.forward(case.xs, case.h0)
    with pytest.raises(ShapeError, match=r"^h:"):
        layer.set_state(case.h0[0])
    with pytest.raises(EngineError, match=r"^h: expected dtype float64"):
        layer.set_state(case.h0.astype(np.float32))
    rnn.forward(case.xs[:, 0], case.h0)
    with pytest.raises(ShapeError, match=r"^dh_next:"):
        rnn.backward(case.dhs)
