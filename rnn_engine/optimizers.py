"""Optimizers as pure functions: (params, grads, moments) -> (params, moments).

Formulas and defaults are torch.optim's. Every operation is element-wise in the type of the weights, so
equal inputs give equal bits wherever they are computed.

| optimizer | slots | step, with g the gradient and k the number of the step, from 1 |
| --- | --- | --- |
| SGD | - | p -= lr g |
| Momentum | v | v = momentum v + g; p -= lr v |
| Nesterov | v | v = momentum v + g; p -= lr (g + momentum v) |
| AdaGrad | s | s += g^2; p -= lr g / (sqrt(s) + eps) |
| RMSprop | s | s = alpha s + (1 - alpha) g^2; p -= lr g / (sqrt(s) + eps) |
| Adam | m, v | m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; m' = m / (1 - beta1^k); |
| | | v' = v / (1 - beta2^k); p -= lr m' / (sqrt(v') + eps) |
| AdamW | m, v | p *= 1 - lr weight_decay, then as Adam |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import numpy as np

from rnn_engine.errors import DTypeError, EngineError, ShapeError
from rnn_engine.params import Array, Params

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rnn_engine.params import Grads

Stepped: TypeAlias = tuple[Array, tuple[Array, ...]]
"""One weight array after a step, and its slots."""


class _Rule:
    """Hyperparameters that are Python numbers: NumPy's would widen float32 weights."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Convert each hyperparameter and refuse what no step can be made with.

        Raises:
            EngineError: If one is negative or not finite, or beta1 or beta2 is not below 1.
        """
        for field in fields(cast("Any", self)):
            value = float(getattr(self, field.name))
            limit = 1.0 if field.name.startswith("beta") else math.inf
            if not 0 <= value < limit:
                raise EngineError(f"{field.name}: expected 0 <= number < {limit}, got {value}")
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True, slots=True)
class SGD(_Rule):
    """Plain gradient descent.

    Attributes:
        lr: Learning rate.
    """

    lr: float = 1e-3
    slot_names: ClassVar[tuple[str, ...]] = ()

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        del step
        return p - self.lr * g, slots


@dataclass(frozen=True, slots=True)
class Momentum(_Rule):
    """Gradient descent with a velocity.

    Attributes:
        lr: Learning rate.
        momentum: Part of the velocity that is kept each step.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    slot_names: ClassVar[tuple[str, ...]] = ("v",)

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        del step
        v = self.momentum * slots[0] + g
        return p - self.lr * v, (v,)


@dataclass(frozen=True, slots=True)
class Nesterov(_Rule):
    """Momentum that looks one step ahead.

    Attributes:
        lr: Learning rate.
        momentum: Part of the velocity that is kept each step.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    slot_names: ClassVar[tuple[str, ...]] = ("v",)

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        del step
        v = self.momentum * slots[0] + g
        return p - self.lr * (g + self.momentum * v), (v,)


@dataclass(frozen=True, slots=True)
class AdaGrad(_Rule):
    """Steps divided by the root of all squared gradients so far.

    Attributes:
        lr: Learning rate.
        eps: Added to the divisor.
    """

    lr: float = 1e-2
    eps: float = 1e-10
    slot_names: ClassVar[tuple[str, ...]] = ("s",)

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        del step
        s = slots[0] + g * g
        return p - self.lr * g / (np.sqrt(s) + self.eps), (s,)


@dataclass(frozen=True, slots=True)
class RMSprop(_Rule):
    """Steps divided by the root of a moving mean of squared gradients.

    Attributes:
        lr: Learning rate.
        alpha: Part of the mean that is kept each step.
        eps: Added to the divisor.
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    slot_names: ClassVar[tuple[str, ...]] = ("s",)

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        del step
        s = self.alpha * slots[0] + (1 - self.alpha) * (g * g)
        return p - self.lr * g / (np.sqrt(s) + self.eps), (s,)


@dataclass(frozen=True, slots=True)
class Adam(_Rule):
    """Adaptive moments (Kingma and Ba, arXiv:1412.6980).

    Attributes:
        lr: Learning rate.
        beta1: Part of the mean gradient that is kept each step.
        beta2: Part of the mean squared gradient that is kept each step.
        eps: Added to the divisor.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    slot_names: ClassVar[tuple[str, ...]] = ("m", "v")

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        m = self.beta1 * slots[0] + (1 - self.beta1) * g
        v = self.beta2 * slots[1] + (1 - self.beta2) * (g * g)
        # The corrections for the start at zero are numbers: folded into the two scalars.
        rate = self.lr / (1 - self.beta1**step)
        root = math.sqrt(1 - self.beta2**step)
        return p - rate * m / (np.sqrt(v) / root + self.eps), (m, v)


@dataclass(frozen=True, slots=True)
class AdamW(_Rule):
    """Adam with weight decay apart from the gradient (arXiv:1711.05101).

    Attributes:
        lr: Learning rate.
        beta1: Part of the mean gradient that is kept each step.
        beta2: Part of the mean squared gradient that is kept each step.
        eps: Added to the divisor.
        weight_decay: Part of the weights, times lr, that is taken off each step.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    slot_names: ClassVar[tuple[str, ...]] = ("m", "v")

    def step_array(self, p: Array, g: Array, slots: tuple[Array, ...], step: int) -> Stepped:
        """Move one array of weights by one step."""
        adam = Adam(self.lr, self.beta1, self.beta2, self.eps)
        return adam.step_array(p * (1 - self.lr * self.weight_decay), g, slots, step)


