"""grpc.health.v1: whether this replica should be sent calls.

The servicer that comes with gRPC writes to a watcher while it holds the lock that a change of status
needs; one watcher that reads nothing would then keep every other from the news. Here a watcher waits
for an event of its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from grpc_health.v1 import health_pb2

from service.rpc.errors import UnknownService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from service.rpc.gate import RpcCall

LIVENESS: Final = "liveness"
"""A name that is SERVING as long as the process answers, whatever the store does."""

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """Reports one status for the server and each of its services, and that the process lives.

    Attributes:
        is_serving: The status; NOT_SERVING until set.
    """

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = frozenset(service_names) | {"", LIVENESS}
        self._watchers: set[asyncio.Event] = set()
        self._is_ended = False
        self.is_serving = False

    def set_serving(self, is_serving: bool) -> None:  # noqa: FBT001 - a setter
        """Change the status and wake the watchers."""
        if is_serving != self.is_serving:
            self.is_serving = is_serving
            self._wake_watchers()

    def end(self) -> None:
        """Report NOT_SERVING to the watchers and end their calls, so that none holds up a stop.

        The calls end with OK: before an error, gRPC drops what a client has not read yet.
        """
        self.is_serving = False
        self._is_ended = True
        self._wake_watchers()

    async def check(
        self,
        tenant: str,  # noqa: ARG002 - the dispatcher's signature
        request: health_pb2.HealthCheckRequest,
    ) -> health_pb2.HealthCheckResponse:
        """Return the status now."""
        if request.service not in self._names:
            raise UnknownService("NOT_FOUND", "unknown service")
        return self._response(request.service)

    async def watch(
        self,
        call: RpcCall,  # noqa: ARG002 - the gate's signature
        request: health_pb2.HealthCheckRequest,
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Yield the status now and each time it changes."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            reported = None
            while True:
                response = self._response(request.service)
                if response != reported:
                    reported = response
                    yield response
                elif self._is_ended:
                    return
                else:
                    changed.clear()
                    await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _wake_watchers(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._names:
            return health_pb2.HealthCheckResponse(status=_SERVICE_UNKNOWN)
        is_serving = self.is_serving or service == LIVENESS
        status = _SERVING if is_serving else _NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)
