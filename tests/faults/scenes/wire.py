"""A client that numbers its chunks and resends nothing: it says what the test wants it to say."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np

from rnn_engine import TimeRNN
from timernn import errors
from timernn._core.channels import channel_options
from timernn._core.convert import tensor_from_proto, tensor_to_proto
from timernn._core.status import error_from_rpc, error_from_status
from timernn.v1 import model_service_pb2 as model_pb
from timernn.v1 import session_service_pb2 as session_pb
from timernn.v1 import tensor_pb2
from timernn.v1 import time_rnn_service_pb2 as rnn_pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub
from timernn.v1.session_service_pb2_grpc import SessionServiceStub
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from numpy.typing import NDArray

    from instruments.report import Proof

    Array = NDArray[Any]

N, T, D, H = 2, 3, 4, 8
TIMEOUT_S = 60.0
ROUNDING = 1e-5  # of float32 after some tens of chunks


class Wire:
    """The stubs of one replica over a connection of its own."""

    def __init__(self, address: str) -> None:
        """Prepare a connection; the first call makes it."""
        self.channel = grpc.aio.insecure_channel(address, channel_options(16 << 20))
        self.models: Any = ModelServiceStub(self.channel)
        self.sessions: Any = SessionServiceStub(self.channel)
        self.rnn: Any = TimeRnnServiceStub(self.channel)

    async def forward(
        self, request: rnn_pb.ForwardRequest, timeout_s: float = TIMEOUT_S
    ) -> rnn_pb.ForwardResponse:
        """Send a Forward once."""
        answer: rnn_pb.ForwardResponse = await answer_of(
            self.rnn.Forward(request, timeout=timeout_s)
        )
        return answer

    async def streamed(
        self, request: rnn_pb.ForwardRequest, timeout_s: float = TIMEOUT_S
    ) -> rnn_pb.ForwardResponse:
        """Send a Forward once, on a stream of its own."""
        call = self.rnn.Stream(timeout=timeout_s)
        try:
            operation = rnn_pb.Operation(forward=request)
            await answer_of(call.write(rnn_pb.StreamRequest(operations=[operation])))
            (result,) = (await answer_of(call.read())).results
        finally:
            call.cancel()
        if result.HasField("error"):
            raise error_from_status(result.error)
        answer: rnn_pb.ForwardResponse = result.forward
        return answer

    async def __aenter__(self) -> Self:
        """Give the open connection."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channel."""
        await self.channel.close()


async def answer_of(call: Awaitable[Any]) -> Any:
    """Await a call and raise its failure as the client library's typed error."""
    try:
        return await call
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


async def outcome(call: Awaitable[Any]) -> Any:
    """Return what a call ends in: its answer, or the error."""
    try:
        return await answer_of(call)
    except errors.Error as error:
        return error


async def refusal(call: Awaitable[Any]) -> errors.Error:
    """Return the error that a call must end in."""
    answer = await outcome(call)
    assert isinstance(answer, errors.Error), f"expected a refusal, got {str(answer)[:200]}"
    return answer


@dataclass
class Model:
    """A model with weights that the test knows."""

    model_id: str
    params: tuple[Array, Array, Array]

    @classmethod
    async def create(cls, wire: Wire, rng: np.random.Generator, model_id: str = "m") -> Model:
        """Create a small model with drawn weights and Adam."""
        params = (
            (rng.standard_normal((D, H)) / D).astype(np.float32),
            (rng.standard_normal((H, H)) / H).astype(np.float32),
            np.zeros(H, np.float32),
        )
        wx, wh, b = map(tensor_to_proto, params)
        spec = model_pb.ModelSpec(
            model_id=model_id,
            input_size=D,
            hidden_size=H,
            dtype=tensor_pb2.D_TYPE_FLOAT32,
            optimizer=model_pb.Optimizer(adam=model_pb.Adam(lr=1e-2)),
        )
        given = model_pb.GivenWeights(wx=wx, wh=wh, b=b)
        await wire.models.CreateModel(
            model_pb.CreateModelRequest(spec=spec, given=given), timeout=TIMEOUT_S
        )
        return cls(model_id, params)

    def local(self) -> TimeRNN:
        """Return the classic layer with a copy of the weights."""
        Wx, Wh, b = (each.copy() for each in self.params)
        return TimeRNN(Wx, Wh, b, stateful=True)

    async def open(
        self, wire: Wire, session_id: str = "", *, batch_size: int = N, **fields: Any
    ) -> Writer:
        """Open a session on a replica."""
        request = session_pb.OpenSessionRequest(
            model_id=self.model_id, session_id=session_id, batch_size=batch_size, **fields
        )
        opened = await answer_of(wire.sessions.OpenSession(request, timeout=TIMEOUT_S))
        return Writer(opened.session, self.local())


