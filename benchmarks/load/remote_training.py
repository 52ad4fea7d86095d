"""A training session over the raw stream: what a client library does, without the library."""

from typing import Any

import grpc
import numpy as np

from benchmarks.load.adapters import CHANNEL_OPTIONS
from benchmarks.load.loops import read
from benchmarks.load.timernn_adapter import checked, given_weights, tensor
from benchmarks.load.workload import Array, Sizes
from timernn.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
    time_rnn_service_pb2,
    time_rnn_service_pb2_grpc,
)


class RemoteSession:
    """One training session with a model of its own."""

    def __init__(self, target: str, sizes: Sizes, rows: int, learning_rate: float) -> None:
        """Open the channel.

        Args:
            target: Address of the server.
            sizes: T, D and H.
            rows: N.
            learning_rate: Of plain gradient descent.
        """
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._sizes = sizes
        self._rows = rows
        self._optimizer = model_service_pb2.Optimizer(sgd=model_service_pb2.Sgd(lr=learning_rate))
        self._last = time_rnn_service_pb2.ForwardResponse()
        self._call: Any = None

    async def open(self, name: str) -> None:
        """Create the model, open the session and begin the stream, all under one name."""
        spec = model_service_pb2.ModelSpec(
            model_id=name,
            input_size=self._sizes.inputs,
            hidden_size=self._sizes.hidden,
            optimizer=self._optimizer,
        )
        models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        await models.CreateModel(
            model_service_pb2.CreateModelRequest(spec=spec, given=given_weights(self._sizes))
        )
        sessions = session_service_pb2_grpc.SessionServiceStub(self._channel)
        request = session_service_pb2.OpenSessionRequest(
            model_id=name, session_id=name, batch_size=self._rows
        )
        opened = await sessions.OpenSession(request)
        self._last.session_id = name
        self._last.epoch = opened.session.epoch
        self._call = time_rnn_service_pb2_grpc.TimeRnnServiceStub(self._channel).Stream()

    async def forward(self, xs: Array) -> Array:
        """Run the next chunk with a tape.

        Args:
            xs: Inputs, shape (N, T, D), float32.

        Returns:
            hs, shape (N, T, H), float32.
        """
        request = time_rnn_service_pb2.ForwardRequest(
            session_id=self._last.session_id,
            epoch=self._last.epoch,
            chunk_seq=self._last.chunk_seq + 1,
            previous_token=self._last.state_token,
            xs=tensor(xs),
            mode=time_rnn_service_pb2.FORWARD_MODE_TRAIN,
            acknowledged_seq=self._last.chunk_seq,
        )
        result = await self._ask(time_rnn_service_pb2.Operation(forward=request))
        self._last = result.forward
        return _array(result.forward.hs)

    async def backward_and_update(self, dhs: Array, *, with_dxs: bool) -> Array | None:
        """Propagate the gradient of the last chunk back and make a step, in one operation.

        Args:
            dhs: Gradient with respect to hs, shape (N, T, H), float32.
            with_dxs: Whether to return the gradient with respect to xs.

        Returns:
            dxs, shape (N, T, D), float32; None where not wanted.
        """
        last = self._last
        request = time_rnn_service_pb2.BackwardRequest(
            session_id=last.session_id,
            epoch=last.epoch,
            chunk_seq=last.chunk_seq,
            state_token=last.state_token,
            dhs=tensor(dhs),
            return_dxs=with_dxs,
            update=time_rnn_service_pb2.UpdateRequest(
                request_id=f"{last.session_id}-{last.chunk_seq}"
            ),
        )
        result = await self._ask(time_rnn_service_pb2.Operation(backward=request))
        return _array(result.backward.dxs) if with_dxs else None

    async def _ask(
        self, operation: time_rnn_service_pb2.Operation
    ) -> time_rnn_service_pb2.OperationResult:
        await self._call.write(time_rnn_service_pb2.StreamRequest(operations=[operation]))
        answer = await read(self._call)
        return checked(answer.results[0])


def _array(message: Any) -> Array:
    return np.frombuffer(message.data, np.float32).reshape(tuple(message.shape))
