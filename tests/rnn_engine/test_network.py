"""The network port: weights as views of one buffer, the passes through it, the same bits as array by array."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rnn_engine import (
    OPTIMIZERS,
    AdaGrad,
    Adam,
    AdamW,
    EngineError,
    Momentum,
    Nesterov,
    Real,
    RMSprop,
    ShapeError,
    Spec,
    TanhNetwork,
    apply_update,
    clip_by_global_norm,
    init_moments,
    moments_to_arrays,
    rnn_backward,
    rnn_forward,
    rnn_forward_many,
    scale_grads,
    sum_grads,
)
from rnn_engine.arrays import CACHE_LINE_BYTES, SLICE_BYTES, ArraySpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import Array, Grads, Network, Optimizer, State
    from tests.rnn_engine.conftest import Case, CaseMaker

STEPS, CHUNKS = 50, 40
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def network_of(case: Case) -> TanhNetwork:
    """Return the network of a case's sizes."""
    return TanhNetwork(case.params.input_size, case.params.hidden_size)


def drawn(spec: Spec, rng: np.random.Generator, dtype: type[np.floating[Any]]) -> Grads:
    """Return random gradients."""
    return spec.pack([rng.normal(size=one.shape).astype(dtype) for one in spec.arrays])


def step_of_array(
    rule: Optimizer, p: Array, g: Array, slots: Sequence[Array], step: int
) -> tuple[Array, list[Array]]:
    """Return one array of weights and its slots after a step, by the formulas of the optimizers' table."""
    if isinstance(rule, Momentum | Nesterov):
        v = rule.momentum * slots[0] + g
        ahead = g + rule.momentum * v if isinstance(rule, Nesterov) else v
        return p - rule.lr * ahead, [v]
    if isinstance(rule, AdaGrad | RMSprop):
        kept, taken = (rule.alpha, 1 - rule.alpha) if isinstance(rule, RMSprop) else (1.0, 1.0)
        s = kept * slots[0] + taken * (g * g)
        return p - rule.lr * g / (np.sqrt(s) + rule.eps), [s]
    if isinstance(rule, Adam | AdamW):
        if isinstance(rule, AdamW):
            p = p * (1 - rule.lr * rule.weight_decay)
        m = rule.beta1 * slots[0] + (1 - rule.beta1) * g
        v = rule.beta2 * slots[1] + (1 - rule.beta2) * (g * g)
        rate, root = rule.lr / (1 - rule.beta1**step), math.sqrt(1 - rule.beta2**step)
        return p - rate * m / (np.sqrt(v) / root + rule.eps), [m, v]
    return p - rule.lr * g, []


def joined_arrays(
    parts: Sequence[Grads], clip_norm: float, *, mean: bool
) -> tuple[list[Array], float]:
    """Return the sum or mean of gradients, clipped, and its norm, array by array."""
    total = [array.copy() for array in parts[0]]
    for part in parts[1:]:
        total = [a + b for a, b in zip(total, part, strict=True)]
    if mean:
        total = [array * (1 / len(parts)) for array in total]
    norm = math.sqrt(sum(float(np.square(a.astype(np.float64)).sum()) for a in total))
    factor = clip_norm / (norm + 1e-6) if clip_norm else 1.0
    return [array * factor for array in total] if factor < 1 else total, norm