@dataclass
class Writer:
    """A client's view of one session, and the layer that it must equal."""

    session: session_pb.Session
    local: TimeRNN
    outputs: list[Array] = field(default_factory=list)

    def chunk(
        self, xs: Array, chunk_seq: int = 0, *, train: bool = False, **fields: Any
    ) -> rnn_pb.ForwardRequest:
        """Lay out the next chunk, or the one numbered, with the token known now."""
        session = self.session
        fields.setdefault("epoch", session.epoch)
        fields.setdefault("previous_token", session.state_token)
        return rnn_pb.ForwardRequest(
            session_id=session.session_id,
            chunk_seq=chunk_seq or session.chunk_seq + 1,
            xs=tensor_to_proto(xs),
            mode=rnn_pb.FORWARD_MODE_TRAIN if train else rnn_pb.FORWARD_MODE_INFER,
            **fields,
        )

    def backward(self, dhs: Array, **fields: Any) -> rnn_pb.BackwardRequest:
        """Lay out the Backward of the last chunk."""
        session = self.session
        return rnn_pb.BackwardRequest(
            session_id=session.session_id,
            epoch=session.epoch,
            chunk_seq=session.chunk_seq,
            state_token=session.state_token,
            dhs=tensor_to_proto(dhs),
            return_dxs=True,
            **fields,
        )

    def took(self, answer: rnn_pb.ForwardResponse) -> None:
        """Go on from an answer."""
        self.session.chunk_seq, self.session.state_token = answer.chunk_seq, answer.state_token

    def check(self, answer: rnn_pb.ForwardResponse, xs: Array, proof: Proof) -> None:
        """Compare an answer with the local layer's, and go on from it."""
        wanted = self.local.forward(xs)
        proof.require(is_close(tensor_from_proto(answer.hs), wanted), self._what(answer, "hs"))
        proof.require(is_close(tensor_from_proto(answer.h), wanted[:, -1]), self._what(answer, "h"))
        self.took(answer)

    def _what(self, answer: rnn_pb.ForwardResponse, part: str) -> str:
        return f"{part} of {self.session.session_id} chunk {answer.chunk_seq} is wrong"


def is_close(one: Array, other: Array) -> bool:
    """Return whether two arrays are equal within float32 rounding."""
    return one.shape == other.shape and bool(np.allclose(one, other, atol=ROUNDING, rtol=ROUNDING))


def draw(rng: np.random.Generator, steps: int = T, size: int = D) -> Array:
    """Draw a chunk (N, steps, size)."""
    drawn: Array = rng.standard_normal((N, steps, size)).astype(np.float32)
    return drawn


async def steady_traffic(
    proof: Proof,
    wires: Sequence[Wire],
    model: Model,
    rng: np.random.Generator,
    *,
    sessions: int = 16,
    chunks: int = 12,
) -> list[Writer]:
    """Stream some sessions over the replicas in turn, check every answer, and note the rate.

    Returns:
        The sessions' writers, to go on from.
    """
    writers = [await model.open(wires[k % len(wires)]) for k in range(sessions)]
    data = [[draw(rng) for _ in range(chunks)] for _ in range(sessions)]

    async def stream(number: int) -> None:
        for k, xs in enumerate(data[number]):
            wire = wires[(number + k) % len(wires)]
            answer = await wire.forward(writers[number].chunk(xs))
            writers[number].check(answer, xs, proof)

    started = time.monotonic()
    await asyncio.gather(*map(stream, range(sessions)))
    proof.steady(sessions * chunks, time.monotonic() - started)
    return writers


async def state_of(wire: Wire, session_id: str) -> tuple[session_pb.Session, Array]:
    """Read where a session stands and its hidden state (N, H)."""
    request = session_pb.GetStateRequest(session_id=session_id)
    answer = await answer_of(wire.sessions.GetState(request, timeout=TIMEOUT_S))
    return answer.session, tensor_from_proto(answer.state)


async def head_of(wire: Wire, model_id: str) -> tuple[int, bytes]:
    """Read number and digest of a model's newest version."""
    request = model_pb.GetModelRequest(model_id=model_id)
    head = (await answer_of(wire.models.GetModel(request, timeout=TIMEOUT_S))).model.head
    return head.number, head.digest
