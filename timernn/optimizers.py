"""The optimizers that a model can have; a value left out is the server's default."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from timernn.v1 import model_service_pb2 as model_pb

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "RMSprop",
]


class _Hyperparameters:
    """What the optimizers share: the values that were given, and a repr of these alone."""

    __slots__ = ()

    def given(self) -> dict[str, float]:
        """Return the hyperparameters that are not left to the server, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(cast("Any", self))}
        return {name: value for name, value in values.items() if value is not None}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.given().items())
        return f"{type(self).__name__}({given})"


@dataclass(frozen=True, slots=True, repr=False)
class SGD(_Hyperparameters):
    """Plain gradient descent: learning rate (0.001)."""

    KIND: ClassVar[str] = "sgd"
    lr: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Momentum(_Hyperparameters):
    """Gradient descent with momentum: learning rate (0.001), momentum factor (0.9)."""

    KIND: ClassVar[str] = "momentum"
    lr: float | None = None
    momentum: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Nesterov(_Hyperparameters):
    """Gradient descent with Nesterov's momentum: learning rate (0.001), factor (0.9)."""

    KIND: ClassVar[str] = "nesterov"
    lr: float | None = None
    momentum: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class AdaGrad(_Hyperparameters):
    """AdaGrad: learning rate (0.01), eps in the denominator (1e-10)."""

    KIND: ClassVar[str] = "ada_grad"
    lr: float | None = None
    eps: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class RMSprop(_Hyperparameters):
    """RMSprop: learning rate (0.01), smoothing factor (0.99), eps (1e-8)."""

    KIND: ClassVar[str] = "rms_prop"
    lr: float | None = None
    alpha: float | None = None
    eps: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Adam(_Hyperparameters):
    """Adam: learning rate (0.001), decays of the moments (0.9, 0.999), eps (1e-8)."""

    KIND: ClassVar[str] = "adam"
    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class AdamW(_Hyperparameters):
    """Adam with decoupled weight decay: learning rate, decays and eps of Adam, weight decay.

    The defaults are (0.001), (0.9, 0.999), (1e-8) and (0.01).
    """

    KIND: ClassVar[str] = "adam_w"
    lr: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None


Optimizer = SGD | Momentum | Nesterov | AdaGrad | RMSprop | Adam | AdamW

KINDS: dict[str, type[Optimizer]] = {
    kind.KIND: kind for kind in (SGD, Momentum, Nesterov, AdaGrad, RMSprop, Adam, AdamW)
}


def optimizer_to_proto(optimizer: Optimizer) -> model_pb.Optimizer:
    """Write an optimizer as the contract's message."""
    message = model_pb.Optimizer()
    part = getattr(message, optimizer.KIND)
    part.SetInParent()
    for name, value in optimizer.given().items():
        setattr(part, name, float(value))
    return message


def optimizer_from_proto(message: model_pb.Optimizer) -> Optimizer:
    """Read the contract's message; plain gradient descent when nothing is set."""
    name = message.WhichOneof("kind")
    if name is None:
        return SGD()
    part, kind = getattr(message, name), KINDS[name]
    given = {f.name: getattr(part, f.name) for f in fields(kind) if part.HasField(f.name)}
    return kind(**given)
