"""Between the contract's messages and the library's values."""

from __future__ import annotations

import math
import sys
from datetime import UTC, timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from google.protobuf.duration_pb2 import Duration

from timernn import errors
from timernn.optimizers import optimizer_from_proto
from timernn.types import (
    CheckpointInfo,
    Gradients,
    ModelInfo,
    ServerInfo,
    SessionInfo,
    UpdateResult,
    Version,
    Waiting,
)
from timernn.v1 import tensor_pb2 as tensor_pb
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from timernn.types import (
        Array,
        Contributions,
    )
    from timernn.v1 import model_service_pb2 as model_pb
    from timernn.v1 import session_service_pb2 as session_pb

DTypeName = Literal["float32", "float64"]
_TO_WIRE: dict[np.dtype[Any], tensor_pb.DType.ValueType] = {
    np.dtype("<f4"): tensor_pb.D_TYPE_FLOAT32,
    np.dtype("<f8"): tensor_pb.D_TYPE_FLOAT64,
}
_REDUCTIONS: dict[str, rnn_pb.Reduction.ValueType] = {
    "sum": rnn_pb.REDUCTION_SUM,
    "mean": rnn_pb.REDUCTION_MEAN,
}
_FROM_WIRE = {wire: dtype for dtype, wire in _TO_WIRE.items()}


def array_from_caller(
    value: npt.ArrayLike, name: str, *, dtype: DTypeName, shape: tuple[int | None, ...]
) -> Array:
    """Take what the caller gave as an array of the model's dtype.

    Args:
        value: Anything NumPy can read: arrays of any real type, nested lists.
        name: What the message calls it.
        dtype: The model's; other real types are cast to it.
        shape: The sizes demanded; None where any size of at least 1 will do.

    Raises:
        NonFinite: If a finite value is too large for that dtype.
        BadTensor: If it is not numeric, masks an element, or has another number of dimensions or
            another size.
    """
    if _masks_anything(value):
        raise errors.BadTensor(
            f"{name}: expected every element, got a masked array; filled() chooses values for them"
        )
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise errors.BadTensor(f"{name}: expected real numbers, got dtype {array.dtype}")
        if array.dtype != dtype:
            with np.errstate(over="raise"):
                array = array.astype(dtype)
    except FloatingPointError:
        raise errors.NonFinite(f"{name}: holds a value that is too large for {dtype}") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, errors.BadTensor):
            raise
        raise errors.BadTensor(f"{name}: expected an array, got {type(value).__name__}") from error
    if len(array.shape) == len(shape):
        for have, size in zip(array.shape, shape, strict=True):
            if have != size if size is not None else not have:
                break
        else:
            return array
    text = ", ".join("?" if size is None else str(size) for size in shape)
    raise errors.BadTensor(f"{name}.shape: expected ({text}), got {array.shape}")


def copy_of_caller(value: npt.ArrayLike) -> npt.ArrayLike:
    """Copy an array that the caller may fill anew before it is sent.

    What `array_from_caller` refuses is returned as it is, so that it is refused in its turn.
    """
    if _masks_anything(value):
        return value
    try:
        return np.array(value)
    except (TypeError, ValueError):
        return value


def _masks_anything(value: object) -> bool:
    """Return whether a masked array, or a list that holds one, masks an element.

    `np.asarray` drops the mask, and whatever lies under it would become data.
    """
    # Not np.ma, which is imported at its first use: an interrupt of an import leaves Python's lock of that
    # module held, and other threads wait for it for ever. Before it is imported there are none.
    ma: Any = sys.modules.get("numpy.ma")
    if isinstance(value, getattr(ma, "MaskedArray", ())):
        return bool(ma.is_masked(value))
    return isinstance(value, list | tuple) and any(map(_masks_anything, value))


def tensor_to_proto(array: Array) -> tensor_pb.Tensor:
    """Write a float32 or float64 array; one copy, in C order."""
    dtype = array.dtype.newbyteorder("<")
    return tensor_pb.Tensor(
        dtype=_TO_WIRE[dtype],
        shape=array.shape,
        data=array.astype(dtype, copy=False).tobytes(),
    )


def tensor_from_proto(tensor: tensor_pb.Tensor) -> Array:
    """Read a tensor as an array of its own memory, so that the caller may write into it."""
    dtype, shape = _FROM_WIRE[tensor.dtype], tuple(tensor.shape)
    if len(tensor.data) != math.prod(shape) * dtype.itemsize:
        raise errors.Internal(f"the answer's tensor has {len(tensor.data)} bytes for shape {shape}")
    return np.frombuffer(tensor.data, dtype).reshape(shape).copy()


