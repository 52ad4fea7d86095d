"""Between ModelService's messages and the domain's values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from rnn_engine import (
    EngineError,
    Params,
    TanhNetwork,
)
from service.domain.errors import bad_tensor
from service.domain.rules import OPTIMIZERS, make_optimizer, optimizer_kind
from service.domain.types import InitialWeights, ModelSpec
from service.rpc.fields import version_from_proto
from service.rpc.tensors import (
    dtype_from_proto,
    dtype_to_proto,
    required_tensor,
    version_to_proto,
)
from timernn.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rnn_engine import Network, Optimizer
    from service.domain.rules import InputRules
    from service.domain.types import Checkpoint, ModelView, Version


def spec_from_proto(spec: pb.ModelSpec) -> ModelSpec:
    """Return what a new model is, with every default filled in."""
    return ModelSpec(
        spec.model_id,
        network_from_proto(spec),
        dtype_from_proto("spec.dtype", spec.dtype),
        optimizer_from_proto(spec.optimizer),
    )


def spec_to_proto(spec: ModelSpec) -> pb.ModelSpec:
    """Return what a model is as a message."""
    return pb.ModelSpec(
        model_id=spec.model_id,
        dtype=dtype_to_proto(spec.dtype),
        optimizer=optimizer_to_proto(spec.optimizer),
        **network_to_proto(spec.network),
    )


def network_from_proto(spec: pb.ModelSpec) -> Network:
    """Return the network that a specification asks for."""
    return TanhNetwork(spec.input_size, spec.hidden_size)


def network_to_proto(network: Network) -> dict[str, int]:
    """Return the fields of a specification that say what its network is."""
    if not isinstance(network, TanhNetwork):
        raise TypeError(f"expected a network that the contract knows, got {network!r}")
    return {"input_size": network.input_size, "hidden_size": network.hidden_size}


def initial_weights_from_proto(request: pb.CreateModelRequest, rules: InputRules) -> InitialWeights:
    """Return where a new model's weights come from."""
    if request.WhichOneof("weights") != "given":
        return InitialWeights(seed=request.seed)
    return InitialWeights(given=_params_from_proto(request.given, rules))


def optional_version(request: pb.GetWeightsRequest | pb.CreateCheckpointRequest) -> Version | None:
    """Return the version that a request names, if it does."""
    return version_from_proto(request.version) if request.HasField("version") else None


def expected_version(
    request: pb.PutWeightsHeader | pb.RestoreCheckpointRequest,
) -> Version | None:
    """Return the head that a request expects, if it does."""
    if not request.HasField("expected_version"):
        return None
    return version_from_proto(request.expected_version)


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
    message = getattr(optimizer, kind)
    return make_optimizer(kind, {field.name: value for field, value in message.ListFields()})


def optimizer_to_proto(optimizer: Optimizer) -> pb.Optimizer:
    """Return an optimizer as a message with all its hyperparameters."""
    kind = optimizer_kind(optimizer)
    message = pb.Optimizer()
    for name in OPTIMIZERS[kind][1]:
        setattr(getattr(message, kind), name, getattr(optimizer, name))
    return message


def _params_from_proto(given: pb.GivenWeights, rules: InputRules) -> Params:
    wx = given.wx if given.HasField("wx") else None
    wh = given.wh if given.HasField("wh") else None
    b = given.b if given.HasField("b") else None
    try:
        return Params(
            required_tensor("given.wx", wx, rules.wx),
            required_tensor("given.wh", wh, rules.wh),
            required_tensor("given.b", b, rules.b),
        )
    except EngineError as error:
        raise bad_tensor("given", str(error)) from error
