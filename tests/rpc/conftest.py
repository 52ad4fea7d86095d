"""A server on a free port over a stand-in for the domain, and what tests say to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # has no stubs

from service.domain.limits_policy import SameLimits
from service.domain.recurrence import callback_of
from service.domain.rules import InputRules
from service.domain.types import (
    BackwardResult,
    DiscardResult,
    ForwardResult,
    UpdateResult,
    Version,
)
from service.domain.use_cases import UseCases
from service.rpc.server import RpcServer
from service.rpc.server_info import ServerInfo
from service.settings import Limits
from service.telemetry import NULL_OBSERVER
from timernn.v1 import tensor_pb2
from timernn.v1 import time_rnn_service_pb2 as pb
from timernn.v1.model_service_pb2_grpc import ModelServiceStub
from timernn.v1.session_service_pb2_grpc import SessionServiceStub
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from google.protobuf.message import Message

    from service.domain.types import (
        Forward,
        SessionKey,
    )
    from service.rpc.admission import TenantAdmissions
    from service.rpc.arrivals import ArrivalRules
    from service.rpc.auth import Authenticator
    from service.rpc.stream import StreamRules
    from service.telemetry import Observer

    OnDone = Callable[[ForwardResult | Exception], None]

VERSION = Version(3, b"v" * 16)
HIDDEN_SIZE = 2
RULES = InputRules(Limits())


def token_of(chunk_seq: int) -> bytes:
    """The token that the stand-in gives a chunk."""
    return f"token {chunk_seq:010}".encode()


@dataclass
class StandIn:
    """A domain that records what it is asked and answers at once, or when the test says so.

    Attributes:
        asked: The domain's own requests, in order.
        held: Forwards that wait for `answer`, when `hold` is set.
        failures: What a Forward of these chunk numbers raises.
        answers: What methods of these names return, or raise, instead.
    """

    hold: bool = False
    asked: list[Any] = field(default_factory=list)
    held: list[tuple[Forward, OnDone]] = field(default_factory=list)
    failures: dict[int, Exception] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    hidden_size: int = HIDDEN_SIZE

    def sizes(self, key: SessionKey, model_id: str) -> tuple[int, int]:
        """Return the sizes D and H."""
        del key, model_id
        return 1, self.hidden_size

    def begin_forward(self, tenant: str, forward: Forward, on_done: OnDone) -> None:
        """Take a chunk that keeps to the rules, and answer it soon, or hold it."""
        RULES.check_forward(forward)
        self.asked.append((tenant, forward))
        if self.hold:
            self.held.append((forward, on_done))
        else:
            asyncio.get_running_loop().call_soon(self.answer, forward, on_done)

    def answer(self, forward: Forward, on_done: OnDone) -> None:
        """Answer a chunk with zeros, or with the failure planned for its number."""
        if failure := self.failures.get(forward.chunk_seq):
            on_done(failure)
            return
        n, t, _ = forward.xs.shape
        hs = np.zeros((n, t, self.hidden_size), forward.xs.dtype)
        token = token_of(forward.chunk_seq)
        on_done(
            ForwardResult(
                forward.session_id,
                forward.epoch,
                forward.chunk_seq,
                hs,
                hs[:, -1],
                VERSION,
                token,
                replayed=False,
            )
        )

    def release(self) -> None:
        """Answer everything that is held."""
        held, self.held = self.held, []
        for forward, on_done in held:
            self.answer(forward, on_done)

    async def forward(self, tenant: str, forward: Forward) -> ForwardResult:
        """Apply one chunk."""
        answer: asyncio.Future[ForwardResult] = asyncio.get_running_loop().create_future()
        self.begin_forward(tenant, forward, callback_of(answer))
        return await answer

    async def backward(self, tenant: str, backward: Any) -> BackwardResult:
        """Leave one contribution."""
        await self._asked("backward", tenant, backward)
        dh0 = np.zeros((1, HIDDEN_SIZE), np.float32)
        return BackwardResult(
            backward.session_id,
            backward.epoch,
            backward.chunk_seq,
            None,
            dh0,
            None,
            0.5,
            VERSION,
            replayed=False,
        )

    async def update(self, tenant: str, update: Any) -> UpdateResult:
        """Make a step."""
        await self._asked("update", tenant, update)
        return UpdateResult(
            update.model_id, VERSION, 0.5, clipped=False, contribution_count=1, replayed=False
        )

    async def discard(self, tenant: str, discard: Any) -> DiscardResult:
        """Discard nothing: there is no store."""
        await self._asked("discard", tenant, discard)
        return DiscardResult(0, 0)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Answer any other method with what the test planned."""
        if name.startswith("__") or name not in self.answers:
            raise AttributeError(name)

        async def method(owner: Any, *arguments: Any, **options: Any) -> Any:
            return await self._asked(name, owner, *arguments, *options.values())

        return method

    async def _asked(self, name: str, owner: Any, *arguments: Any) -> Any:
        self.asked.append((owner, *arguments))
        answer = self.answers.get(name)
        if callable(answer):
            answer = await answer()
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Served(NamedTuple):
    """A running server and a channel to it."""

    server: RpcServer
    channel: grpc.aio.Channel
    domain: StandIn
    address: str

    @property
    def models(self) -> Any:
        """A stub without types, so that tests can send what types forbid."""
        return ModelServiceStub(self.channel)

    @property
    def sessions(self) -> Any:
        """The same for sessions."""
        return SessionServiceStub(self.channel)

    @property
    def rnn(self) -> Any:
        """The same for the recurrence."""
        return TimeRnnServiceStub(self.channel)


