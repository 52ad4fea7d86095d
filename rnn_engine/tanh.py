"""The tanh layer as a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.arrays import ArraySpec, Spec
from rnn_engine.backward import rnn_backward
from rnn_engine.forward import Tape, hidden_states
from rnn_engine.network import Network, Real, Step
from rnn_engine.params import Params, tanh_spec
from rnn_engine.ragged import rnn_forward_many

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike

    from rnn_engine.arrays import Array, Grads, State, Weights


@dataclass(frozen=True, slots=True)
class TanhNetwork(Network):
    """h_t = tanh(x_t Wx + h_{t-1} Wh + b): the state is h, and so is the output.

    Attributes:
        input_size: D.
        hidden_size: H.
    """

    input_size: int
    hidden_size: int
    weight_spec: Spec = field(init=False, compare=False, repr=False)
    state_spec: Spec = field(init=False, compare=False, repr=False)
    input: Real = field(init=False, compare=False, repr=False)
    output_size: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Derive the specifications: weights Wx (D, H), Wh (H, H), b (H,), state h (H,), H outputs."""
        h = self.hidden_size
        state_spec = Spec((ArraySpec("h", (h,)),), ("h",))
        object.__setattr__(self, "weight_spec", tanh_spec(self.input_size, h))
        object.__setattr__(self, "state_spec", state_spec)
        object.__setattr__(self, "input", Real(self.input_size))
        object.__setattr__(self, "output_size", h)

    def init(self, rng: np.random.Generator, dtype: DTypeLike) -> Params:
        """Draw first weights: normal, scaled by 1/sqrt(D) and 1/sqrt(H); b is zero."""
        d, h = self.input_size, self.hidden_size
        Wx = rng.standard_normal((d, h)) / np.sqrt(d)
        Wh = rng.standard_normal((h, h)) / np.sqrt(h)
        return Params(Wx.astype(dtype), Wh.astype(dtype), np.zeros(h, dtype))

    def prepare(self, weights: Weights) -> Params:
        """Return the weights with their joined block, which is how they lie in memory already."""
        return weights if isinstance(weights, Params) else Params.view(weights.spec, weights.buffer)

    def forward(self, prepared: Params, inputs: Array, state: State, *, keep: bool) -> Step:
        """Run over one chunk, as `rnn_forward` does."""
        (h0,) = state
        hs = hidden_states(prepared, inputs, h0)
        # Copied: a view would keep all of hs in memory as long as the state is kept.
        return Step(hs, (hs[:, -1].copy(),), Tape(inputs, h0, hs) if keep else None)

    def forward_many(
        self, prepared: Params, inputs: Sequence[Array], states: Sequence[State]
    ) -> list[Step]:
        """Run over many chunks, as `rnn_forward_many` does."""
        outputs = rnn_forward_many(prepared, inputs, [h0 for (h0,) in states])
        return [Step(hs, (hs[:, -1].copy(),), None) for hs in outputs]

    def backward(
        self, prepared: Params, tape: Tape, d_outputs: Array, d_state: State | None = None
    ) -> tuple[Grads, Array, State]:
        """Propagate gradients back through one chunk, as `rnn_backward` does."""
        back = rnn_backward(prepared, tape, d_outputs, None if d_state is None else d_state[0])
        return back.grads, back.dxs, (back.dh0,)

    def last_output(self, state: State) -> Array:
        """Return h."""
        return state[0]

    def work(self, n: int, t: int) -> int:
        """Return the size of the joined block, once a row and step."""
        return n * t * (self.hidden_size + self.input_size + 1) * self.hidden_size
