"""A server over a real store, and the shortest ways to say something right or wrong to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc.aio
import numpy as np
import pytest
from google.rpc import status_pb2  # type: ignore[import-untyped]  # has no stubs
from safetensors.numpy import save

from service.rpc.auth import AllowAll, Principal
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import tensor_pb2
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub
from timernn.v1.session_service_pb2_grpc import SessionServiceStub
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from service.rpc.auth import Caller

D, H = 3, 4


class RefusedOnStreamError(Exception):
    """An operation of a stream was answered with an error."""

    def __init__(self, status: Any) -> None:
        super().__init__(status.message)
        self.status = status


class TenantOfTheTest(AllowAll):
    """Gives every caller the test's own tenant, so that tests share a store."""

    def __init__(self, tenant: str) -> None:
        self._principal = Principal(tenant)

    def authenticate(self, caller: Caller) -> Principal:  # noqa: ARG002 - the protocol's
        """Return the tenant."""
        return self._principal


@dataclass
class Lab:
    """A client that numbers nothing by itself.

    Attributes:
        channel: To the server.
        over_stream: Whether operations go over a stream instead of as unary calls.
        server: What serves, where it is in this process.
        store: What it keeps its state in, where the test started it.
        tenant: Whose it all is.
        session: The session that `opened` opened.
    """

    channel: grpc.aio.Channel
    over_stream: bool = False
    server: Any = None
    store: Any = None
    tenant: str = ""
    session: session_pb.Session = field(default_factory=session_pb.Session)

    def __post_init__(self) -> None:
        """Make the stubs, without types so that they take what types forbid."""
        self.models: Any = ModelServiceStub(self.channel)
        self.sessions: Any = SessionServiceStub(self.channel)
        self.rnn: Any = TimeRnnServiceStub(self.channel)

    async def create(self, model_id: str = "m", **fields: Any) -> model_pb.Model:
        """Create a model."""
        spec = model_pb.ModelSpec(model_id=model_id, input_size=D, hidden_size=H)
        request = model_pb.CreateModelRequest(**{"spec": spec, **fields})
        response: model_pb.CreateModelResponse = await self.models.CreateModel(request)
        return response.model

    async def open(self, session_id: str = "s", **fields: Any) -> session_pb.Session:
        """Open a session of model m."""
        request = session_pb.OpenSessionRequest(model_id="m", session_id=session_id, **fields)
        response: session_pb.OpenSessionResponse = await self.sessions.OpenSession(request)
        return response.session

    async def opened(self, **fields: Any) -> Lab:
        """Create model m and open session s, which the operations below then mean."""
        await self.create()
        self.session = await self.open(**fields)
        return self

    async def forward(
        self, chunk_seq: int, value: float = 0.5, **fields: Any
    ) -> pb.ForwardResponse:
        """Apply a chunk of one row and two steps."""
        good = {
            "session_id": "s",
            "epoch": self.session.epoch,
            "chunk_seq": chunk_seq,
            "xs": tensor(1, 2, D, value=value),
        }
        request = pb.ForwardRequest(**{**good, **fields})
        response: pb.ForwardResponse = await self._run("forward", request)
        return response

    async def train(self, chunk_seq: int, **fields: Any) -> pb.ForwardResponse:
        """Apply a chunk and keep its tape."""
        return await self.forward(chunk_seq, mode=pb.FORWARD_MODE_TRAIN, **fields)

    async def backward(self, of: pb.ForwardResponse, value: float = 1.0, **fields: Any) -> Any:
        """Leave the contribution of a chunk."""
        good = {
            "session_id": "s",
            "epoch": of.epoch,
            "chunk_seq": of.chunk_seq,
            "state_token": of.state_token,
            "dhs": tensor(1, 2, H, value=value),
        }
        return await self._run("backward", pb.BackwardRequest(**{**good, **fields}))

    async def update(self, request_id: str = "r", **fields: Any) -> pb.UpdateResponse:
        """Make a step of model m."""
        request = pb.UpdateRequest(**{"model_id": "m", "request_id": request_id, **fields})
        response: pb.UpdateResponse = await self._run("update", request)
        return response

    async def discard(self, **fields: Any) -> Any:
        """Drop contributions of model m."""
        request = pb.DiscardGradientsRequest(**{"model_id": "m", **fields})
        return await self._run("discard_gradients", request)

    async def upload(self, data: bytes, request_id: str = "u", **fields: Any) -> Any:
        """Make a file the next version of model m."""
        header = model_pb.PutWeightsHeader(
            **{"model_id": "m", "request_id": request_id, "total_bytes": len(data), **fields}
        )
        parts = [model_pb.PutWeightsRequest(header=header), model_pb.PutWeightsRequest(data=data)]
        return await self.models.PutWeights(iter(parts))

    async def download(self, **fields: Any) -> bytes:
        """Return the file of a version of model m."""
        call = self.models.GetWeights(model_pb.GetWeightsRequest(model_id="m", **fields))
        return b"".join([part.data async for part in call])

    async def _run(self, kind: str, request: Any) -> Any:
        if not self.over_stream:
            name = "".join(word.capitalize() for word in kind.split("_"))
            return await getattr(self.rnn, name)(request)
        call = self.rnn.Stream()
        operation = pb.Operation(tag=7, **{kind: request})
        await call.write(pb.StreamRequest(operations=[operation]))
        (result,) = (await call.read()).results
        await call.done_writing()
        assert result.tag == 7
        if result.HasField("error"):
            raise RefusedOnStreamError(result.error)
        assert result.WhichOneof("result") == kind
        return getattr(result, kind)


def tensor(*shape: int, value: float = 0.0, dtype: str = "float32") -> tensor_pb2.Tensor:
    """Make a tensor message of one value."""
    array = np.full(shape, value, dtype)
    number = tensor_pb2.D_TYPE_FLOAT32 if dtype == "float32" else tensor_pb2.D_TYPE_FLOAT64
    return tensor_pb2.Tensor(dtype=number, shape=shape, data=array.tobytes())


async def refusal_status(situation: Awaitable[Any]) -> Any:
    """Return the google.rpc.Status in which a situation ends."""
    with pytest.raises((RefusedOnStreamError, grpc.aio.AioRpcError)) as caught:
        await situation
    error: Any = caught.value
    if isinstance(error, RefusedOnStreamError):
        return error.status
    trailers = dict(error.trailing_metadata())
    assert "grpc-status-details-bin" in trailers, error
    return status_pb2.Status.FromString(trailers["grpc-status-details-bin"])


def file_of(**tensors: Any) -> bytes:
    """Make a safetensors file of model m's weights."""
    weights = {
        "Wx": np.ones((D, H), np.float32),
        "Wh": np.ones((H, H), np.float32),
        "b": np.ones(H, np.float32),
    }
    return save({**weights, **tensors})
