"""The metrics port: Prometheus' text and a page over HTTP, apart from the port that clients use."""

from __future__ import annotations

import ipaddress
import logging
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
"""Headers by which the supervisor says to a worker from whom a request is."""

_BODY_BYTES: Final = 16 << 10
_SHUTDOWN_S: Final = 1.0  # for answers under way when the server ends
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; form-action 'none';"
    " frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_LOGGER = logging.getLogger(__name__)


class Access(Protocol):
    """Decides who may read the metrics."""

    def allows(self, token: str | None) -> bool:
        """Return whether the bearer of a token may; None: there was none."""


class OpenAccess:
    """Lets everybody read who can reach the port."""

    def allows(self, token: str | None) -> bool:  # noqa: ARG002 - the protocol's
        """Return True."""
        return True


class HttpPort:
    """Serves routes on one address."""

    def __init__(self, routes: Iterable[web.RouteDef] = ()) -> None:
        """Keep what to serve."""
        self._is_local = False
        self._app = web.Application(
            client_max_size=_BODY_BYTES, middlewares=[_guarded, self._meant_for_here]
        )
        self._app.on_response_prepare.append(_add_headers)
        self._app.router.add_routes(routes)
        # Nobody is logged by aiohttp: a scrape each few seconds is no event.
        self._runner = web.AppRunner(
            self._app, access_log=None, keepalive_timeout=60, shutdown_timeout=_SHUTDOWN_S
        )

    async def start(self, listen: str, context: ssl.SSLContext | None = None) -> str:
        """Serve on HOST:PORT or unix:PATH; return the address with the port that was given.

        Raises:
            OSError: If the address cannot be listened on.
        """
        await self._runner.setup()
        if listen.startswith(UNIX):
            await web.UnixSite(self._runner, listen.removeprefix(UNIX)).start()
            return listen
        host, _, port = listen.rpartition(":")
        self._is_local = is_loopback(listen)
        await web.TCPSite(self._runner, host.strip("[]"), int(port), ssl_context=context).start()
        found: Any = self._runner.addresses[0]
        return f"{host}:{found[1]}"

    async def stop(self) -> None:
        """Stop serving."""
        await self._runner.cleanup()

    @web.middleware
    async def _meant_for_here(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other names for a loopback address: a web page whose name leads here could read all."""
        if self._is_local and not _is_local_name(request.url.host or ""):
            raise web.HTTPMisdirectedRequest(text="expected an address or localhost in Host\n")
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
            if not self._access.allows(bearer(request.headers.get("Authorization"))):
                headers = {"WWW-Authenticate": 'Bearer realm="timernn"'}
                raise web.HTTPUnauthorized(text="a token is needed\n", headers=headers)
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
    """Return the address at the other end, as HOST:PORT."""
    found: Any = request.transport.get_extra_info("peername") if request.transport else None
    return f"{found[0]}:{found[1]}" if isinstance(found, tuple) else "unix:"


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
    except Exception:
        _LOGGER.exception("the metrics port failed to answer")
        raise web.HTTPInternalServerError(text="internal error\n") from None


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
    response.headers["Server"] = "timernn"
