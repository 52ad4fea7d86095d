"""The adapter of this project's server, over the raw stubs."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from typing_extensions import override

from benchmarks.load.adapters import GrpcAdapter, Login, Session
from benchmarks.load.loops import read
from benchmarks.load.workload import Array, Sizes, make_weights
from timernn.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
    tensor_pb2,
    time_rnn_service_pb2,
    time_rnn_service_pb2_grpc,
)

_NO_LOGIN = Login()
OPENED_AT_ONCE = 64
OPEN_TRIES, OPEN_PAUSE_S = 5, 0.5


def tensor(array: Array) -> tensor_pb2.Tensor:
    """Make the message of a float32 array."""
    return tensor_pb2.Tensor(
        dtype=tensor_pb2.D_TYPE_FLOAT32, shape=array.shape, data=array.tobytes()
    )


def model_id(sizes: Sizes) -> str:
    """Name the model that serves chunks of these sizes."""
    return f"bench-{sizes.inputs}-{sizes.hidden}"


def given_weights(sizes: Sizes) -> model_service_pb2.GivenWeights:
    """Make the message of the weights that every server gets."""
    weights = make_weights(sizes)
    return model_service_pb2.GivenWeights(
        wx=tensor(weights["Wx"]), wh=tensor(weights["Wh"]), b=tensor(weights["b"])
    )


def create_model_request(sizes: Sizes) -> model_service_pb2.CreateModelRequest:
    """Ask for a model with these weights."""
    return model_service_pb2.CreateModelRequest(
        spec=model_service_pb2.ModelSpec(
            model_id=model_id(sizes), input_size=sizes.inputs, hidden_size=sizes.hidden
        ),
        given=given_weights(sizes),
    )


class TimernnAdapter(GrpcAdapter):
    """This project's server: numbered chunks, tokens, and streams that carry any session."""

    ordered_stream = False

    def __init__(self, target: str, sizes: Sizes, login: Login = _NO_LOGIN) -> None:
        """Make the stubs."""
        super().__init__(target, sizes, login.authority)
        self._metadata = login.metadata
        self._models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self._sessions = session_service_pb2_grpc.SessionServiceStub(self.channel)
        self._stub = time_rnn_service_pb2_grpc.TimeRnnServiceStub(self.channel)
        self._shape = (1, sizes.steps, sizes.inputs)

    @override
    async def open(self, prefix: str, count: int) -> list[Session]:
        try:
            await self._models.CreateModel(
                create_model_request(self.sizes), metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            # Made by a client before this one.
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
        return await self.open_sessions(prefix, count)

    async def open_sessions(self, prefix: str, count: int) -> list[Session]:
        """Open sessions of a model that is there, some calls at a time."""
        numbers = iter(range(count))
        opened: list[Session] = []

        async def open_in_turn() -> None:
            for index in numbers:
                request = session_service_pb2.OpenSessionRequest(
                    model_id=model_id(self.sizes),
                    session_id=f"{prefix}-{index}",
                    request_id=f"{prefix}-{index}",
                )
                answer = await self._open(request)
                opened.append(Session(answer.session.session_id, index, epoch=answer.session.epoch))

        await asyncio.gather(*(open_in_turn() for _ in range(OPENED_AT_ONCE)))
        return sorted(opened, key=lambda session: session.index)

    async def _open(self, request: Any) -> Any:
        """Open a session, again where the store was busy: opening a million is not what is measured."""
        for _ in range(OPEN_TRIES):
            try:
                return await self._sessions.OpenSession(request, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(OPEN_PAUSE_S)
        return await self._sessions.OpenSession(request, metadata=self._metadata)

    def _forward_request(self, session: Session) -> time_rnn_service_pb2.ForwardRequest:
        # With chunks in flight the token before is not known yet; the stream knows it.
        is_known = session.acknowledged_seq == session.seq
        session.seq += 1
        return time_rnn_service_pb2.ForwardRequest(
            session_id=session.session_id,
            epoch=session.epoch,
            chunk_seq=session.seq,
            xs=tensor_pb2.Tensor(
                dtype=tensor_pb2.D_TYPE_FLOAT32, shape=self._shape, data=self.payload
            ),
            previous_token=session.token if is_known else b"",
            acknowledged_seq=session.acknowledged_seq,
        )

    @override
    async def unary(self, session: Session) -> time_rnn_service_pb2.ForwardResponse:
        answer: time_rnn_service_pb2.ForwardResponse = await self._stub.Forward(
            self._forward_request(session), metadata=self._metadata
        )
        return answer

    async def try_unary(self, session: Session) -> bool:
        """Send the next chunk as a unary call; return whether the server took it, else it can be sent again."""
        try:
            self.accept(session, await self.unary(session))
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            session.seq = session.acknowledged_seq
            return False
        return True

    async def try_stream(self, call: Any, session: Session) -> bool:
        """Send the next chunk on a stream that carries nothing else meanwhile; as `try_unary`."""
        await call.write(self.stream_request(session))
        answer = await read(call)
        if answer.results[0].error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
            session.seq = session.acknowledged_seq
            return False
        self.accept(session, answer)
        return True

    @override
    def open_stream(self) -> Any:
        return self._stub.Stream(metadata=self._metadata)

    def _operation(self, session: Session) -> time_rnn_service_pb2.Operation:
        return time_rnn_service_pb2.Operation(
            tag=session.index, forward=self._forward_request(session)
        )

    @override
    def stream_request(self, session: Session) -> time_rnn_service_pb2.StreamRequest:
        return time_rnn_service_pb2.StreamRequest(operations=[self._operation(session)])

    @override
    def frame_request(self, sessions: Sequence[Session]) -> time_rnn_service_pb2.StreamRequest:
        return time_rnn_service_pb2.StreamRequest(
            operations=[self._operation(session) for session in sessions]
        )

    @override
    def parts(
        self, message: time_rnn_service_pb2.StreamResponse
    ) -> list[tuple[int, time_rnn_service_pb2.ForwardResponse]]:
        return [(result.tag, checked(result).forward) for result in message.results]

    @override
    def outputs(self, answer: Any) -> bytes:
        data: bytes = _forward_response(answer).hs.data
        return data

    @override
    def accept(self, session: Session, answer: Any) -> None:
        super().accept(session, answer)
        _acknowledge(session, _forward_response(answer))


def _forward_response(answer: Any) -> time_rnn_service_pb2.ForwardResponse:
    if isinstance(answer, time_rnn_service_pb2.ForwardResponse):
        return answer
    return checked(answer.results[0]).forward


def checked(
    result: time_rnn_service_pb2.OperationResult,
) -> time_rnn_service_pb2.OperationResult:
    """Return a result that is not an error.

    Raises:
        ValueError: If it is one; the message is the server's.
    """
    if result.HasField("error"):
        raise ValueError(f"the server answered: {result.error.message}")
    return result


def _acknowledge(session: Session, response: time_rnn_service_pb2.ForwardResponse) -> None:
    session.acknowledged_seq = response.chunk_seq
    session.token = response.state_token
