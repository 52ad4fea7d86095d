"""Starts what measures and shows: the metrics port, or a worker's part of its supervisor's.

Imported where there is such a port: aiohttp takes a quarter of a second, which other servers start sooner.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from service.listening import is_loopback
from service.metrics.http import MetricsServer, OpenAccess
from service.metrics.sampling import sample_lag, sample_sessions
from service.metrics.workers import WorkerSocket
from service.security.roles import Role

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from contextlib import AsyncExitStack

    from aiohttp.web import RouteDef

    from service.access import Access
    from service.metrics.http import Access as Readers
    from service.metrics.recorder import Recorder, Snapshot
    from service.security.certificates import ServerCertificate
    from service.security.tokens import TokenSet
    from service.settings import Settings


class TokenReaders:
    """Lets those read the metrics who see all tenants, or run one."""

    def __init__(self, tokens: Callable[[], TokenSet]) -> None:
        """Keep where the tokens are."""
        self._tokens = tokens

    def allows(self, token: str | None, certificate_names: Iterable[str]) -> bool:
        """Return whether the entry of a token, or without one of a certificate, is valid and of ADMIN or OPERATOR."""
        tokens = self._tokens()
        entry = tokens.find(token) if token else tokens.of_certificate(certificate_names)
        is_valid = entry is not None and not entry.has_expired(datetime.now(UTC))
        return is_valid and entry is not None and entry.role in {Role.ADMIN, Role.OPERATOR}


class MetricsTls:
    """The certificate on the metrics port: that of the clients' port, renewed with it.

    With an authority of client certificates, a client may show one of it, and one of another ends the connection. It
    need not: what scrapes has a token, and a browser has a cookie.
    """

    def __init__(self, settings: Settings) -> None:
        """Read the files, which were found good before."""
        self._files = (settings.tls_cert, settings.tls_key)
        self._client_ca = settings.tls_client_ca
        self._now = self.context = self._read()
        self.context.sni_callback = self._hand_over

    def change(self, _certificate: ServerCertificate) -> None:
        """Go by what the files hold now from the next connection on."""
        self._now = self._read()

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files)
        if self._client_ca:
            context.verify_mode = ssl.CERT_OPTIONAL
            context.load_verify_locations(self._client_ca)
            # A connection that goes on where another ended would show a certificate that is not verified again.
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
        return context

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        """Have a connection that begins go by the newest context: an authority cannot be taken out of an old one."""
        connection.context = self._now


async def start_measuring(
    recorder: Recorder,
    count_sessions: Callable[[], Awaitable[Mapping[str, int]]],
    access: Access,
    *,
    settings: Settings,
    stack: AsyncExitStack,
) -> None:
    """Begin to measure what nobody reports; the stack ends it."""
    recorder.set("timernn_start_time_seconds", time.time())
    recorder.ask(lambda: access.gauges(time.time()))
    tasks = (
        asyncio.ensure_future(sample_lag(recorder)),
        asyncio.ensure_future(
            sample_sessions(recorder, count_sessions, names_tenants=settings.metrics_tenants)
        ),
        asyncio.ensure_future(_show_errors(recorder, access)),
    )
    for task in tasks:
        stack.callback(task.cancel)


async def serve_metrics(
    snapshot: Callable[[], Awaitable[Snapshot]],
    access: Access,
    *,
    settings: Settings,
    stack: AsyncExitStack,
    routes: Iterable[RouteDef],
) -> tuple[str, MetricsTls | None]:
    """Serve the metrics port; return its address, and its certificate if it has one.

    Args:
        snapshot: Gives the values now.
        access: The tokens.
        settings: Where, and the certificate.
        stack: Ends it.
        routes: What is served beside /metrics.

    Raises:
        OSError: If the address cannot be listened on.
    """
    listen = settings.metrics_listen
    readers: Readers = OpenAccess()
    tokens = access.tokens
    if tokens is not None and not is_loopback(listen):
        readers = TokenReaders(lambda: tokens.value)
    server = MetricsServer(snapshot, readers, routes)
    tls = MetricsTls(settings) if settings.tls_cert and not is_loopback(listen) else None
    stack.push_async_callback(server.stop)
    return await server.start(listen, tls.context if tls else None), tls


async def serve_worker(
    recorder: Recorder, listen: str, stack: AsyncExitStack, *, routes: Iterable[RouteDef]
) -> None:
    """Answer the supervisor, which serves the port for all workers."""
    socket = WorkerSocket(recorder, routes=routes)
    stack.push_async_callback(socket.stop)
    await socket.start(listen)


async def _show_errors(recorder: Recorder, access: Access) -> None:
    while True:
        for name, has_error in access.errors().items():
            recorder.set("timernn_file_errors", has_error, name)
        await asyncio.sleep(1)
