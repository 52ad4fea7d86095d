"""All optimizers, driven through the same tests from one table."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rnn_engine import (
    OPTIMIZERS,
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    DTypeError,
    EngineError,
    Momentum,
    Nesterov,
    Params,
    RMSprop,
    ShapeError,
    TanhNetwork,
    apply_update,
    init_moments,
    moments_from_arrays,
    moments_to_arrays,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike

    from rnn_engine import Array, Grads, Optimizer

TABLE: list[tuple[Optimizer, str, dict[str, Any]]] = [
    (SGD(lr=0.05), "SGD", {"lr": 0.05}),
    (Momentum(lr=0.05, momentum=0.8), "SGD", {"lr": 0.05, "momentum": 0.8}),
    (
        Nesterov(lr=0.05, momentum=0.8),
        "SGD",
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
    ),
    (AdaGrad(lr=0.05), "Adagrad", {"lr": 0.05}),
    (AdaGrad(), "Adagrad", {}),
    (RMSprop(lr=0.05, alpha=0.9), "RMSprop", {"lr": 0.05, "alpha": 0.9}),
    (RMSprop(), "RMSprop", {}),
    (
        Adam(lr=0.05, beta1=0.8, beta2=0.95),
        "Adam",
        {"lr": 0.05, "betas": (0.8, 0.95)},
    ),
    (Adam(), "Adam", {}),
    (AdamW(lr=0.05, weight_decay=0.2), "AdamW", {"lr": 0.05, "weight_decay": 0.2}),
    (AdamW(), "AdamW", {}),
]
ALL = pytest.mark.parametrize("optimizer", [kind() for kind in OPTIMIZERS], ids=repr)


def _params(rng: np.random.Generator, dtype: DTypeLike = np.float64) -> Params:
    shapes = ((3, 4), (4, 4), (4,))
    Wx, Wh, b = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    return Params(Wx, Wh, b)


def _grads(rng: np.random.Generator, dtype: DTypeLike = np.float64) -> Grads:
    return _pack(_params(rng, dtype))


def _pack(arrays: Sequence[Array]) -> Grads:
    return TanhNetwork(3, 4).weight_spec.pack(arrays)


def _arrays(params: Params) -> tuple[np.ndarray, ...]:
    return params.Wx, params.Wh, params.b


@pytest.mark.torch
@pytest.mark.parametrize(("optimizer", "name", "options"), TABLE, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_are_those_of_torch(
    rng: np.random.Generator,
    optimizer: Optimizer,
    name: str,
    options: dict[str, Any],
    dtype: DTypeLike,
) -> None:
    """Eight steps with changing gradients give the weights that torch.optim gives."""
    import torch

    params = _params(rng, dtype)
    moments = init_moments(optimizer, params)
    tensors = [torch.tensor(w, requires_grad=True) for w in _arrays(params)]
    peer = getattr(torch.optim, name)(tensors, **options)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    for _ in range(8):
        grads = _grads(rng, dtype)
        for tensor, gradient in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(gradient)
        peer.step()
        params, moments = apply_update(optimizer, params, grads, moments)
        for ours, theirs in zip(_arrays(params), tensors, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=rtol, atol=rtol)


@ALL
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_type_of_the_weights_is_kept(
    rng: np.random.Generator, optimizer: Optimizer, dtype: DTypeLike
) -> None:
    """Weights and moments keep their type, also when a hyperparameter is a NumPy number."""
    wide = type(optimizer)(*map(np.float64, astuple(optimizer)))
    params = _params(rng, dtype)
    moments = init_moments(wide, params)
    params, moments = apply_update(wide, params, _grads(rng, dtype), moments)
    arrays = [*_arrays(params), *moments_to_arrays(moments).values()]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


@ALL
def test_nothing_that_goes_in_is_changed(rng: np.random.Generator, optimizer: Optimizer) -> None:
    """An update is a function: its inputs stay, and the same inputs give the same bits."""
    params, grads = _params(rng), _grads(rng)
    params, moments = apply_update(optimizer, params, grads, init_moments(optimizer, params))
    inputs = [*_arrays(params), *grads, *moments_to_arrays(moments).values()]
    before = [array.copy() for array in inputs]
    once, moments_once = apply_update(optimizer, params, grads, moments)
    twice, moments_twice = apply_update(optimizer, params, grads, moments)
    assert all(np.array_equal(a, b) for a, b in zip(inputs, before, strict=True))
    for a, b in zip(_arrays(once), _arrays(twice), strict=True):
        assert a.tobytes() == b.tobytes()
    again = moments_to_arrays(moments_twice)
    for name, array in moments_to_arrays(moments_once).items():
        assert array.tobytes() == again[name].tobytes()


@ALL
def test_a_first_zero_gradient_moves_nothing_but_decay(
    rng: np.random.Generator, optimizer: Optimizer
) -> None:
    """Without a gradient and without momentum the weights stay, or only decay."""
    params = _params(rng)
    zero = _pack([np.zeros_like(w) for w in params])
    moved, _ = apply_update(optimizer, params, zero, init_moments(optimizer, params))
    kept = 1 - optimizer.lr * optimizer.weight_decay if isinstance(optimizer, AdamW) else 1.0
    for ours, before in zip(_arrays(moved), _arrays(params), strict=True):
        assert np.array_equal(ours, before * kept)


@ALL
def test_moments_survive_a_round_trip(rng: np.random.Generator, optimizer: Optimizer) -> None:
    """Taken apart into named arrays and put together again, they continue alike."""
    params, grads = _params(rng), _grads(rng)
    params, moments = apply_update(optimizer, params, grads, init_moments(optimizer, params))
    arrays = moments_to_arrays(moments)
    names = [f"{slot}.{weight}" for slot in optimizer.slot_names for weight in ("Wx", "Wh", "b")]
    assert list(arrays) == names
    restored = moments_from_arrays(optimizer, moments.step, arrays, params)
    here, _ = apply_update(optimizer, params, grads, moments)
    there, _ = apply_update(optimizer, params, grads, restored)
    assert all(np.array_equal(a, b) for a, b in zip(_arrays(here), _arrays(there), strict=True))


def test_moments_of_another_kind_are_refused(rng: np.random.Generator) -> None:
    """Missing names, wrong shapes and types, and another optimizer's slots raise."""
    params, adam = _params(rng), Adam()
    arrays = moments_to_arrays(init_moments(adam, params))
    with pytest.raises(EngineError, match=r"^arrays: expected the names"):
        moments_from_arrays(Momentum(), 0, arrays, params)
    with pytest.raises(EngineError, match=r"^step:"):
        moments_from_arrays(adam, -1, arrays, params)
    with pytest.raises(ShapeError, match=r"^m\.b:"):
        moments_from_arrays(adam, 0, arrays | {"m.b": np.zeros((1, 4))}, params)
    with pytest.raises(DTypeError, match=r"^v\.Wx:"):
        moments_from_arrays(adam, 0, arrays | {"v.Wx": np.zeros((3, 4), np.float32)}, params)
    with pytest.raises(EngineError, match=r"^moments: expected the slots"):
        apply_update(adam, params, _grads(rng), init_moments(SGD(), params))


