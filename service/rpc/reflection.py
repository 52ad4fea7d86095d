"""grpc.reflection.v1alpha: the descriptors of the services, for tools such as grpcurl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from service.rpc.auth import Context
    from service.rpc.codec import Codec
    from service.rpc.gate import RpcCall


class Reflection:
    """Puts gRPC's own servicer behind the gate."""

    def __init__(self, service_names: Iterable[str], codec: Codec) -> None:
        self._servicer: Any = aio.ReflectionServicer(service_names)
        self._codec = codec

    async def server_reflection_info(self, call: RpcCall) -> None:
        """Answer one question after another."""
        questions = self._read(call.context)
        async for answer in self._servicer.ServerReflectionInfo(questions, call.context):
            await call.context.write(self._codec.serialize(answer))

    async def _read(self, context: Context) -> AsyncIterator[Any]:
        while (raw := await context.read()) is not grpc.aio.EOF:
            yield self._codec.parse(reflection_pb2.ServerReflectionRequest, raw)
