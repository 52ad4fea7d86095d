"""The metrics port over a real connection: who may read, and what is served."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import trustme

from service.metrics.http import MetricsServer, bearer
from service.metrics.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.metrics.http import Access
    from service.metrics.recorder import Snapshot


class OneToken:
    """Lets the bearer of one token in."""

    def allows(self, token: str | None) -> bool:
        """Return whether it is the one."""
        return token == "right"  # noqa: S105 - of a test


@asynccontextmanager
async def served(
    access: Access | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serve the metrics of a recorder that counted one login; give the address."""
    recorder = Recorder({})
    recorder.add("timernn_logins_total", "accepted")

    async def snapshot() -> Snapshot:
        return recorder.snapshot()

    server = MetricsServer(snapshot, access)
    try:
        yield await server.start("127.0.0.1:0", context)
    finally:
        await server.stop()


async def test_metrics_are_text_for_prometheus() -> None:
    """With its content type, and headers that let nothing be cached or framed."""
    async with (
        served() as address,
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}/metrics") as response,
    ):
        text = await response.text()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    assert response.headers["Cache-Control"] == "no-store"
    assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert 'timernn_logins_total{result="accepted"} 1.0' in text


async def test_openmetrics_is_served_to_whoever_asks() -> None:
    """The Accept header chooses."""
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    async with (
        served() as address,
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}/metrics", headers=accept) as response,
    ):
        text = await response.text()
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


async def test_without_the_right_token_there_are_no_metrics() -> None:
    """Missing and wrong get the same answer."""
    bodies = []
    async with served(OneToken()) as address, aiohttp.ClientSession() as session:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            async with session.get(f"http://{address}/metrics", headers=headers) as response:
                assert response.status == 401
                bodies.append(await response.text())
        right = {"Authorization": "Bearer right"}
        async with session.get(f"http://{address}/metrics", headers=right) as response:
            assert response.status == 200
    assert set(bodies) == {"a token is needed\n"}


async def test_metrics_go_over_tls() -> None:
    """With the context that is handed in."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with (
        served(context=context) as address,
        aiohttp.ClientSession() as session,
        session.get(f"https://{address}/metrics", ssl=trusting) as response,
    ):
        assert response.status == 200


async def test_a_failure_shows_nothing_of_the_inside() -> None:
    """It is a line in the log, and a status to the client."""

    async def snapshot() -> Snapshot:
        raise RuntimeError("secret")

    server = MetricsServer(snapshot)
    address = await server.start("127.0.0.1:0")
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{address}/metrics") as response,
        ):
            assert (response.status, await response.text()) == (500, "internal error\n")
    finally:
        await server.stop()


def test_a_bearer_is_read_from_the_header() -> None:
    """The scheme in any case; another one is no token."""
    assert bearer("bearer  abc ") == "abc"
    assert bearer("Basic abc") is None
    assert bearer("Bearer ") is None
    assert bearer(None) is None