def test_gradients_of_another_shape_or_type_are_refused(rng: np.random.Generator) -> None:
    """What only broadcasting or rounding could fit is refused by name."""
    params, grads = _params(rng), _grads(rng)
    moments = init_moments(SGD(), params)
    with pytest.raises(ShapeError, match=r"^dWx:"):
        apply_update(
            SGD(), params, TanhNetwork(2, 4).weight_spec.pack([grads[0][:2], *grads[1:]]), moments
        )
    with pytest.raises(DTypeError, match=r"^dWx: expected dtype float64"):
        apply_update(SGD(), params, _grads(rng, np.float32), moments)


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_senseless_learning_rate_is_refused(kind: type[Optimizer], value: float) -> None:
    """Negative and non-finite hyperparameters are refused by name."""
    with pytest.raises(EngineError, match=r"^lr: expected 0 <= number"):
        kind(lr=value)


def test_a_beta_of_one_is_refused() -> None:
    """A mean that never forgets could not be corrected for its start at zero."""
    with pytest.raises(EngineError, match=r"^beta2: expected 0 <= number < 1"):
        Adam(beta2=1.0)


def test_every_hyperparameter_has_a_default() -> None:
    """Each kind can be made without arguments, and `lr` is its first field."""
    for kind in OPTIMIZERS:
        assert fields(kind)[0].name == "lr"
        assert kind().lr > 0
