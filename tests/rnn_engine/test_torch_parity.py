"""The engine beside torch.nn.RNN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rnn_engine import rnn_backward, rnn_forward

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from rnn_engine import Array
    from tests.rnn_engine.conftest import Case, CaseMaker

pytestmark = pytest.mark.torch

SIZES = [(1, 1, 32, 64), (1, 16, 32, 64), (8, 12, 64, 128), (20, 35, 100, 100)]
TOLERANCES: dict[DTypeLike, dict[str, Any]] = {
    np.float32: {"rtol": 2e-4, "atol": 2e-5},
    np.float64: {"rtol": 1e-11, "atol": 1e-12},
}


def _torch_results(case: Case) -> dict[str, Array]:
    """Return hs and all gradients as torch.nn.RNN computes them."""
    import torch

    p = case.params
    layer = torch.nn.RNN(p.input_size, p.hidden_size, batch_first=True)
    layer = layer.to(torch.from_numpy(case.xs).dtype)
    weights: dict[str, Any] = {
        "weight_ih_l0": p.Wx.T,
        "weight_hh_l0": p.Wh.T,
        "bias_ih_l0": p.b,
        "bias_hh_l0": np.zeros_like(p.b),
    }
    layer.load_state_dict({k: torch.tensor(np.ascontiguousarray(w)) for k, w in weights.items()})
    xs = torch.tensor(case.xs, requires_grad=True)
    h0 = torch.tensor(case.h0[None], requires_grad=True)
    hs, h = layer(xs, h0)
    torch.autograd.backward([hs, h], [torch.tensor(case.dhs), torch.tensor(case.dh_next[None])])
    return {
        "hs": hs.detach().numpy(),
        "dxs": xs.grad.numpy(),
        "dh0": h0.grad.numpy()[0],
        "dWx": layer.weight_ih_l0.grad.numpy().T,
        "dWh": layer.weight_hh_l0.grad.numpy().T,
        "db": layer.bias_ih_l0.grad.numpy(),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_are_those_of_torch(
    case_of: CaseMaker, sizes: tuple[int, int, int, int], dtype: DTypeLike
) -> None:
    """Hidden states and all gradients, with one that arrives at the last state, agree."""
    case = case_of(*sizes, dtype=dtype)
    tape = rnn_forward(case.params, case.xs, case.h0)
    result = rnn_backward(case.params, tape, case.dhs, case.dh_next)
    g = result.grads
    ours = {"hs": tape.hs, "dxs": result.dxs, "dh0": result.dh0}
    ours |= dict(zip(("dWx", "dWh", "db"), g, strict=True))
    for name, expected in _torch_results(case).items():
        np.testing.assert_allclose(ours[name], expected, err_msg=name, **TOLERANCES[dtype])