Optimizer: TypeAlias = SGD | Momentum | Nesterov | AdaGrad | RMSprop | Adam | AdamW

OPTIMIZERS: tuple[type[Optimizer], ...] = (SGD, Momentum, Nesterov, AdaGrad, RMSprop, Adam, AdamW)
"""All optimizers, in the order of the table above."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One running quantity of an optimizer, with an array for each array of the weights.

    Attributes:
        name: Its letter in the table of optimizers.
        Wx: Shape (D, H), dtype of the weights.
        Wh: Shape (H, H).
        b: Shape (H,).
    """

    name: str
    Wx: Array
    Wh: Array
    b: Array


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What an optimizer remembers between two steps.

    Attributes:
        step: How many steps have been made.
        slots: The running quantities, in the optimizer's order.
    """

    step: int
    slots: tuple[Slot, ...]


def init_moments(optimizer: Optimizer, params: Params) -> Moments:
    """Return the moments before the first step: all zero."""
    zeros = (
        Slot(name, np.zeros_like(params.Wx), np.zeros_like(params.Wh), np.zeros_like(params.b))
        for name in optimizer.slot_names
    )
    return Moments(0, tuple(zeros))


def apply_update(
    optimizer: Optimizer, params: Params, grads: Grads, moments: Moments
) -> tuple[Params, Moments]:
    """Make one step; nothing that goes in is changed.

    Args:
        optimizer: Which rule, with its hyperparameters.
        params: The weights before the step.
        grads: Their gradients, of the same shapes and type.
        moments: From `init_moments`, or from the step before.

    Returns:
        The weights and the moments after the step, in the type of the weights.

    Raises:
        ShapeError: If the gradients do not have the weights' shapes.
        DTypeError: If the gradients do not have the weights' type.
        EngineError: If the moments belong to another optimizer.
    """
    _check_update(optimizer, params, grads, moments)
    step = moments.step + 1
    slots = moments.slots
    Wx, slots_Wx = optimizer.step_array(params.Wx, grads.dWx, tuple(s.Wx for s in slots), step)
    Wh, slots_Wh = optimizer.step_array(params.Wh, grads.dWh, tuple(s.Wh for s in slots), step)
    b, slots_b = optimizer.step_array(params.b, grads.db, tuple(s.b for s in slots), step)
    stepped = map(Slot, optimizer.slot_names, slots_Wx, slots_Wh, slots_b)
    return Params(Wx, Wh, b), Moments(step, tuple(stepped))


def moments_to_arrays(moments: Moments) -> dict[str, Array]:
    """Return all arrays under stable names such as "m.Wx", in order."""
    arrays: dict[str, Array] = {}
    for slot in moments.slots:
        arrays |= {f"{slot.name}.Wx": slot.Wx, f"{slot.name}.Wh": slot.Wh, f"{slot.name}.b": slot.b}
    return arrays


def moments_from_arrays(
    optimizer: Optimizer, step: int, arrays: Mapping[str, Array], params: Params
) -> Moments:
    """Put moments together again from what `moments_to_arrays` returned.

    Args:
        optimizer: The rule whose moments they are.
        step: How many steps had been made.
        arrays: Exactly the names that the optimizer has.
        params: Weights of the same shapes and type.

    Raises:
        EngineError: If step is negative or a name is missing or unknown.
        ShapeError: If an array does not have its weights' shape.
        DTypeError: If an array does not have the weights' type.
    """
    if step < 0:
        raise EngineError(f"step: expected a number >= 0, got {step}")
    expected = [f"{slot}.{weight}" for slot in optimizer.slot_names for weight in ("Wx", "Wh", "b")]
    if set(arrays) != set(expected):
        raise EngineError(f"arrays: expected the names {expected}, got {list(arrays)}")
    slots = []
    for name in optimizer.slot_names:
        Wx, Wh, b = (arrays[f"{name}.{weight}"] for weight in ("Wx", "Wh", "b"))
        _check_like(f"{name}.Wx", Wx, params.Wx)
        _check_like(f"{name}.Wh", Wh, params.Wh)
        _check_like(f"{name}.b", b, params.b)
        slots.append(Slot(name, Wx, Wh, b))
    return Moments(step, tuple(slots))


def _check_update(optimizer: Optimizer, params: Params, grads: Grads, moments: Moments) -> None:
    _check_like("dWx", grads.dWx, params.Wx)
    _check_like("dWh", grads.dWh, params.Wh)
    _check_like("db", grads.db, params.b)
    names = tuple(slot.name for slot in moments.slots)
    if names != optimizer.slot_names:
        raise EngineError(f"moments: expected the slots {optimizer.slot_names}, got {names}")
    if moments.slots:
        _check_like("moments", moments.slots[0].Wx, params.Wx)


def _check_like(name: str, array: Array, weight: Array) -> None:
    if array.shape != weight.shape:
        raise ShapeError(name, str(weight.shape), array.shape)
    if array.dtype != weight.dtype:
        raise DTypeError(name, f"{weight.dtype} like the weights", array.dtype)
