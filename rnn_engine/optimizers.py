"""Optimizers as pure functions: (params, grads, moments) -> (params, moments).

Formulas and defaults are torch.optim's. Every operation is element-wise in the type of the weights, so
equal inputs give equal bits wherever they are computed, and however the weights are cut: a step goes once
through the buffers of weights, gradients and slots, in slices that stay in the cache.

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
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, cast

import numpy as np

from rnn_engine.arrays import Arrays, aligned_empty, check_alike, check_like, slices
from rnn_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rnn_engine.arrays import Array, Grads, Weights

WeightsT = TypeVar("WeightsT", bound=Arrays)

Parts: TypeAlias = "Sequence[Array]"
"""The same slice of the weights and of each slot, in this order."""


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        del step
        (p,), (p_new,) = old, new
        np.subtract(p, self.lr * g, p_new)


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        del step
        (p, v), (p_new, v_new) = old, new
        np.multiply(v, self.momentum, v_new)
        v_new += g
        np.subtract(p, self.lr * v_new, p_new)


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        del step
        (p, v), (p_new, v_new) = old, new
        np.multiply(v, self.momentum, v_new)
        v_new += g
        np.subtract(p, self.lr * (g + self.momentum * v_new), p_new)


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        del step
        (p, s), (p_new, s_new) = old, new
        np.add(s, g * g, s_new)
        np.subtract(p, self.lr * g / (np.sqrt(s_new) + self.eps), p_new)


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        del step
        (p, s), (p_new, s_new) = old, new
        np.multiply(s, self.alpha, s_new)
        s_new += (1 - self.alpha) * (g * g)
        np.subtract(p, self.lr * g / (np.sqrt(s_new) + self.eps), p_new)


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        (p, m, v), (p_new, m_new, v_new) = old, new
        np.multiply(m, self.beta1, m_new)
        m_new += (1 - self.beta1) * g
        np.multiply(v, self.beta2, v_new)
        v_new += (1 - self.beta2) * (g * g)
        # The corrections for the start at zero are numbers: folded into the two scalars.
        rate = self.lr / (1 - self.beta1**step)
        root = math.sqrt(1 - self.beta2**step)
        np.subtract(p, rate * m_new / (np.sqrt(v_new) / root + self.eps), p_new)


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

    def step_slice(self, old: Parts, g: Array, new: Parts, *, step: int) -> None:
        """Write weights and slots after one step."""
        np.multiply(old[0], 1 - self.lr * self.weight_decay, new[0])
        adam = Adam(self.lr, self.beta1, self.beta2, self.eps)
        adam.step_slice((new[0], *old[1:]), g, new, step=step)


Optimizer: TypeAlias = SGD | Momentum | Nesterov | AdaGrad | RMSprop | Adam | AdamW

OPTIMIZERS: tuple[type[Optimizer], ...] = (SGD, Momentum, Nesterov, AdaGrad, RMSprop, Adam, AdamW)
"""All optimizers, in the order of the table above."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One running quantity of an optimizer, with an array for each array of the weights.

    Attributes:
        name: Its letter in the table of optimizers.
        arrays: Of the weights' specification and type.
    """

    name: str
    arrays: Arrays


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """What an optimizer remembers between two steps.

    Attributes:
        step: How many steps have been made.
        slots: The running quantities, in the optimizer's order.
    """

    step: int
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all slots."""
        return sum(slot.arrays.nbytes for slot in self.slots)


def init_moments(optimizer: Optimizer, weights: Weights) -> Moments:
    """Return the moments before the first step: all zero."""
    spec, buffer = weights.spec, weights.buffer
    slots = (Slot(name, spec.view(np.zeros_like(buffer))) for name in optimizer.slot_names)
    return Moments(0, tuple(slots))


def apply_update(
    optimizer: Optimizer, weights: WeightsT, grads: Grads, moments: Moments
) -> tuple[WeightsT, Moments]:
    """Make one step; nothing that goes in is changed.

    Args:
        optimizer: Which rule, with its hyperparameters.
        weights: The weights before the step.
        grads: Their gradients, of the same specification and type.
        moments: From `init_moments`, or from the step before.

    Returns:
        The weights and the moments after the step, in the type of the weights.

    Raises:
        ShapeError: If the gradients do not have the weights' shapes.
        DTypeError: If the gradients do not have the weights' type.
        EngineError: If the moments belong to another optimizer.
    """
    _check_update(optimizer, weights, grads, moments)
    step = moments.step + 1
    old = [weights.buffer, *(slot.arrays.buffer for slot in moments.slots)]
    new = [aligned_empty(buffer.size, buffer.dtype) for buffer in old]
    for place in slices(weights.buffer):
        optimizer.step_slice(
            [buffer[place] for buffer in old],
            grads.buffer[place],
            [buffer[place] for buffer in new],
            step=step,
        )
    stepped = (
        Slot(slot.name, slot.arrays.like(buffer))
        for slot, buffer in zip(moments.slots, new[1:], strict=True)
    )
    return weights.like(new[0]), Moments(step, tuple(stepped))


def moments_to_arrays(moments: Moments) -> dict[str, Array]:
    """Return all arrays under stable names such as "m.Wx", in order."""
    return {
        f"{slot.name}.{name}": array
        for slot in moments.slots
        for name, array in slot.arrays.named().items()
    }


def moments_from_arrays(
    optimizer: Optimizer, step: int, arrays: Mapping[str, Array], weights: Weights
) -> Moments:
    """Put moments together again from what `moments_to_arrays` returned.

    Args:
        optimizer: The rule whose moments they are.
        step: How many steps had been made.
        arrays: Exactly the names that the optimizer has; copied.
        weights: Weights of the same shapes and type.

    Raises:
        EngineError: If step is negative or a name is missing or unknown.
        ShapeError: If an array does not have its weights' shape.
        DTypeError: If an array does not have the weights' type.
    """
    if step < 0:
        raise EngineError(f"step: expected a number >= 0, got {step}")
    names = weights.spec.names
    expected = [f"{slot}.{name}" for slot in optimizer.slot_names for name in names]
    if set(arrays) != set(expected):
        raise EngineError(f"arrays: expected the names {expected}, got {list(arrays)}")
    for slot in optimizer.slot_names:
        for name, weight in zip(names, weights, strict=True):
            check_like(f"{slot}.{name}", arrays[f"{slot}.{name}"], weight)
    slots = (
        Slot(slot, weights.spec.pack([arrays[f"{slot}.{name}"] for name in names]))
        for slot in optimizer.slot_names
    )
    return Moments(step, tuple(slots))


def _check_update(optimizer: Optimizer, weights: Weights, grads: Grads, moments: Moments) -> None:
    check_alike("d", grads, weights)
    names = tuple(slot.name for slot in moments.slots)
    if names != optimizer.slot_names:
        raise EngineError(f"moments: expected the slots {optimizer.slot_names}, got {names}")
    for slot in moments.slots:
        check_alike(f"{slot.name}.", slot.arrays, weights)
