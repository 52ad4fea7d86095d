"""The gRPC server: options, services, health and reflection."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc.aio
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service.domain.rules import InputRules
from service.rpc.admission import Admission
from service.rpc.arrivals import ArrivalRules, Arrivals
from service.rpc.auth import AllowAll
from service.rpc.codec import Codec
from service.rpc.dispatcher import Dispatcher
from service.rpc.gate import Gate
from service.rpc.health import Health
from service.rpc.model_service import ModelService
from service.rpc.permissions import check_complete
from service.rpc.reflection import Reflection
from service.rpc.session_service import SessionService
from service.rpc.stream import StreamRules, Streams
from service.rpc.time_rnn_service import TimeRnnService
from service.telemetry import NULL_OBSERVER
from timernn.v1 import model_service_pb2, session_service_pb2, time_rnn_service_pb2

if TYPE_CHECKING:
    from service.domain.use_cases import UseCases
    from service.rpc.admission import TenantAdmissions
    from service.rpc.auth import Authenticator
    from service.rpc.server_info import ServerInfo
    from service.rpc.tls import TlsIdentity
    from service.telemetry import Observer

# What a client may send unasked, for each of its calls; a line of 50 ms carries 10 MB/s with it. Once a message
# is read, all that is missing of it is asked for at once.
_WINDOW_BYTES: Final = 512 << 10
# Health and reflection ask for little, and whoever asks need not have logged in.
_PUBLIC_MESSAGES: Final = 4
_PUBLIC_WAITING: Final = 256
# Beyond the limit on messages, so that one a little too large is refused by us, with a reason.
_MESSAGE_MARGIN_BYTES: Final = 64 << 10
_HANDOVER_S: Final = 0.05

_MODEL: Final = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
_SESSION: Final = session_service_pb2.DESCRIPTOR.services_by_name["SessionService"]
_TIME_RNN: Final = time_rnn_service_pb2.DESCRIPTOR.services_by_name["TimeRnnService"]
_HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"]
_REFLECTION: Final = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

SERVICES: Final = (_MODEL, _SESSION, _TIME_RNN, _HEALTH, _REFLECTION)
SERVICE_NAMES: Final = tuple(service.full_name for service in SERVICES)


def rpc_types() -> dict[str, str]:
    """Return for each method's path its type, in the words of metrics."""
    names = {
        (False, False): "unary",
        (True, False): "client_stream",
        (False, True): "server_stream",
        (True, True): "bidi_stream",
    }
    return {
        f"/{service.full_name}/{method.name}": names[
            method.client_streaming, method.server_streaming
        ]
        for service in SERVICES
        for method in service.methods
    }


@dataclass(frozen=True, slots=True)
class _Service:
    """A service to be served.

    Attributes:
        contract: Its descriptor.
        servicer: What serves them.
        is_always_served: Whether it is served also when the replica is full or drains.
    """

    contract: Any
    servicer: object
    is_always_served: bool = False


