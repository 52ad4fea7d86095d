"""The adapters of the peers."""

from typing import Any

import redis.asyncio
from typing_extensions import override

from benchmarks.load.adapters import Adapter, GrpcAdapter, Session
from benchmarks.load.workload import Sizes
from benchmarks.peers import afternoon_pb2, afternoon_pb2_grpc, open_inference_pb2
from benchmarks.peers.echo import SERVICE as ECHO_SERVICE


class EchoAdapter(GrpcAdapter):
    """The bare echo: bytes in, bytes out, no protobuf on either side."""

    has_state = False

    def __init__(self, target: str, sizes: Sizes) -> None:
        """Make both calls without serializers."""
        super().__init__(target, sizes)
        self._unary: Any = self.channel.unary_unary(f"/{ECHO_SERVICE}/Unary")
        self._stream: Any = self.channel.stream_stream(f"/{ECHO_SERVICE}/Stream")

    @override
    async def unary(self, session: Session) -> bytes:
        answer: bytes = await self._unary(self.payload)
        return answer

    @override
    def open_stream(self) -> Any:
        return self._stream()

    @override
    def stream_request(self, session: Session) -> bytes:
        return self.payload

    @override
    def outputs(self, answer: bytes) -> bytes:
        return answer


class AfternoonAdapter(GrpcAdapter):
    """Speaks to the afternoon server."""

    def __init__(self, target: str, sizes: Sizes) -> None:
        """Make the stub."""
        super().__init__(target, sizes)
        self._stub = afternoon_pb2_grpc.AfternoonServiceStub(self.channel)

    @override
    async def unary(self, session: Session) -> afternoon_pb2.Outputs:
        answer: afternoon_pb2.Outputs = await self._stub.Forward(self.stream_request(session))
        return answer

    @override
    def open_stream(self) -> Any:
        return self._stub.Stream()

    @override
    def stream_request(self, session: Session) -> afternoon_pb2.Chunk:
        return afternoon_pb2.Chunk(
            session_id=session.session_id, steps=self.sizes.steps, xs=self.payload
        )

    @override
    def outputs(self, answer: afternoon_pb2.Outputs) -> bytes:
        return answer.hs


class MlserverAdapter(GrpcAdapter):
    """MLServer with the custom runtime; unary calls, as that is what it is measured by."""

    def __init__(self, target: str, sizes: Sizes) -> None:
        """Name the method; the messages are this project's copy of the ones that are needed."""
        super().__init__(target, sizes)
        self._infer = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=open_inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=open_inference_pb2.ModelInferResponse.FromString,
        )

    @override
    async def unary(self, session: Session) -> open_inference_pb2.ModelInferResponse:
        tensor = open_inference_pb2.ModelInferRequest.InferInputTensor(
            name="xs",
            datatype="BYTES",
            shape=[len(self.payload)],
            contents=open_inference_pb2.InferTensorContents(bytes_contents=[self.payload]),
        )
        request = open_inference_pb2.ModelInferRequest(
            model_name="timernn", id=session.session_id, inputs=[tensor]
        )
        answer: open_inference_pb2.ModelInferResponse = await self._infer(request)
        return answer

    @override
    def outputs(self, answer: open_inference_pb2.ModelInferResponse) -> bytes:
        return answer.outputs[0].contents.bytes_contents[0]


class RedisAdapter(Adapter):
    """The store itself, called as a server in Python calls it: one SET of h a chunk, awaited."""

    has_state = False

    def __init__(self, target: str, sizes: Sizes) -> None:
        """Connect to the store.

        Args:
            target: Its URL.
            sizes: h of shape (H,), float32, is what is written.
        """
        super().__init__(sizes)
        self._store = redis.asyncio.Redis.from_url(target)
        self._state = bytes(4 * sizes.hidden)

    @override
    async def close(self) -> None:
        await self._store.aclose()

    @override
    async def unary(self, session: Session) -> bytes:
        await self._store.set("roundtrip:" + session.session_id, self._state)
        return b""

    @override
    def accept(self, session: Session, answer: bytes) -> None:
        pass

    @override
    def outputs(self, answer: bytes) -> bytes:
        return answer
