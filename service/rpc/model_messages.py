"""Between ModelService's messages and the domain's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from rnn_engine import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    EngineError,
    Momentum,
    Nesterov,
    Params,
    RMSprop,
)
from service.domain.errors import bad_tensor
from service.domain.types import InitialWeights, ModelSpec
from service.rpc.fields import (
    MAX_LEARNING_RATE,
    check_factor,
    check_id,
    check_number,
    check_positive,
    check_real,
    check_size,
    version_from_proto,
)
from service.rpc.tensors import (
    TensorRule,
    dtype_from_proto,
    dtype_to_proto,
    required_tensor,
    version_to_proto,
)
from timernn.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rnn_engine import Optimizer
    from service.domain.types import Checkpoint, ModelView, Version
    from service.settings import Limits


def spec_from_proto(spec: pb.ModelSpec, limits: Limits) -> ModelSpec:
    """Return what a new model is, with every default filled in, or refuse it."""
    model_id = check_id("spec.model_id", spec.model_id)
    d = check_size("spec.input_size", spec.input_size, limits.input_size)
    h = check_size("spec.hidden_size", spec.hidden_size, limits.hidden_size)
    dtype = dtype_from_proto("spec.dtype", spec.dtype)
    return ModelSpec(model_id, d, h, dtype, optimizer_from_proto(spec.optimizer))


def spec_to_proto(spec: ModelSpec) -> pb.ModelSpec:
    """Return what a model is as a message."""
    return pb.ModelSpec(
        model_id=spec.model_id,
        input_size=spec.input_size,
        hidden_size=spec.hidden_size,
        dtype=dtype_to_proto(spec.dtype),
        optimizer=optimizer_to_proto(spec.optimizer),
    )


def initial_weights_from_proto(request: pb.CreateModelRequest, limits: Limits) -> InitialWeights:
    """Return where a new model's weights come from, or refuse them."""
    if request.WhichOneof("weights") != "given":
        return InitialWeights(seed=check_number("seed", request.seed, 0))
    return InitialWeights(given=_params_from_proto(request.given, limits))


def optional_version(
    name: str, request: pb.GetWeightsRequest | pb.CreateCheckpointRequest
) -> Version | None:
    """Return the version that a request names, if it does."""
    return version_from_proto(name, request.version) if request.HasField("version") else None


def expected_version(
    request: pb.PutWeightsHeader | pb.RestoreCheckpointRequest,
) -> Version | None:
    """Return the head that a request expects, if it does."""
    if not request.HasField("expected_version"):
        return None
    return version_from_proto("expected_version", request.expected_version)


def model_to_proto(view: ModelView) -> pb.Model:
    """Return a model as a message."""
    return pb.Model(
        spec=spec_to_proto(view.spec),
        head=version_to_proto(view.head),
        incarnation=view.incarnation,
        create_time=time_to_proto(view.create_time_ms),
        waiting_contribution_count=view.waiting_count,
        waiting_contribution_bytes=view.waiting_bytes,
    )


def checkpoint_to_proto(checkpoint: Checkpoint) -> pb.Checkpoint:
    """Return a checkpoint as a message."""
    return pb.Checkpoint(
        checkpoint_id=checkpoint.checkpoint_id,
        version=version_to_proto(checkpoint.version),
        create_time=time_to_proto(checkpoint.create_time_ms),
    )


def weights_parts(
    version: Version, data: bytes, part_bytes: int
) -> Iterator[pb.GetWeightsResponse]:
    """Cut a file into messages of at most part_bytes, the first with version and size."""
    for start in range(0, max(1, len(data)), part_bytes):
        part = pb.GetWeightsResponse(data=data[start : start + part_bytes])
        if not start:
            part.version.CopyFrom(version_to_proto(version))
            part.total_bytes = len(data)
        yield part


def time_to_proto(time_ms: int) -> Timestamp:
    """Return ms since 1970 as a message."""
    return Timestamp(seconds=time_ms // 1000, nanos=time_ms % 1000 * 1_000_000)


def optimizer_from_proto(optimizer: pb.Optimizer) -> Optimizer:
    """Return an optimizer with every default filled in, or refuse its hyperparameters."""
    kind = optimizer.WhichOneof("kind") or "sgd"
    engine_class, checks = _OPTIMIZERS[kind]
    message = getattr(optimizer, kind)
    values = {
        name: check(f"optimizer.{kind}.{name}", getattr(message, name))
        for name, check in checks.items()
        if message.HasField(name)
    }
    return engine_class(**values)


def optimizer_to_proto(optimizer: Optimizer) -> pb.Optimizer:
    """Return an optimizer as a message with all its hyperparameters."""
    kind = next(kind for kind, (each, _) in _OPTIMIZERS.items() if each is type(optimizer))
    message = pb.Optimizer()
    for name in _OPTIMIZERS[kind][1]:
        setattr(getattr(message, kind), name, getattr(optimizer, name))
    return message


def _params_from_proto(given: pb.GivenWeights, limits: Limits) -> Params:
    d, h = limits.input_size, limits.hidden_size
    wx = given.wx if given.HasField("wx") else None
    wh = given.wh if given.HasField("wh") else None
    b = given.b if given.HasField("b") else None
    try:
        return Params(
            required_tensor("given.wx", wx, TensorRule("DH", d, h)),
            required_tensor("given.wh", wh, TensorRule("HH", h, h)),
            required_tensor("given.b", b, TensorRule("H", h)),
        )
    except EngineError as error:
        raise bad_tensor("given", str(error)) from error


def _rate(name: str, value: float) -> float:
    return check_real(name, value, 0.0, MAX_LEARNING_RATE)


def _decay(name: str, value: float) -> float:
    return check_real(name, value, 0.0)


_Checks: TypeAlias = "dict[str, Callable[[str, float], float]]"

_ADAM: Final[_Checks] = {
    "lr": _rate,
    "beta1": check_factor,
    "beta2": check_factor,
    "eps": check_positive,
}
_MOMENTUM: Final[_Checks] = {"lr": _rate, "momentum": check_factor}

# Each kind of the message with the engine's class and the check of each hyperparameter. What is not
# set gets the class's own default: the engine is the one place where defaults are decided.
_OPTIMIZERS: Final[dict[str, tuple[type[Optimizer], _Checks]]] = {
    "sgd": (SGD, {"lr": _rate}),
    "momentum": (Momentum, _MOMENTUM),
    "nesterov": (Nesterov, _MOMENTUM),
    "ada_grad": (AdaGrad, {"lr": _rate, "eps": check_positive}),
    "rms_prop": (RMSprop, {"lr": _rate, "alpha": check_factor, "eps": check_positive}),
    "adam": (Adam, _ADAM),
    "adam_w": (AdamW, _ADAM | {"weight_decay": _decay}),
}