class RpcServer:
    """Serves the contract on one port, and health on a second one if it is asked for.

    Attributes:
        health: NOT_SERVING until set.
        admission: What is in work.
        arrivals: What is on its way in.
        dispatcher: The table of what is served.
        use_cases: What is asked.
        info: What this replica is.
        streams: The open streams.
    """

    def __init__(
        self,
        use_cases: UseCases,
        info: ServerInfo,
        *,
        authenticator: Authenticator | None = None,
        observer: Observer = NULL_OBSERVER,
        rules: StreamRules | None = None,
        tenants: TenantAdmissions | None = None,
        arrival_rules: ArrivalRules | None = None,
        reuse_port: bool = False,
    ) -> None:
        # The pure-Python parser has no bound on nesting (CVE-2025-4565), and is slow.
        if api_implementation.Type() != "upb":
            raise RuntimeError("protobuf runs without its compiled parser; install its wheel")
        check_complete(rpc_types())
        self.use_cases, self.info = use_cases, info
        limits = info.limits
        deadline_s = limits.default_deadline_ms / 1000
        rules = rules or StreamRules(deadline_s=deadline_s)
        codec = Codec(limits.message_bytes)
        self.admission = Admission(limits.operations_in_flight, limits.request_bytes_in_flight)
        self.dispatcher = Dispatcher(authenticator or AllowAll(), self.admission, tenants)
        self.health = Health(SERVICE_NAMES)
        self.streams = Streams(
            self.dispatcher, codec, observer=observer, limits=limits, rules=rules
        )
        size, arrival_rules = limits.message_bytes, arrival_rules or ArrivalRules()
        # Half of the room for requests, since the answers of those in work need some as well.
        self.arrivals = Arrivals(
            self.admission,
            message_bytes=size,
            room_bytes=limits.request_bytes_in_flight // 2,
            rules=arrival_rules,
            waiting_limit=limits.operations_in_flight,
        )
        public_arrivals = Arrivals(
            self.dispatcher.unbounded,
            message_bytes=size,
            room_bytes=_PUBLIC_MESSAGES * size,
            rules=arrival_rules,
            waiting_limit=_PUBLIC_WAITING,
        )
        gate = Gate(
            self.dispatcher,
            codec,
            observer=observer,
            default_deadline_s=deadline_s,
            arrivals=self.arrivals,
            public_arrivals=public_arrivals,
        )
        input_rules = InputRules(limits)
        services = [
            _Service(_MODEL, ModelService(use_cases.models, info, input_rules)),
            _Service(_SESSION, SessionService(use_cases.sessions, input_rules)),
            _Service(_TIME_RNN, TimeRnnService(use_cases, limits, self.streams)),
            _Service(_HEALTH, self.health, is_always_served=True),
            _Service(_REFLECTION, Reflection(SERVICE_NAMES, codec), is_always_served=True),
        ]
        handlers = {
            each.contract.full_name: gate.wrap(
                each.contract, each.servicer, is_always_served=each.is_always_served
            )
            for each in services
        }
        options = _options(limits.message_bytes, rules, reuse_port=reuse_port)
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers([*handlers.values()])
        self._health_server = grpc.aio.server(options=options)
        self._health_server.add_generic_rpc_handlers([handlers[_HEALTH.full_name]])

    async def start(self, listen: str, identity: TlsIdentity | None = None) -> str:
        """Open the port and begin to serve; return the address with the port that was taken.

        Args:
            listen: HOST:PORT or unix:PATH.
            identity: What the server shows to its clients; None: it speaks plaintext.

        Raises:
            OSError: If the address cannot be bound.
        """
        return await _start(self._server, listen, identity)

    async def start_health(self, listen: str) -> str:
        """Open a second port, in plaintext, that serves health alone; return its address.

        It is served until the server has drained.

        Args:
            listen: HOST:PORT or unix:PATH.

        Raises:
            OSError: If the address cannot be bound.
        """
        return await _start(self._health_server, listen, None)

    def bytes_in_work(self) -> int:
        """Return the bytes of requests and answers in work, and of requests that are being read."""
        return self.admission.request_bytes + self.arrivals.room_taken_bytes

    async def drain(self, grace_s: float) -> None:
        """Take nothing more; finish what was accepted within grace_s, then cut it off.

        A second call with less grace hastens the first.
        """
        self.health.end()
        self.dispatcher.is_draining = True
        self.streams.drain()
        if grace_s:
            # gRPC's stop cancels what it has accepted and not yet handed over; until then the gate still
            # refuses it, with a reason.
            await asyncio.sleep(_HANDOVER_S)
        await self._server.stop(grace_s)
        await self._health_server.stop(0)


async def _start(server: grpc.aio.Server, listen: str, identity: TlsIdentity | None) -> str:
    """Open a server's port and begin to serve; return the address with the port that was taken."""
    try:
        if identity is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, identity.credentials())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}") from error
    await server.start()
    if listen.startswith("unix:"):
        return listen
    host, _, _ = listen.rpartition(":")
    return f"{host}:{port}"


def _options(message_bytes: int, rules: StreamRules, *, reuse_port: bool) -> list[tuple[str, int]]:
    largest = message_bytes + _MESSAGE_MARGIN_BYTES
    # No connection is cut while a stream that began on it may still live its own age out.
    grace_s = rules.age_s + 60
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),  # would widen the window, to 64 MiB on a good line
        # A client that has 100 calls under way keeps the next ones until there is room. With the
        # overload protection, which is on by default, a busy server refuses them instead: of 1000
        # calls at once 800 failed.
        ("grpc.max_concurrent_streams", 100),
        ("grpc.http.overload_protection", 0),
        ("grpc.so_reuseport", int(reuse_port)),
        # Identity only: a compressed message is refused before it is unpacked.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # A client that vanished without a word is noticed within 30 s. On a ping without an answer
        # ping_timeout decides, of 60 s by default; keepalive_timeout sets TCP_USER_TIMEOUT.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Well below the 12 s of the client library, so that a late ping is not taken for two.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.server_handshake_timeout_ms", 20_000),
        ("grpc.max_connection_age_ms", int(rules.age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(grace_s * 1000)),
    ]