class Refusal(NamedTuple):
    """A status in the form that tests compare."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str]
    details: dict[str, Message]


def refusal_of(status: Any) -> Refusal:
    """Unpack a google.rpc.Status."""
    details: dict[str, Message] = {}
    for packed in status.details:
        kind = packed.TypeName().rpartition(".")[2]
        detail = getattr(error_details_pb2, kind)()
        packed.Unpack(detail)
        details[kind] = detail
    info: Any = details["ErrorInfo"]
    assert info.domain == "timernn"
    code = next(each.name for each in grpc.StatusCode if each.value[0] == status.code)
    return Refusal(code, info.reason, status.message, dict(info.metadata), details)


@pytest.fixture
def refused() -> Callable[[Awaitable[Any]], Awaitable[Refusal]]:
    """Await a call that must fail; return its status, which must say the same in code and details."""

    async def refused(call: Awaitable[Any]) -> Refusal:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        trailers = dict(caught.value.trailing_metadata())
        assert "grpc-status-details-bin" in trailers, caught.value
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        refusal = refusal_of(status)
        assert refusal.code == caught.value.code().name
        assert refusal.message == caught.value.details()
        return refusal

    return refused


@pytest.fixture
def unpack() -> Callable[[Any], Refusal]:
    """Unpack the google.rpc.Status of a stream's result."""
    return refusal_of


@pytest.fixture
def domain() -> StandIn:
    """The stand-in that `serve` serves."""
    return StandIn()


@pytest.fixture
async def serve(domain: StandIn) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Start a server on a free port, with the limits, rules, authenticator or observer a test needs."""
    running: list[tuple[RpcServer, grpc.aio.Channel]] = []

    async def serve(
        *,
        limits: Limits | None = None,
        rules: StreamRules | None = None,
        arrival_rules: ArrivalRules | None = None,
        authenticator: Authenticator | None = None,
        observer: Observer = NULL_OBSERVER,
        tenants: TenantAdmissions | None = None,
    ) -> Served:
        limits = limits or Limits()
        info = ServerInfo(
            "1.2.3", "replica", 1_700_000_000_123, limits, SameLimits(limits), "primary"
        )
        stand_in: Any = domain
        server = RpcServer(
            UseCases(*6 * (stand_in,)),
            info,
            rules=rules,
            arrival_rules=arrival_rules,
            authenticator=authenticator,
            observer=observer,
            tenants=tenants,
        )
        address = await server.start("127.0.0.1:0")
        server.health.set_serving(True)
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        channel = grpc.aio.insecure_channel(address, options)
        running.append((server, channel))
        return Served(server, channel, domain, address)

    yield serve
    for server, channel in running:
        await channel.close()
        await server.drain(0)


@pytest.fixture
def tensor() -> Callable[..., tensor_pb2.Tensor]:
    """Make a tensor message of zeros, or of values."""

    def tensor(*shape: int, values: Any = 0.0, dtype: str = "float32") -> tensor_pb2.Tensor:
        array = np.full(shape, values, dtype)
        number = tensor_pb2.D_TYPE_FLOAT32 if dtype == "float32" else tensor_pb2.D_TYPE_FLOAT64
        return tensor_pb2.Tensor(dtype=number, shape=shape, data=array.tobytes())

    return tensor


@pytest.fixture
def until() -> Callable[[Callable[[], Any]], Awaitable[None]]:
    """Wait until something that the server does on its own has happened."""

    async def until(happened: Callable[[], Any]) -> None:
        while not happened():  # noqa: ASYNC110 - what happens has no event to wait for
            await asyncio.sleep(0.001)

    return until


@pytest.fixture
def chunk(tensor: Callable[..., tensor_pb2.Tensor]) -> Callable[..., pb.Operation]:
    """Make a Forward operation; its tag is its number unless another is given."""

    def chunk(
        session_id: str, chunk_seq: int, *, epoch: int = 1, steps: int = 1, **fields: Any
    ) -> pb.Operation:
        tag = fields.pop("tag", chunk_seq)
        request = pb.ForwardRequest(
            session_id=session_id,
            epoch=epoch,
            chunk_seq=chunk_seq,
            xs=tensor(1, steps, 1),
            **fields,
        )
        return pb.Operation(tag=tag, forward=request)

    return chunk
