"""The metrics port over a real connection: who may read, and what is served."""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
import pytest
import trustme
from aiohttp import web

from service.metrics.http import MetricsServer, bearer
from service.metrics.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.metrics.http import Access
    from service.metrics.recorder import Snapshot


class OneToken:
    """Lets the bearer of one token in."""

    def allows(self, token: str | None, _names: object) -> bool:
        """Return whether it is the one."""
        return token == "right"  # noqa: S105 - of a test


async def length(request: web.Request) -> web.Response:
    """Return how long the body is."""
    return web.Response(text=str(len(await request.read())))


async def bug(_request: web.Request) -> web.Response:
    """Fail, with what nobody may see."""
    raise RuntimeError("hunter2")


@asynccontextmanager
async def served(
    access: Access | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serve the metrics of a recorder that counted one login; give the address."""
    recorder = Recorder({})
    recorder.add("timernn_logins_total", "accepted")

    async def snapshot() -> Snapshot:
        return recorder.snapshot()

    server = MetricsServer(snapshot, access, [web.post("/length", length), web.get("/bug", bug)])
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


def request(first: str, *headers: str, body: str = "") -> str:
    """Return a request with a secret in each place that a client can fill."""
    return "\r\n".join([f"{first} HTTP/1.1", "Host: localhost", *headers, "", body])


LONG = "hunter2" * 2000
MALFORMED = {
    "no HTTP": "hunter2\r\n\r\n",
    "no header": request("GET /", "hunter2"),
    "a header's bytes": request("GET /", "Cookie: hunter2\0"),
    "a long first line": request(f"GET /{LONG}"),
    "a long header": request("GET /", f"X: {LONG}"),
    "many headers": request("GET /", *(f"X{number}: hunter2" for number in range(2000))),
    "bad chunks": request("POST /length", "Transfer-Encoding: chunked", body="hunter2\r\n"),
    "bad gzip": request(
        "POST /length", "Content-Encoding: gzip", "Content-Length: 7", body="hunter2"
    ),
    "two lengths": request("POST /length", "Content-Length: 7", "Transfer-Encoding: chunked"),
    "a bad length": request("POST /length", "Content-Length: hunter2"),
    "a bad URL": request("GET http://[hunter2/"),
    "no such method": request("HUNTER2 /"),
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": "GET /hunter2 HTTP/9.9\r\n\r\n",
    "TLS": "\x16\x03\x01\0\xf8\x01hunter2",
}
REFUSED = {
    "not found": (404, request("GET /hunter2")),
    "a name in OPTIONS": (404, request("OPTIONS *", "X: hunter2")),
    "an upgrade": (404, request("GET /hunter2", "Connection: Upgrade", "Upgrade: hunter2")),
    "another method": (405, request("DELETE /metrics?hunter2")),
    "a large body": (
        413, request("POST /length", f"Content-Length: {9 * len(LONG)}", body=9 * LONG)
    ),
    "Expect": (417, request("POST /length", "Expect: hunter2", "Content-Length: 0")),
    "Expect of nothing": (417, request("GET /none", "Expect: hunter2")),
    "another Host": (421, "GET / HTTP/1.1\r\nHost: hunter2\r\n\r\n"),
    "another Host in CONNECT": (421, request("CONNECT hunter2:443")),
    "a bug": (500, request("GET /bug?hunter2")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "sent"),
    [*((400, sent) for sent in MALFORMED.values()), *REFUSED.values()],
    ids=[*MALFORMED, *REFUSED],
)
async def test_an_error_shows_nothing_of_the_inside_and_nothing_that_was_sent(
    status: int, sent: str
) -> None:
    """Each has the headers of every answer, and a body that is the status in words."""
    async with served() as address:
        answer = (await answered(address, sent.encode("latin-1"))).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert re.match(rf"HTTP/1\.[01] {status} ", head)
    assert re.findall(r"(?m)^(?:Server|Cache-Control): .*?(?=\r|$)", head) == [
        "Cache-Control: no-store",
        "Server: timernn",
    ]
    assert re.fullmatch(r"[A-Za-z ]+\n?", body)
    assert not re.search("(?i)hunter2|aiohttp|python", answer)


async def test_plain_http_on_a_port_with_tls_is_no_answer() -> None:
    """The connection ends; at most an alert of TLS says why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    async with served(context=context) as address:
        answer = await answered(address, request("GET /hunter2").encode())
    assert answer[:1] in {b"", b"\x15"}
    assert len(answer) <= 7


async def answered(address: str, sent: bytes) -> bytes:
    """Send bytes, and return what comes back until the connection ends or the whole answer is there."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        return head + await reader.readexactly(int(found[1]) if found else 0)
    except asyncio.IncompleteReadError as ended:
        return ended.partial
    finally:
        writer.close()


def test_a_bearer_is_read_from_the_header() -> None:
    """The scheme in any case; another one is no token."""
    assert bearer("bearer  abc ") == "abc"
    assert bearer("Basic abc") is None
    assert bearer("Bearer ") is None
    assert bearer(None) is None
