"""What every network owes to its users, whatever its cell: the same tests over all that the engine exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import rnn_engine
from rnn_engine import Network, TanhNetwork

if TYPE_CHECKING:
    from rnn_engine import Array, State

EXAMPLES = [TanhNetwork(3, 4)]
EACH = pytest.mark.parametrize("network", EXAMPLES, ids=repr)
STEP = 1e-6  # of a central difference, in float64


def draw_state(network: Network, rng: np.random.Generator, rows: int) -> State:
    """Return a random state."""
    return tuple(rng.normal(size=(rows, *shape)) for _, shape in network.state_spec.arrays)


def draw_inputs(network: Network, rng: np.random.Generator, rows: int, steps: int) -> Array:
    """Return random inputs."""
    inputs: Array = rng.normal(size=(rows, steps, network.input.size))
    return inputs


def test_every_network_is_among_the_examples() -> None:
    """A cell that is added and not tested here fails."""
    exported = [getattr(rnn_engine, name) for name in rnn_engine.__all__]
    networks = {
        one
        for one in exported
        if isinstance(one, type) and issubclass(one, Network) and one is not Network
    }
    assert networks == {type(example) for example in EXAMPLES}


@EACH
def test_weights_are_those_of_the_specification(network: Network, rng: np.random.Generator) -> None:
    """Names, shapes and type; packed from the arrays they are the same weights."""
    weights = network.init(rng, np.float32)
    assert {name: array.shape for name, array in weights.named().items()} == dict(
        network.weight_spec.arrays
    )
    assert weights.dtype == np.float32
    assert weights.buffer.tobytes() == network.weight_spec.pack(weights).buffer.tobytes()


@EACH
def test_a_state_survives_as_rows(network: Network, rng: np.random.Generator) -> None:
    """Joined into one array of rows and split again it is the same; each row keeps its own numbers."""
    spec, state = network.state_spec, draw_state(network, rng, 3)
    rows = spec.join_rows(state)
    assert rows.shape == (3, spec.size)
    for part in (slice(None), slice(1, 2)):
        again = spec.split_rows(rows[part])
        assert all(np.array_equal(a[part], b) for a, b in zip(state, again, strict=True))


@EACH
def test_chunks_give_what_one_sequence_gives(network: Network, rng: np.random.Generator) -> None:
    """The state carries all that a later chunk needs, and holds the last output."""
    prepared = network.prepare(network.init(rng, np.float64))
    inputs, state = draw_inputs(network, rng, 2, 5), draw_state(network, rng, 2)
    whole = network.forward(prepared, inputs, state, keep=False)
    first = network.forward(prepared, inputs[:, :2], state, keep=False)
    second = network.forward(prepared, inputs[:, 2:], first.state, keep=False)
    outputs = np.concatenate([first.outputs, second.outputs], axis=1)
    assert whole.outputs.shape == (2, 5, network.output_size)
    np.testing.assert_allclose(outputs, whole.outputs, rtol=1e-12)
    np.testing.assert_array_equal(network.last_output(whole.state), whole.outputs[:, -1])
    for ours, theirs in zip(second.state, whole.state, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert not np.shares_memory(theirs, whole.outputs)


@EACH
def test_many_chunks_at_once_give_what_each_gives(
    network: Network, rng: np.random.Generator
) -> None:
    """Outputs and states of ragged chunks are those of single ones, up to rounding."""
    prepared = network.prepare(network.init(rng, np.float64))
    sizes = [(1, 4), (2, 6), (1, 1)]
    inputs = [draw_inputs(network, rng, n, t) for n, t in sizes]
    states = [draw_state(network, rng, n) for n, _ in sizes]
    together = network.forward_many(prepared, inputs, states)
    for step, xs, state in zip(together, inputs, states, strict=True):
        alone = network.forward(prepared, xs, state, keep=False)
        np.testing.assert_allclose(step.outputs, alone.outputs, rtol=1e-12)
        for ours, theirs in zip(step.state, alone.state, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@EACH
def test_gradients_are_central_differences(network: Network, rng: np.random.Generator) -> None:
    """Those of every weight, of the inputs and of the first state, with a gradient at the last state."""
    weights = network.init(rng, np.float64)
    inputs, state = draw_inputs(network, rng, 2, 3), draw_state(network, rng, 2)
    d_outputs, d_state = rng.normal(size=(2, 3, network.output_size)), draw_state(network, rng, 2)

    def loss() -> float:
        step = network.forward(network.prepare(weights), inputs, state, keep=False)
        at_state = sum(float((a * b).sum()) for a, b in zip(step.state, d_state, strict=True))
        return float((step.outputs * d_outputs).sum()) + at_state

    prepared = network.prepare(weights)
    tape = network.forward(prepared, inputs, state, keep=True).tape
    grads, d_inputs, d_first = network.backward(prepared, tape, d_outputs, d_state)
    assert d_inputs is not None
    moved = [weights.buffer, inputs.reshape(-1), *(array.reshape(-1) for array in state)]
    found = [grads.buffer, d_inputs.reshape(-1), *(array.reshape(-1) for array in d_first)]
    for numbers, gradients in zip(moved, found, strict=True):
        for k in range(numbers.size):
            kept = numbers[k]
            numbers[k] = kept + STEP
            above = loss()
            numbers[k] = kept - STEP
            difference = (above - loss()) / (2 * STEP)
            numbers[k] = kept
            np.testing.assert_allclose(gradients[k], difference, rtol=1e-6, atol=1e-8)