@DTYPES
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("rule", [replace(kind(), lr=0.01) for kind in OPTIMIZERS], ids=repr)
def test_steps_over_the_buffer_are_those_array_by_array(
    rng: np.random.Generator,
    rule: Optimizer,
    clip_norm: float,
    dtype: type[np.floating[Any]],
    *,
    mean: bool,
) -> None:
    """Fifty steps from three gradients each give the bits of a step of Wx, one of Wh and one of b."""
    network = TanhNetwork(17, 33)
    weights = network.init(rng, dtype)
    moments = init_moments(rule, weights)
    arrays = [array.copy() for array in weights]
    slots = [[np.zeros_like(array) for _ in rule.slot_names] for array in arrays]
    for step in range(1, STEPS + 1):
        parts = [drawn(network.weight_spec, rng, dtype) for _ in range(3)]
        grads = sum_grads(parts)
        grads, norm, _ = clip_by_global_norm(
            scale_grads(grads, 1 / len(parts)) if mean else grads, clip_norm
        )
        weights, moments = apply_update(rule, weights, grads, moments)
        expected, expected_norm = joined_arrays(parts, clip_norm, mean=mean)
        assert norm == expected_norm
        for k, gradient in enumerate(expected):
            arrays[k], slots[k] = step_of_array(rule, arrays[k], gradient, slots[k], step)
    by_slot = [slots[k][i] for i in range(len(rule.slot_names)) for k in range(len(arrays))]
    there = [*weights, *moments_to_arrays(moments).values()]
    for ours, theirs in zip(there, [*arrays, *by_slot], strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_buffer_of_many_slices_is_stepped_to_its_end(rng: np.random.Generator) -> None:
    """Weights larger than a slice, no multiple of one, are those of a step array by array."""
    network = TanhNetwork(300, 201)
    weights, rule = network.init(rng, np.float32), Adam()
    assert weights.nbytes > SLICE_BYTES
    assert weights.nbytes % SLICE_BYTES != 0
    grads = drawn(network.weight_spec, rng, np.float32)
    after, _ = apply_update(rule, weights, grads, init_moments(rule, weights))
    for ours, before, gradient in zip(after, weights, grads, strict=True):
        zeros = [np.zeros_like(before)] * 2
        assert ours.tobytes() == step_of_array(rule, before, gradient, zeros, 1)[0].tobytes()


@DTYPES
@pytest.mark.parametrize("n", [1, 3])
def test_chunks_through_the_port_are_those_of_the_functions(
    case_of: CaseMaker, n: int, dtype: type[np.floating[Any]]
) -> None:
    """Forty chunks, each from the state before, give the same bits; the state is the last output."""
    case = case_of(n, CHUNKS * 3, 17, 33, dtype=dtype)
    network = network_of(case)
    prepared = network.prepare(network.weight_spec.pack(case.params))
    state: State = (case.h0,)
    h = case.h0
    for start in range(0, CHUNKS * 3, 3):
        xs = np.ascontiguousarray(case.xs[:, start : start + 3])
        step = network.forward(prepared, xs, state, keep=False)
        hs = rnn_forward(case.params, xs, h).hs
        state, h = step.state, hs[:, -1].copy()
        assert step.tape is None
        assert np.ascontiguousarray(step.outputs).tobytes() == np.ascontiguousarray(hs).tobytes()
        assert state[0].tobytes() == h.tobytes()


def test_many_chunks_through_the_port_are_those_of_the_function(case_of: CaseMaker) -> None:
    """Ragged chunks give the same bits, and each its own last state, which keeps no other alive."""
    cases = [case_of(n, t, 5, 7, seed=t) for n, t in ((1, 4), (2, 6), (1, 1))]
    network, params = network_of(cases[0]), cases[0].params
    xs, states = [case.xs for case in cases], [case.h0 for case in cases]
    steps = network.forward_many(params, xs, [(h0,) for h0 in states])
    for step, hs in zip(steps, rnn_forward_many(params, xs, states), strict=True):
        assert step.outputs.tobytes() == hs.tobytes()
        assert np.array_equal(step.state[0], hs[:, -1])
        assert not np.shares_memory(step.state[0], step.outputs)


@pytest.mark.parametrize("n", [1, 3])
def test_gradients_through_the_port_are_those_of_the_function(case_of: CaseMaker, n: int) -> None:
    """A kept tape, and one made again from inputs and first state, give the bits of `rnn_backward`."""
    case = case_of(n, 4, 5, 7)
    network: Network = network_of(case)
    back = rnn_backward(
        case.params, rnn_forward(case.params, case.xs, case.h0), case.dhs, case.dh_next
    )
    for _ in range(2):
        tape = network.forward(case.params, case.xs, (case.h0,), keep=True).tape
        assert tape is not None
        assert tape.nbytes == case.xs.nbytes + case.h0.nbytes + case.dhs.nbytes
        grads, d_inputs, d_state = network.backward(
            case.params,
            tape,
            case.dhs,
            (case.dh_next,),
        )
        for ours, theirs in zip(grads, back.grads, strict=True):
            assert ours.tobytes() == theirs.tobytes()
        assert d_inputs is not None
        assert np.array_equal(d_inputs, back.dxs)
        assert np.array_equal(d_state[0], back.dh0)


def test_a_tanh_network_says_what_it_takes_and_gives() -> None:
    """Names and shapes of weights and state, the inputs, the outputs and the work."""
    network = TanhNetwork(3, 4)
    assert network.weight_spec.arrays == (("Wx", (3, 4)), ("Wh", (4, 4)), ("b", (4,)))
    assert network.state_spec.arrays == (("h", (4,)),)
    assert network.input == Real(3)
    assert network.output_size == 4
    assert network.work(2, 5) == 2 * 5 * (3 + 4 + 1) * 4
    assert network == TanhNetwork(3, 4) != TanhNetwork(4, 3)


def test_first_weights_are_normal_in_the_order_of_the_specification() -> None:
    """Wx is drawn first, then Wh, both in float64 and scaled by their inputs; b is zero."""
    weights = TanhNetwork(3, 4).init(np.random.default_rng(7), np.float32)
    rng = np.random.default_rng(7)
    expected = [
        (rng.standard_normal((rows, 4)) / np.sqrt(rows)).astype(np.float32) for rows in (3, 4)
    ]
    for ours, theirs in zip(weights, [*expected, np.zeros(4, np.float32)], strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_weights_are_views_of_one_aligned_buffer(case: Case) -> None:
    """Whoever writes to the buffer writes to the arrays; it begins at a cache line's border."""
    network = network_of(case)
    packed = network.weight_spec.pack(case.params)
    assert packed.buffer.ctypes.data % CACHE_LINE_BYTES == 0
    assert packed.buffer.size == sum(array.size for array in packed)
    assert all(np.shares_memory(array, packed.buffer) for array in packed)
    prepared = network.prepare(packed)
    assert np.shares_memory(prepared.joined, packed.buffer)
    assert network.prepare(prepared) is prepared
    flat = np.concatenate([array.ravel() for array in packed])
    for view, array in zip(network.weight_spec.split(flat), packed, strict=True):
        assert np.array_equal(view, array)


def test_a_state_of_several_arrays_is_rows_side_by_side(rng: np.random.Generator) -> None:
    """Each row holds its part of every array, in order; split again, each array is contiguous."""
    spec = Spec((ArraySpec("h", (4,)), ArraySpec("c", (2, 3))), ("c", "h"))
    state = rng.normal(size=(5, 4)), rng.normal(size=(5, 2, 3))
    rows = spec.join_rows(state)
    assert np.array_equal(rows[3], np.concatenate([state[0][3], state[1][3].ravel()]))
    for array, again in zip(state, spec.split_rows(rows), strict=True):
        assert np.array_equal(array, again)
        assert again.flags.c_contiguous


def test_arrays_that_do_not_fit_the_specification_are_refused(case: Case) -> None:
    """What only broadcasting could fit is named; so are buffers in which the arrays lie otherwise."""
    spec = network_of(case).weight_spec
    Wx, Wh, b = case.params
    with pytest.raises(ShapeError, match=r"^b:"):
        spec.pack([Wx, Wh, b[:1]])
    other = Spec(tuple(ArraySpec(*one) for one in spec.arrays), spec.names).pack([Wx, Wh, b])
    with pytest.raises(EngineError, match=r"in memory"):
        sum_grads([spec.pack(case.params), other])
