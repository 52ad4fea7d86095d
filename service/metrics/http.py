"""The metrics port: Prometheus' text and a page over HTTP, apart from the port that clients use."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol

from aiohttp import web

from service.listening import UNIX, is_loopback
from service.metrics.exposition import as_text

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterable

    from service.metrics.recorder import Snapshot

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FORWARDED_FOR: Final = "X-Forwarded-For"
FORWARDED_PROTO: Final = "X-Forwarded-Proto"
FORWARDED_NAMES: Final = "X-Forwarded-Certificate-Names"
"""Headers by which the supervisor says to a worker from whom a request is."""

_BODY_BYTES: Final = 16 << 10
_SHUTDOWN_S: Final = 1.0  # for answers under way when the server ends
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; form-action 'none';"
    " frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "Server": "timernn",
    "X-Content-Type-Options": "nosniff",
}

_LOGGER = logging.getLogger(__name__)


class Access(Protocol):
    """Decides who may read the metrics."""

    def allows(self, token: str | None, certificate_names: Iterable[str]) -> bool:
        """Return whether the bearer of a token may; without one, the holder of a certificate with these names."""


class OpenAccess:
    """Lets everybody read who can reach the port."""

    def allows(self, token: str | None, certificate_names: Iterable[str]) -> bool:  # noqa: ARG002 - the protocol's
        """Return True."""
        return True


class _Connection(web.RequestHandler):
    """One client's connection: every answer on it says what we say, the ones that aiohttp itself makes too.

    aiohttp would name itself and Python to whoever sends what is no HTTP, and send back a part of it.
    """

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, *_: object, **__: object
    ) -> web.StreamResponse:
        """Return the answer to what cannot be read as a request, after which the connection ends.

        What was wrong with it is not looked at: it quotes what was sent, which may be a secret.
        """
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer has been sent")
        response = web.Response(status=status, text=_phrase(status))
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer."""
        if isinstance(resp, web.HTTPException):  # only aiohttp raises these
            resp.text = _phrase(resp.status)
        resp.headers.update(_HEADERS)
        return await super().finish_response(request, resp, start_time)


class HttpPort:
    """Serves routes on one address."""

    def __init__(self, routes: Iterable[web.RouteDef] = ()) -> None:
        """Keep what to serve."""
        self._is_local = False
        self._app = web.Application(
            client_max_size=_BODY_BYTES, middlewares=[_guarded, self._meant_for_here]
        )
        self._app.router.add_routes(routes)
        self._runner = web.AppRunner(self._app, shutdown_timeout=_SHUTDOWN_S)
        self._listening: asyncio.Server | None = None

    async def start(self, listen: str, context: ssl.SSLContext | None = None) -> str:
        """Serve on HOST:PORT or unix:PATH; return the address with the port that was given.

        Raises:
            OSError: If the address cannot be listened on.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        if listen.startswith(UNIX):
            path = listen.removeprefix(UNIX)
            self._listening = await loop.create_unix_server(self._connection, path)
            return listen
        host, _, port = listen.rpartition(":")
        self._is_local = is_loopback(listen)
        self._listening = await loop.create_server(
            self._connection, host.strip("[]"), int(port), ssl=context
        )
        return f"{host}:{self._listening.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop serving."""
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    def _connection(self) -> _Connection:
        server = self._runner.server
        assert server is not None  # noqa: S101 - it was set up
        loop = asyncio.get_running_loop()
        # Nobody is logged by aiohttp: a scrape each few seconds is no event.
        silent: Any = None  # aiohttp's own runner gives None too, though its types do not allow it
        return _Connection(server, loop=loop, keepalive_timeout=60, access_log=silent)

    @web.middleware
    async def _meant_for_here(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other names for a loopback address: a web page whose name leads here could read all."""
        if self._is_local and not _is_local_name(request.url.host or ""):
            return _refusal(421, "expected an address or localhost in Host")
        return await handler(request)


class MetricsServer(HttpPort):
    """Serves `/metrics`, and other routes beside it."""

    def __init__(
        self,
        snapshot: Callable[[], Awaitable[Snapshot]],
        access: Access | None = None,
        routes: Iterable[web.RouteDef] = (),
    ) -> None:
        """Keep where the values come from.

        Args:
            snapshot: Gives the values now.
            access: Who may read them; everybody by default.
            routes: What else is served.
        """
        super().__init__([web.get("/metrics", self._authorised(self._metrics)), *routes])
        self._snapshot = snapshot
        self._access = access or OpenAccess()

    def _authorised(self, handler: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            token = bearer(request.headers.get("Authorization"))
            if not self._access.allows(token, certificate_names_of(request)):
                refusal = _refusal(401, "a token is needed")
                refusal.headers["WWW-Authenticate"] = 'Bearer realm="timernn"'
                return refusal
            return await handler(request)

        return checked

    async def _metrics(self, request: web.Request) -> web.Response:
        text, content_type = as_text(await self._snapshot(), request.headers.get("Accept", ""))
        return web.Response(body=text, headers={"Content-Type": content_type})


def _is_local_name(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def peer_of(request: web.Request) -> str:
    """Return the address at the other end, as HOST:PORT, or [HOST]:PORT of IPv6."""
    found: Any = request.transport.get_extra_info("peername") if request.transport else None
    if not isinstance(found, tuple):
        return "unix:"
    host, port = found[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def certificate_names_of(request: web.Request) -> list[str]:
    """Return the subject alternative names of the client's certificate, which the connection verified.

    They are written as gRPC writes them; empty where the client showed none.
    """
    found: Any = request.get_extra_info("peercert") or {}
    names = []
    for kind, name in found.get("subjectAltName", ()):
        if kind in {"DNS", "URI", "email"}:
            names.append(name)
        elif kind == "IP Address":
            names.append(str(ipaddress.ip_address(name)))
    return names


def bearer(authorization: str | None) -> str | None:
    """Return the token of an Authorization header; None if it holds none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let nothing of an error out: aiohttp's own page would name our modules."""
    try:
        return await handler(request)
    except web.HTTPException:
        raise
    except web.RequestPayloadError:  # a body that is not in the form that its headers say
        return _refusal(400, _phrase(400))
    except Exception:
        _LOGGER.exception("the metrics port failed to answer")
        return _refusal(500, "internal error")


def _refusal(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase
