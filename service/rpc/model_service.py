"""timernn.v1.ModelService."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from service.domain.errors import bad_field
from service.domain.rules import check_size
from service.domain.types import ModelKey
from service.rpc.errors import message_too_large
from service.rpc.model_messages import (
    checkpoint_to_proto,
    expected_version,
    initial_weights_from_proto,
    model_to_proto,
    optional_version,
    spec_from_proto,
    time_to_proto,
    weights_parts,
)
from service.rpc.server_info import limits_to_proto
from service.rpc.tensors import version_to_proto
from timernn.v1 import model_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.domain.errors import InvalidArgument
    from service.domain.models import Models
    from service.domain.rules import InputRules
    from service.rpc.gate import RpcCall
    from service.rpc.server_info import ServerInfo

PART_BYTES: Final = 1 << 20
MAX_FILE_BYTES: Final = 1 << 62  # that a header may announce; the model's own limit is less
_OF_OTHER_SIZES: Final = "it is a file of a model of other sizes or dtype"
_PART_OVERHEAD_BYTES: Final = 64  # version, size and the field's own header


@dataclass(frozen=True, slots=True)
class ModelService:
    """Decodes, checks, calls `Models`, encodes."""

    models: Models
    info: ServerInfo
    rules: InputRules

    async def create_model(
        self, tenant: str, request: pb.CreateModelRequest
    ) -> pb.CreateModelResponse:
        """Create a model."""
        spec = spec_from_proto(request.spec)
        weights = initial_weights_from_proto(request, self.rules)
        view, replayed = await self.models.create(
            tenant, spec, weights, request_id=request.request_id
        )
        return pb.CreateModelResponse(model=model_to_proto(view), replayed=replayed)

    async def import_model(
        self, call: RpcCall, requests: AsyncIterator[pb.ImportModelRequest]
    ) -> pb.ImportModelResponse:
        """Create a model from a file."""
        first = await anext(requests, None)
        if first is None or not first.HasField("header"):
            raise _header_required()
        spec = spec_from_proto(first.header.spec)
        request_id, total_bytes = first.header.request_id, first.header.total_bytes
        check_size("total_bytes", total_bytes, MAX_FILE_BYTES)
        limit = self.models.import_limit(call.tenant, spec, request_id)
        if total_bytes > limit:
            raise message_too_large("weights file", total_bytes, limit, advice=_OF_OTHER_SIZES)
        call.share.take_transfer(total_bytes)
        data = await _collect(requests, total_bytes)
        view, replayed = await self.models.import_model(
            call.tenant, spec, data, request_id=request_id
        )
        return pb.ImportModelResponse(model=model_to_proto(view), replayed=replayed)

    async def get_model(self, tenant: str, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """Return one model."""
        view = await self.models.get(ModelKey(tenant, request.model_id))
        return pb.GetModelResponse(model=model_to_proto(view))

    async def list_models(
        self, tenant: str, request: pb.ListModelsRequest
    ) -> pb.ListModelsResponse:
        """Return a page of models."""
        views, next_token = await self.models.list_page(
            tenant, request.page_size, request.page_token
        )
        return pb.ListModelsResponse(models=map(model_to_proto, views), next_page_token=next_token)

    async def delete_model(
        self, tenant: str, request: pb.DeleteModelRequest
    ) -> pb.DeleteModelResponse:
        """Delete a model with all that belongs to it."""
        deleted = await self.models.delete(
            ModelKey(tenant, request.model_id), allow_missing=request.allow_missing
        )
        return pb.DeleteModelResponse(deleted=deleted)

    async def get_weights(
        self, call: RpcCall, request: pb.GetWeightsRequest
    ) -> AsyncIterator[pb.GetWeightsResponse]:
        """Yield one version's file in parts."""
        version, data = await self.models.read_weights(
            ModelKey(call.tenant, request.model_id),
            optional_version(request),
            include_moments=request.include_moments,
        )
        call.share.take_transfer(len(data))
        part_bytes = min(PART_BYTES, self.info.limits.message_bytes - _PART_OVERHEAD_BYTES)
        for part in weights_parts(version, data, part_bytes):
            yield part

    async def put_weights(
        self, call: RpcCall, requests: AsyncIterator[pb.PutWeightsRequest]
    ) -> pb.PutWeightsResponse:
        """Make a file the model's next version."""
        header = await _header(requests)
        key, request_id = ModelKey(call.tenant, header.model_id), header.request_id
        expected, total_bytes = expected_version(header), header.total_bytes
        check_size("total_bytes", total_bytes, MAX_FILE_BYTES)
        limit = await self.models.upload_limit(key, expected, request_id)
        if total_bytes > limit:
            raise message_too_large("weights file", total_bytes, limit, advice=_OF_OTHER_SIZES)
        call.share.take_transfer(total_bytes)
        data = await _collect(requests, total_bytes)
        version, replayed = await self.models.put_weights(
            key, data, expected=expected, request_id=request_id
        )
        return pb.PutWeightsResponse(version=version_to_proto(version), replayed=replayed)

    async def find_versions(
        self, tenant: str, request: pb.FindVersionsRequest
    ) -> pb.FindVersionsResponse:
        """Return the head and which of some versions are kept."""
        head, kept = await self.models.find_versions(
            ModelKey(tenant, request.model_id), request.numbers
        )
        return pb.FindVersionsResponse(
            head=version_to_proto(head), versions=map(version_to_proto, kept)
        )

    async def create_checkpoint(
        self, tenant: str, request: pb.CreateCheckpointRequest
    ) -> pb.CreateCheckpointResponse:
        """Keep a version under a name."""
        checkpoint = await self.models.create_checkpoint(
            ModelKey(tenant, request.model_id),
            request.checkpoint_id,
            optional_version(request),
        )
        return pb.CreateCheckpointResponse(checkpoint=checkpoint_to_proto(checkpoint))

    async def list_checkpoints(
        self, tenant: str, request: pb.ListCheckpointsRequest
    ) -> pb.ListCheckpointsResponse:
        """Return a model's checkpoints."""
        checkpoints = await self.models.list_checkpoints(ModelKey(tenant, request.model_id))
        return pb.ListCheckpointsResponse(checkpoints=map(checkpoint_to_proto, checkpoints))

    async def restore_checkpoint(
        self, tenant: str, request: pb.RestoreCheckpointRequest
    ) -> pb.RestoreCheckpointResponse:
        """Make a checkpoint the model's next version."""
        version, replayed = await self.models.restore_checkpoint(
            ModelKey(tenant, request.model_id),
            request.checkpoint_id,
            expected=expected_version(request),
            request_id=request.request_id,
        )
        return pb.RestoreCheckpointResponse(version=version_to_proto(version), replayed=replayed)

    async def delete_checkpoint(
        self, tenant: str, request: pb.DeleteCheckpointRequest
    ) -> pb.DeleteCheckpointResponse:
        """Delete a checkpoint's name."""
        deleted = await self.models.delete_checkpoint(
            ModelKey(tenant, request.model_id),
            request.checkpoint_id,
            allow_missing=request.allow_missing,
        )
        return pb.DeleteCheckpointResponse(deleted=deleted)

    async def get_server_info(
        self,
        tenant: str,
        request: pb.GetServerInfoRequest,  # noqa: ARG002 - it says nothing
    ) -> pb.GetServerInfoResponse:
        """Return limits, build and replica."""
        return pb.GetServerInfoResponse(
            server_version=self.info.server_version,
            replica_id=self.info.replica_id,
            start_time=time_to_proto(self.info.start_time_ms),
            limits=limits_to_proto(self.info.limits_of(tenant)),
            server_time=time_to_proto(int(time.time() * 1000)),
            durability=self.info.durability,
        )


async def _header(requests: AsyncIterator[pb.PutWeightsRequest]) -> pb.PutWeightsHeader:
    first = await anext(requests, None)
    if first is None or not first.HasField("header"):
        raise _header_required()
    return first.header


def _header_required() -> InvalidArgument:
    return bad_field("header", "required in the first message")


async def _collect(
    requests: AsyncIterator[pb.PutWeightsRequest] | AsyncIterator[pb.ImportModelRequest],
    total_bytes: int,
) -> bytes:
    """Return the file from the parts that follow the header."""
    parts: list[bytes] = []
    size = 0
    async for request in requests:
        if not request.HasField("data"):
            raise bad_field("data", "required in every message after the first")
        parts.append(request.data)
        size += len(request.data)
        if size > total_bytes:
            break
    if size != total_bytes:
        came = f"{size} or more" if size > total_bytes else str(size)
        raise bad_field("total_bytes", f"is {total_bytes}, but {came} bytes came")
    return b"".join(parts)
