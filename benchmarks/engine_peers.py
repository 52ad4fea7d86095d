"""The same recurrence in the libraries that users would take instead, each in its fastest form.

Every peer holds its weights and inputs in its own arrays and layout before the clock starts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rnn_engine import Params, rnn_backward, rnn_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rnn_engine import Array


@dataclass(frozen=True)
class Work:
    """One chunk to run forward and back.

    Attributes:
        params: The weights, float32.
        xs: Inputs, shape (N, T, D).
        h0: First state, shape (N, H).
        dhs: Gradients of the hidden states, shape (N, T, H).
    """

    params: Params
    xs: Array
    h0: Array
    dhs: Array


def make_work(n: int, t: int, d: int, h: int) -> Work:
    """Return seeded float32 arrays of the given sizes, weights scaled as at the start of training."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (rng.normal(size=shape) * scale).astype(np.float32)

    params = Params(normal(d, h, scale=d**-0.5), normal(h, h, scale=h**-0.5), normal(h, scale=0.1))
    return Work(params, normal(n, t, d), normal(n, h, scale=0.3), normal(n, t, h))


class Contestant(Protocol):
    """One way to compute the recurrence.

    Attributes:
        forward: Computes hs and returns them in the library's own arrays.
        both: Computes hs and the gradients of xs, h0 and the weights; None where it cannot.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any] | None

    def hidden_states(self) -> Array:
        """Return hs of shape (N, T, H), to compare."""
        ...


class Engine:
    """The engine under measurement, `rnn_engine` itself."""

    def __init__(self, work: Work) -> None:
        params, xs, h0, dhs = work.params, work.xs, work.h0, work.dhs

        def both() -> Any:
            return rnn_backward(params, rnn_forward(params, xs, h0), dhs)

        self.forward: Callable[[], Any] = lambda: rnn_forward(params, xs, h0)
        self.both: Callable[[], Any] | None = both

    def hidden_states(self) -> Array:
        """Return hs of shape (N, T, H)."""
        states: Array = self.forward().hs
        return states


class Torch:
    """torch.nn.RNN, batch first, forward in inference mode."""

    def __init__(self, work: Work) -> None:
        import torch  # noqa: PLC0415 - each peer is there only where it is installed

        torch.set_num_threads(1)
        params = work.params
        layer = torch.nn.RNN(params.input_size, params.hidden_size, batch_first=True)
        weights = {
            "weight_ih_l0": params.Wx.T,
            "weight_hh_l0": params.Wh.T,
            "bias_ih_l0": params.b,
            "bias_hh_l0": np.zeros_like(params.b),
        }
        layer.load_state_dict({name: torch.tensor(np.array(w)) for name, w in weights.items()})
        xs, h0, dhs = torch.tensor(work.xs), torch.tensor(work.h0[None]), torch.tensor(work.dhs)
        inputs = [xs.clone().requires_grad_(), h0.clone().requires_grad_()]
        leaves = [*inputs, *layer.parameters()]

        def forward() -> Any:
            with torch.inference_mode():
                return layer(xs, h0)[0]

        def both() -> Any:
            return torch.autograd.grad(layer(*inputs)[0], leaves, dhs)

        self.forward: Callable[[], Any] = forward
        self.both: Callable[[], Any] | None = both

    def hidden_states(self) -> Array:
        """Return hs of shape (N, T, H)."""
        states: Array = self.forward().numpy()
        return states


class OnnxRuntime:
    """ONNX Runtime's RNN operator, time-major as it wants its input."""

    both: Callable[[], Any] | None = None

    def __init__(self, work: Work) -> None:
        session = onnx_session(work.params)
        feeds = {
            "X": np.ascontiguousarray(work.xs.swapaxes(0, 1)),
            "H0": work.h0[None],
            "lengths": np.full(len(work.xs), work.xs.shape[1], np.int32),
        }
        self.forward: Callable[[], Any] = lambda: session.run(None, feeds)[0]

    def hidden_states(self) -> Array:
        """Return hs of shape (N, T, H)."""
        states: Array = self.forward()[:, 0].swapaxes(0, 1)
        return states


