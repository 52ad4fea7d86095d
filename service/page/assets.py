"""The files of the page, served from memory; nothing of them is secret, and none names another server."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_FILES: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uPlot.js": ("uplot/uPlot.iife.min.js", "text/javascript"),
    "/uPlot.css": ("uplot/uPlot.min.css", "text/css"),
}


def asset_routes() -> list[web.RouteDef]:
    """Return what serves the page's files."""
    folder = resources.files("service.page").joinpath("static")
    return [
        web.get(path, _served(folder.joinpath(name).read_bytes(), content_type))
        for path, (name, content_type) in _FILES.items()
    ]


def _served(body: bytes, content_type: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def serve(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return serve