def join_steps(
    pieces: Sequence[Array], shape_of_none: tuple[int, int, int], dtype: DTypeName
) -> Array:
    """Join arrays along T; with no pieces, an array of no steps."""
    if not pieces:
        return np.empty(shape_of_none, dtype)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def version_from_proto(message: tensor_pb.WeightsVersion) -> Version:
    """Read a version's name."""
    return Version(message.number, message.digest)


def version_to_proto(version: Version) -> tensor_pb.WeightsVersion:
    """Write a version's name."""
    return tensor_pb.WeightsVersion(number=version.number, digest=version.digest)


def duration_to_proto(span: float | timedelta) -> Duration:
    """Write a span given in seconds or as a timedelta."""
    message = Duration()
    message.FromTimedelta(span if isinstance(span, timedelta) else timedelta(seconds=span))
    return message


def gradients_from_proto(message: rnn_pb.Gradients) -> Gradients:
    """Read the gradients of the weights."""
    return Gradients(
        dWx=tensor_from_proto(message.dwx),
        dWh=tensor_from_proto(message.dwh),
        db=tensor_from_proto(message.db),
    )


def reduction_to_proto(reduction: str) -> rnn_pb.Reduction.ValueType:
    """Write how contributions are joined."""
    if reduction not in _REDUCTIONS:
        raise errors.BadField(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    return _REDUCTIONS[reduction]


def selectors_to_proto(named: Iterable[Contributions]) -> list[rnn_pb.ContributionSelector]:
    """Write the names of contributions."""
    return [
        rnn_pb.ContributionSelector(session_id=c.session_id, epoch=c.epoch, chunk_seqs=c.chunk_seqs)
        for c in named
    ]


def update_from_proto(message: rnn_pb.UpdateResponse) -> UpdateResult:
    """Read what a step did."""
    return UpdateResult(
        version=version_from_proto(message.version),
        gradient_norm=message.gradient_norm,
        clipped=message.clipped,
        contribution_count=message.contribution_count,
    )


def model_from_proto(message: model_pb.Model) -> ModelInfo:
    """Read a model."""
    spec = message.spec
    is_double = spec.dtype == tensor_pb.D_TYPE_FLOAT64
    return ModelInfo(
        model_id=spec.model_id,
        input_size=spec.input_size,
        hidden_size=spec.hidden_size,
        dtype="float64" if is_double else "float32",
        optimizer=optimizer_from_proto(spec.optimizer),
        head=version_from_proto(message.head),
        incarnation=message.incarnation,
        create_time=message.create_time.ToDatetime(UTC),
        waiting_contribution_count=message.waiting_contribution_count,
        waiting_contribution_bytes=message.waiting_contribution_bytes,
    )


def session_from_proto(message: session_pb.Session) -> SessionInfo:
    """Read a session."""
    used = message.HasField("weights_version")
    return SessionInfo(
        session_id=message.session_id,
        model_id=message.model_id,
        epoch=message.epoch,
        chunk_seq=message.chunk_seq,
        state_token=message.state_token,
        batch_size=message.batch_size,
        ttl=message.ttl.ToTimedelta(),
        expire_time=message.expire_time.ToDatetime(UTC),
        version=version_from_proto(message.weights_version) if used else None,
    )


def waiting_from_proto(message: rnn_pb.ListWaitingResponse) -> list[Waiting]:
    """Read what waits of a session, in order of the chunks."""
    found = [
        Waiting(tape.epoch, tape.chunk_seq, "tape", tape.state_token) for tape in message.tapes
    ]
    found += [
        Waiting(named.epoch, chunk_seq, "contribution")
        for named in message.contributions
        for chunk_seq in named.chunk_seqs
    ]
    return sorted(found, key=lambda one: (one.epoch, one.chunk_seq))


def checkpoint_from_proto(message: model_pb.Checkpoint) -> CheckpointInfo:
    """Read a checkpoint."""
    return CheckpointInfo(
        checkpoint_id=message.checkpoint_id,
        version=version_from_proto(message.version),
        create_time=message.create_time.ToDatetime(UTC),
    )


def server_info_from_proto(message: model_pb.GetServerInfoResponse) -> ServerInfo:
    """Read a server's description of itself."""
    limits: dict[str, int | timedelta] = {}
    for field in message.limits.DESCRIPTOR.fields:
        value = getattr(message.limits, field.name)
        limits[field.name] = value.ToTimedelta() if isinstance(value, Duration) else value
    return ServerInfo(
        server_version=message.server_version,
        replica_id=message.replica_id,
        start_time=message.start_time.ToDatetime(UTC),
        durability=message.durability,
        limits=limits,
        server_time=message.server_time.ToDatetime(UTC)
        if message.HasField("server_time")
        else None,
    )