def onnx_session(params: Params) -> Any:
    """Return an ONNX Runtime session of one RNN node with inputs X, H0 and lengths."""
    import onnxruntime  # noqa: PLC0415
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415

    h = params.hidden_size
    float32 = TensorProto.FLOAT
    node = helper.make_node(
        "RNN", ["X", "W", "R", "B", "lengths", "H0"], ["Y", "Yh"], hidden_size=h
    )
    constants = {
        "W": np.ascontiguousarray(params.Wx.T)[None],
        "R": np.ascontiguousarray(params.Wh.T)[None],
        "B": np.concatenate([params.b, np.zeros_like(params.b)])[None],
    }
    graph = helper.make_graph(
        [node],
        "rnn",
        [
            helper.make_tensor_value_info("X", float32, ["T", "N", params.input_size]),
            helper.make_tensor_value_info("H0", float32, [1, "N", h]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["N"]),
        ],
        [
            helper.make_tensor_value_info("Y", float32, ["T", 1, "N", h]),
            helper.make_tensor_value_info("Yh", float32, [1, "N", h]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Jax:
    """A jitted jax.lax.scan and its vector-Jacobian product.

    The inputs' product stands before the scan, as in the engine; inside it is slower.
    """

    def __init__(self, work: Work) -> None:
        import jax  # noqa: PLC0415
        from jax import numpy as jnp  # noqa: PLC0415

        def run(Wx: Any, Wh: Any, b: Any, xs: Any, h0: Any) -> Any:
            def step(h: Any, z: Any) -> Any:
                h = jnp.tanh(z + h @ Wh)
                return h, h

            hs = jax.lax.scan(step, h0, jnp.swapaxes(xs, 0, 1) @ Wx + b)[1]
            return jnp.swapaxes(hs, 0, 1)

        def run_back(dhs: Any, *arrays: Any) -> Any:
            hs, pull_back = jax.vjp(run, *arrays)
            return hs, pull_back(dhs)

        params = work.params
        arrays = [jnp.asarray(a) for a in (params.Wx, params.Wh, params.b, work.xs, work.h0)]
        dhs = jnp.asarray(work.dhs)
        forward, back = jax.jit(run), jax.jit(run_back)
        self.forward: Callable[[], Any] = lambda: forward(*arrays).block_until_ready()
        self.both: Callable[[], Any] | None = lambda: jax.block_until_ready(back(dhs, *arrays))

    def hidden_states(self) -> Array:
        """Return hs of shape (N, T, H)."""
        return np.asarray(self.forward())


PEERS: dict[str, Callable[[Work], Contestant]] = {
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
}
"""The peers by the name of the package they need."""

_NEEDS = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), "jax": ("jax", "jaxlib")}


def installed_peers() -> list[str]:
    """Return the peers whose packages are there."""
    return [
        name for name, packages in _NEEDS.items() if all(map(importlib.util.find_spec, packages))
    ]


class BareProducts:
    """The matrix products that a pass cannot do without, and nothing else."""

    def __init__(self, work: Work) -> None:
        n, t, d = work.xs.shape
        params = work.params
        h = params.hidden_size
        rows = np.ascontiguousarray(work.xs.swapaxes(0, 1)).reshape(t * n, d)
        dzs = np.ascontiguousarray(work.dhs.swapaxes(0, 1)).reshape(t * n, h)
        # Not dzs again: NumPy multiplies a matrix by its own transpose at half the price.
        states = dzs[::-1].copy()
        shape = (t, h) if n == 1 else (t, n, h)
        steps = dzs.reshape(shape)
        out = np.empty_like(steps[0])

        def forward() -> None:
            rows.dot(params.Wx)
            for step in steps:
                step.dot(params.Wh, out)

        def backward() -> None:
            for step in steps:
                step.dot(params.Wh.T, out)
            rows.T.dot(dzs)
            states.T.dot(dzs)
            dzs.dot(params.Wx.T)

        self.forward = forward
        self.backward = backward


def fewest_calls(work: Work) -> Callable[[], None]:
    """Return the calls of NumPy that no forward pass can do without, and nothing else.

    One product for all inputs, then a product and a tanh a step, each step on the last one's result.
    What adds the inputs to the product is left out, so the numbers are not the layer's: no way of
    putting the pass into NumPy takes less time.
    """
    n, t, d = work.xs.shape
    Wx, Wh = work.params.Wx, work.params.Wh
    rows = np.ascontiguousarray(work.xs.swapaxes(0, 1)).reshape(t * n, d)
    z = np.empty((t * n, Wh.shape[0]), rows.dtype)
    states = np.empty((t, *work.h0.shape), rows.dtype)
    first = work.h0
    if n == 1:
        states, first = states[:, 0], first[0]
    product, tanh = np.empty_like(first), np.tanh

    def call() -> None:
        h = first
        rows.dot(Wx, z)
        for state in states:
            h.dot(Wh, product)
            tanh(product, state)
            h = state

    return call


def fewest_ragged_calls(params: Params, lengths: Sequence[int]) -> Callable[[], None]:
    """Return the same for sequences of different lengths, packed by time, the longest first."""
    counts = [sum(length > t for length in lengths) for t in range(max(lengths))]
    d, h = params.Wx.shape
    rows, first = np.ones((sum(counts), d), params.dtype), np.ones((counts[0], h), params.dtype)
    z, packed = np.empty((2, len(rows), h), params.dtype)
    states = np.split(packed, np.cumsum(counts)[:-1])
    products = [np.empty_like(state) for state in states]

    def call() -> None:
        last = first
        rows.dot(params.Wx, z)
        for product, state in zip(products, states, strict=True):
            last[: len(state)].dot(params.Wh, product)
            np.tanh(product, state)
            last = state

    return call
