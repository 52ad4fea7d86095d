"""Recurrent networks on NumPy arrays, today a tanh layer: forward, backward, optimizers.

Only arithmetic on arrays: no input or output, no clocks, no threads, no global state. Equal inputs of equal
shapes give equal bits (with the same BLAS on one thread).

| letter | meaning | shape |
| --- | --- | --- |
| N, T, D, H | rows of a batch, time steps, input size, hidden size | |
| xs, x | inputs | (N, T, D), (N, D) |
| hs, h | hidden states after each step, after one step | (N, T, H), (N, H) |
| h0 | hidden state before the first step | (N, H) |
| z | what tanh is taken of: x Wx + h Wh + b | (N, H) |
| Wx, Wh, b | weights and bias | (D, H), (H, H), (H,) |
| dA | gradient of the loss with respect to A | that of A |

Pure functions: `rnn_forward`, `rnn_backward`, `rnn_forward_many`, and the optimizers. Classic layers over
them: `RNN`, `TimeRNN`. The port through which a user runs any network: `Network`, of which there is one,
`TanhNetwork`.
"""

from rnn_engine.arrays import Array, Arrays, ArraySpec, Grads, Spec, State, Weights
from rnn_engine.backward import ChunkGradients, rnn_backward
from rnn_engine.errors import DTypeError, EngineError, ShapeError
from rnn_engine.forward import Tape, rnn_forward
from rnn_engine.gradients import clip_by_global_norm, global_norm, scale_grads, sum_grads
from rnn_engine.layers import RNN, TimeRNN
from rnn_engine.network import Network, NetworkTape, Prepared, Real, Step
from rnn_engine.optimizers import (
    OPTIMIZERS,
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Moments,
    Momentum,
    Nesterov,
    Optimizer,
    RMSprop,
    Slot,
    apply_update,
    init_moments,
    moments_from_arrays,
    moments_to_arrays,
)
from rnn_engine.params import Params
from rnn_engine.ragged import rnn_forward_many
from rnn_engine.tanh import TanhNetwork

__all__ = [
    "OPTIMIZERS",
    "RNN",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Array",
    "ArraySpec",
    "Arrays",
    "ChunkGradients",
    "DTypeError",
    "EngineError",
    "Grads",
    "Moments",
    "Momentum",
    "Nesterov",
    "Network",
    "NetworkTape",
    "Optimizer",
    "Params",
    "Prepared",
    "RMSprop",
    "Real",
    "ShapeError",
    "Slot",
    "Spec",
    "State",
    "Step",
    "TanhNetwork",
    "Tape",
    "TimeRNN",
    "Weights",
    "apply_update",
    "clip_by_global_norm",
    "global_norm",
    "init_moments",
    "moments_from_arrays",
    "moments_to_arrays",
    "rnn_backward",
    "rnn_forward",
    "rnn_forward_many",
    "scale_grads",
    "sum_grads",
]
