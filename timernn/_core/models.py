"""Models, their weights and their checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timernn import errors
from timernn._core import arguments, contract
from timernn._core.arguments import checked, checked_with
from timernn._core.convert import (
    array_from_caller,
    checkpoint_from_proto,
    model_from_proto,
    tensor_to_proto,
    version_from_proto,
    version_to_proto,
)
from timernn._core.effects import Download, Upload
from timernn._core.ids import new_request_id
from timernn._core.weights import (
    parts,
    read_file,
    weights_from_file,
    weights_to_file,
    write_file,
)
from timernn.optimizers import optimizer_to_proto
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import tensor_pb2 as tensor_pb

if TYPE_CHECKING:
    import numpy.typing as npt

    from timernn._core.context import ClientContext
    from timernn._core.convert import DTypeName
    from timernn._core.effects import Op
    from timernn._core.known import KnownModels
    from timernn._core.weights import WeightsFile
    from timernn.optimizers import Optimizer
    from timernn.types import (
        CheckpointInfo,
        ModelInfo,
        Version,
        Weights,
    )

_UNARY_BYTES = 15 << 20  # of weights fit a message of 16 MiB; more go in parts
_DTYPES = {"float32": tensor_pb.D_TYPE_FLOAT32, "float64": tensor_pb.D_TYPE_FLOAT64}


class ModelsCore:
    """Every call about models.

    Args:
        context: How calls are made, and where what they answer is noted.
    """

    def __init__(self, context: ClientContext) -> None:
        self._context, self._caller, self._known = context, context.caller, context.known

    # -- models ------------------------------------------------------------------------------------

    @checked
    def create_model(
        self,
        model_id: str,
        *,
        input_size: int,
        hidden_size: int,
        dtype: DTypeName = "float32",
        optimizer: Optimizer | None = None,
        seed: int | None = None,
        Wx: npt.ArrayLike | None = None,
        Wh: npt.ArrayLike | None = None,
        b: npt.ArrayLike | None = None,
        exist_ok: bool = False,
    ) -> Op[ModelInfo]:
        """Create a model with weights drawn from a seed, or given.

        Args:
            model_id: Its name.
            input_size: D.
            hidden_size: H.
            dtype: Element type of weights, states and chunks.
            optimizer: What `update` applies; None: plain gradient descent.
            seed: Draw Wx and Wh from it, b is zero; None: 0, unless weights are given.
            Wx: Input weights, shape (D, H); all three or none.
            Wh: Recurrent weights, shape (H, H).
            b: Bias, shape (H,).
            exist_ok: If there is one of the same sizes, dtype and optimizer, return it as it stands,
                whatever its weights are by now.

        Raises:
            ModelExists: If the name is taken; its message says what is different there.
        """
        spec = _spec(
            model_id,
            input_size=input_size,
            hidden_size=hidden_size,
            dtype=dtype,
            optimizer=optimizer,
        )
        request = model_pb.CreateModelRequest(spec=spec, request_id=new_request_id())
        creating: Op[Any] = self._caller.call(contract.CREATE_MODEL, request)
        if Wx is None and Wh is None and b is None:
            request.seed = 0 if seed is None else seed
        elif Wx is None or Wh is None or b is None or seed is not None:
            raise errors.BadField("weights: expected a seed alone, or all of Wx, Wh and b")
        else:
            D, H = input_size, hidden_size
            arrays = (
                array_from_caller(Wx, "Wx", dtype=dtype, shape=(D, H)),
                array_from_caller(Wh, "Wh", dtype=dtype, shape=(H, H)),
                array_from_caller(b, "b", dtype=dtype, shape=(H,)),
            )
            if sum(array.nbytes for array in arrays) > _UNARY_BYTES:
                creating = self._import(spec, weights_to_file(*arrays), request.request_id)
            else:
                named = (request.given.wx, request.given.wh, request.given.b)
                for message, array in zip(named, arrays, strict=True):
                    message.CopyFrom(tensor_to_proto(array))
        if hidden_size * (input_size + hidden_size) * 4 > _UNARY_BYTES:
            # What answers this is there: the time to make a large model is not the time to connect.
            yield from self._caller.call(contract.GET_SERVER_INFO, model_pb.GetServerInfoRequest())
        try:
            answer = yield from creating
        except errors.ModelExists as error:
            # A server that does not compare says nothing of a difference: then the error stands.
            if not exist_ok or error.metadata.get("difference") != "":
                raise
            return (yield from self._context.read_model(model_id))
        self._known.forget(model_id)
        model = model_from_proto(answer.model)
        self._known.note_model(model)
        return model

    @checked_with(source=arguments.file)
    def import_model(
        self,
        model_id: str,
        source: WeightsFile,
        *,
        input_size: int,
        hidden_size: int,
        dtype: DTypeName = "float32",
        optimizer: Optimizer | None = None,
    ) -> Op[ModelInfo]:
        """Create a model from a safetensors file with Wx, Wh and b; moments in it are kept.

        Args:
            model_id: Its name.
            source: A path, or a file open for reading bytes.
            input_size: D.
            hidden_size: H.
            dtype: Element type of weights, states and chunks.
            optimizer: What `update` applies; None: plain gradient descent.

        Raises:
            ModelExists: If the name is taken.
        """
        spec = _spec(
            model_id,
            input_size=input_size,
            hidden_size=hidden_size,
            dtype=dtype,
            optimizer=optimizer,
        )
        answer = yield from self._import(spec, read_file(source), new_request_id())
        self._known.forget(model_id)
        model = model_from_proto(answer.model)
        self._known.note_model(model)
        return model

    @checked
    def get_model(self, model_id: str) -> Op[ModelInfo]:
        """Return one model as it stands."""
        return (yield from self._context.read_model(model_id))

    @checked
    def models_page(self, page_size: int, page_token: str) -> Op[tuple[list[ModelInfo], str]]:
        """Return a page of models and the token of the next."""
        request = model_pb.ListModelsRequest(page_size=page_size, page_token=page_token)
        answer = yield from self._caller.call(contract.LIST_MODELS, request)
        return [model_from_proto(model) for model in answer.models], answer.next_page_token

    @checked
    def delete_model(self, model_id: str, *, missing_ok: bool = False) -> Op[bool]:
        """Delete a model with its versions and checkpoints; its sessions cannot go on.

        Args:
            model_id: Its name.
            missing_ok: No error if there is none.

        Returns:
            Whether this call deleted it.
        """
        request = model_pb.DeleteModelRequest(model_id=model_id, allow_missing=missing_ok)
        try:
            answer = yield from self._caller.call(contract.DELETE_MODEL, request)
        except errors.ModelNotFound as error:
            if not error.is_outcome_unknown:
                raise
            self._known.forget(model_id)
            return True  # an attempt whose answer was lost has done it
        self._known.forget(model_id)
        return answer.deleted

    # -- weights -----------------------------------------------------------------------------------

    @checked
    def get_weights(
        self, model_id: str, version: Version | None = None, *, include_moments: bool = False
    ) -> Op[Weights]:
        """Fetch a version's weights.

        Args:
            model_id: The model.
            version: Which; None: the head.
            include_moments: The optimizer's state too; head and checkpoints have it.
        """
        data, got = yield from self._download(model_id, version, include_moments=include_moments)
        return weights_from_file(data, got)

    @checked
    def put_weights(
        self,
        model_id: str,
        *,
        Wx: npt.ArrayLike,
        Wh: npt.ArrayLike,
        b: npt.ArrayLike,
        expected_version: Version | None = None,
    ) -> Op[Version]:
        """Make these weights the model's next version; the optimizer starts anew.

        Args:
            model_id: The model.
            Wx: Input weights, shape (D, H).
            Wh: Recurrent weights, shape (H, H).
            b: Bias, shape (H,).
            expected_version: Refuse with VersionConflict unless the head is this one.
        """
        model = yield from self._context.model(model_id)
        D, H, dtype = model.input_size, model.hidden_size, model.dtype
        data = weights_to_file(
            array_from_caller(Wx, "Wx", dtype=dtype, shape=(D, H)),
            array_from_caller(Wh, "Wh", dtype=dtype, shape=(H, H)),
            array_from_caller(b, "b", dtype=dtype, shape=(H,)),
        )
        return (yield from self._upload(model_id, data, expected_version))

    @checked_with(target=arguments.file)
    def export_weights(
        self,
        model_id: str,
        target: WeightsFile,
        *,
        version: Version | None = None,
        include_moments: bool = False,
    ) -> Op[Version]:
        """Write a version's weights to a safetensors file.

        Args:
            model_id: The model.
            target: A path, or a file open for writing bytes.
            version: Which; None: the head.
            include_moments: The optimizer's state too.
        """
        data, got = yield from self._download(model_id, version, include_moments=include_moments)
        write_file(target, data)
        return got

    @checked_with(source=arguments.file)
    def import_weights(
        self, model_id: str, source: WeightsFile, *, expected_version: Version | None = None
    ) -> Op[Version]:
        """Make a safetensors file with Wx, Wh and b the model's next version.

        Args:
            model_id: The model.
            source: A path, or a file open for reading bytes.
            expected_version: Refuse with VersionConflict unless the head is this one.
        """
        return (yield from self._upload(model_id, read_file(source), expected_version))

    @checked
    def create_checkpoint(
        self, model_id: str, checkpoint_id: str, *, version: Version | None = None
    ) -> Op[CheckpointInfo]:
        """Keep a version under a name; None: the head, with the optimizer's state."""
        request = model_pb.CreateCheckpointRequest(
            model_id=model_id, checkpoint_id=checkpoint_id, version=optional(version)
        )
        answer = yield from self._caller.call(contract.CREATE_CHECKPOINT, request)
        return checkpoint_from_proto(answer.checkpoint)

    @checked
    def list_checkpoints(self, model_id: str) -> Op[list[CheckpointInfo]]:
        """Return a model's checkpoints by name."""
        request = model_pb.ListCheckpointsRequest(model_id=model_id)
        answer = yield from self._caller.call(contract.LIST_CHECKPOINTS, request)
        return [checkpoint_from_proto(checkpoint) for checkpoint in answer.checkpoints]

    @checked
    def restore_checkpoint(
        self, model_id: str, checkpoint_id: str, *, expected_version: Version | None = None
    ) -> Op[Version]:
        """Make a checkpoint's weights and moments the model's next version."""
        request = model_pb.RestoreCheckpointRequest(
            model_id=model_id,
            checkpoint_id=checkpoint_id,
            expected_version=optional(expected_version),
            request_id=new_request_id(),
        )
        answer = yield from self._caller.call(contract.RESTORE_CHECKPOINT, request)
        return note_made(self._known, model_id, answer.version)

    @checked
    def delete_checkpoint(
        self, model_id: str, checkpoint_id: str, *, missing_ok: bool = False
    ) -> Op[bool]:
        """Take a checkpoint's name away; returns whether this call did."""
        request = model_pb.DeleteCheckpointRequest(
            model_id=model_id, checkpoint_id=checkpoint_id, allow_missing=missing_ok
        )
        try:
            answer = yield from self._caller.call(contract.DELETE_CHECKPOINT, request)
        except errors.NotFound as error:
            if isinstance(error, errors.ModelNotFound) or not error.is_outcome_unknown:
                raise
            return True  # an attempt whose answer was lost has done it
        return answer.deleted

    # -- inner parts -------------------------------------------------------------------------------

    def _download(
        self, model_id: str, version: Version | None, *, include_moments: bool
    ) -> Op[tuple[bytes, Version]]:
        request = model_pb.GetWeightsRequest(
            model_id=model_id, version=optional(version), include_moments=include_moments
        )
        got = yield from self._caller.attempts(
            lambda address, timeout: Download(contract.GET_WEIGHTS, request, address, timeout)
        )
        data = b"".join(part.data for part in got)
        if not got or got[0].total_bytes != len(data):
            raise errors.Internal(f"the weights came incomplete: {len(data)} bytes")
        found = version_from_proto(got[0].version)
        if version is None:
            self._known.note_version(model_id, found)
        return data, found

    def _import(self, spec: model_pb.ModelSpec, data: bytes, request_id: str) -> Op[Any]:
        """Create a model from a file that goes in parts."""
        header = model_pb.ImportModelHeader(spec=spec, request_id=request_id, total_bytes=len(data))
        requests = [model_pb.ImportModelRequest(header=header)]
        requests += [model_pb.ImportModelRequest(data=part) for part in parts(data)]
        answer = yield from self._caller.attempts(
            lambda address, timeout: Upload(contract.IMPORT_MODEL, requests, address, timeout)
        )
        return answer

    def _upload(self, model_id: str, data: bytes, expected: Version | None) -> Op[Version]:
        header = model_pb.PutWeightsHeader(
            model_id=model_id,
            expected_version=optional(expected),
            request_id=new_request_id(),
            total_bytes=len(data),
        )
        requests = [model_pb.PutWeightsRequest(header=header)]
        requests += [model_pb.PutWeightsRequest(data=part) for part in parts(data)]
        answer: Any = yield from self._caller.attempts(
            lambda address, timeout: Upload(contract.PUT_WEIGHTS, requests, address, timeout)
        )
        return note_made(self._known, model_id, answer.version)


def _spec(
    model_id: str,
    *,
    input_size: int,
    hidden_size: int,
    dtype: DTypeName,
    optimizer: Optimizer | None,
) -> model_pb.ModelSpec:
    return model_pb.ModelSpec(
        model_id=model_id,
        input_size=input_size,
        hidden_size=hidden_size,
        dtype=_DTYPES[dtype],
        optimizer=None if optimizer is None else optimizer_to_proto(optimizer),
    )


def note_made(known: KnownModels, model_id: str, message: tensor_pb.WeightsVersion) -> Version:
    """Note a version that this client has just made."""
    version = version_from_proto(message)
    known.set_version(model_id, version)
    return version


def given(
    value: npt.ArrayLike, name: str, *, dtype: DTypeName, shape: tuple[int, ...]
) -> tensor_pb.Tensor:
    """Write an array of the caller as a tensor of the given dtype and shape."""
    return tensor_to_proto(array_from_caller(value, name, dtype=dtype, shape=shape))


def optional(version: Version | None) -> tensor_pb.WeightsVersion | None:
    """Write a version's name, or nothing."""
    return None if version is None else version_to_proto(version)
