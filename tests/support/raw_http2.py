"""A client of HTTP/2 that does what no gRPC library would: sends parts of messages, or resets at once.

It writes frames by hand (RFC 9113) and keeps to flow control, since a server may close on who does not.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK = 1, 1
CANCEL = 8
_INITIAL_WINDOW_SIZE = 4
_FRAME_BYTES = 16_384
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def request_headers(path: str) -> bytes:
    """Return the header block of a gRPC call, without compression (RFC 7541, literal fields)."""
    name = path.encode()
    return (
        b"\x83\x86\x44" + bytes([len(name)]) + name + b"\x41\x01x"
        b"\x40\x02te\x08trailers\x5f\x10application/grpc"
    )  # fmt: skip


class RawConnection:
    """One connection.

    Attributes:
        ended: The streams that the server has ended.
        is_closed: Whether the server has closed the connection, or announced it.
    """

    def __init__(self, address: str) -> None:
        """Connect and send the preface."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setblocking(False)
        self._received = b""
        self._initial = self._window = 65_535
        self._windows: dict[int, int] = {}
        self._next_stream = 1
        self.ended: set[int] = set()
        self.is_closed = False
        self._write(_PREFACE)
        self._frame(SETTINGS, 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def open(self, path: str, *, reset: bool = False) -> int:
        """Begin a call and return its stream; reset it in the same moment if asked to."""
        stream = self._next_stream
        self._next_stream += 2
        self._windows[stream] = self._initial
        self._frame(HEADERS, 4, stream, request_headers(path))
        if reset:
            self._frame(RST_STREAM, 0, stream, CANCEL.to_bytes(4, "big"))
        return stream

    def send_parts(self, streams: list[int], announced: int, sent: int, *, limit_s: float) -> int:
        """Send parts of one message on each stream, as far as the server lets; return their bytes.

        Args:
            streams: Where.
            announced: The size that the message says to have, in bytes.
            sent: How much of it is sent, in bytes.
            limit_s: Stop after so many seconds, or once nothing may be sent for two.
        """
        left = dict.fromkeys(streams, sent)
        prefix = b"\0" + announced.to_bytes(4, "big")
        total, began = 0, time.monotonic()
        last = began
        for stream in streams:
            self._data(stream, prefix)
        while any(left.values()) and time.monotonic() < min(began + limit_s, last + 2):
            self.receive(0)
            moved = 0
            for stream, rest in left.items():
                if stream in self.ended:
                    left[stream] = 0
                    continue
                size = min(rest, self._windows[stream], self._window, _FRAME_BYTES)
                if size > 0:
                    self._data(stream, bytes(size))
                    left[stream] -= size
                    moved += size
            total += moved
            if moved:
                last = time.monotonic()
            else:
                self.receive(0.05)
        return total

    def receive(self, timeout_s: float) -> None:
        """Take what the server has sent, waiting for it at most so long."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return
        try:
            data = self._socket.recv(1 << 20)
        except OSError:
            data = b""
        self.is_closed = self.is_closed or not data
        self._received += data
        while len(self._received) >= 9:
            size = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + size:
                break
            head, body = self._received[:9], self._received[9 : 9 + size]
            self._received = self._received[9 + size :]
            self._on_frame(head[3], head[4], int.from_bytes(head[5:9], "big"), body)

    def _on_frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(body), 6):
                if int.from_bytes(body[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                    value = int.from_bytes(body[at + 2 : at + 6], "big")
                    for each in self._windows:
                        self._windows[each] += value - self._initial
                    self._initial = value
            self._frame(SETTINGS, ACK, 0)
        elif kind == WINDOW_UPDATE:
            if stream:
                self._windows[stream] += int.from_bytes(body, "big")
            else:
                self._window += int.from_bytes(body, "big")
        elif kind == PING and not flags & ACK:
            self._frame(PING, ACK, 0, body)
        elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
            self.ended.add(stream)
        elif kind == GOAWAY:
            self.is_closed = True

    def _data(self, stream: int, body: bytes) -> None:
        self._windows[stream] -= len(body)
        self._window -= len(body)
        self._frame(DATA, 0, stream, body)

    def _frame(self, kind: int, flags: int, stream: int, body: bytes = b"") -> None:
        head = len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        self._write(head + body)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                select.select([], [self._socket], [], 1)
                data = data[self._socket.send(data) :]
        except OSError:
            self.is_closed = True
