"""Find where requests end and where replies start in the bytes of a connection.

A fault that is worth something hits a reply *after* the server did the work. For that the proxy
must know which bytes are the reply to which request. A dialect watches both directions, copies
nothing and changes nothing: `requests` names what the bytes going up complete, `replies` names
the offsets at which replies start in the bytes coming down.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

SCRIPT_CALLS = frozenset({"EVAL", "EVALSHA", "FCALL"})
"""Redis commands that run a script which may write."""


@dataclass(frozen=True, slots=True)
class Request:
    """One whole request that went up; `key` is found again in its `Reply`."""

    key: Hashable
    name: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The first byte of the reply to the request `key`, `offset` bytes into the data."""

    key: Hashable
    offset: int


class Dialect(Protocol):
    """What one connection speaks. One instance a connection."""

    def requests(self, data: bytes) -> list[Request]:
        """Take bytes going up; return the requests that they complete."""
        ...

    def replies(self, data: bytes) -> list[Reply]:
        """Take bytes coming down; return the replies that start in them."""
        ...


class RawDialect:
    """Any protocol that answers each write before the next one: a chunk is a request."""

    def __init__(self) -> None:
        """Start with nothing outstanding."""
        self._count = 0
        self._outstanding: list[int] = []

    def requests(self, data: bytes) -> list[Request]:
        """Count each chunk as one request."""
        del data
        self._count += 1
        self._outstanding.append(self._count)
        return [Request(self._count, "chunk")]

    def replies(self, data: bytes) -> list[Reply]:
        """Take any bytes as the start of all replies that are due."""
        del data
        due, self._outstanding = self._outstanding, []
        return [Reply(key, 0) for key in due]


class RespDialect:
    """Redis: replies come in the order of the commands, pushes (RESP3) come in between.

    SUBSCRIBE, MONITOR and a replication link break that order: use `RawDialect` there.
    """

    def __init__(self) -> None:
        """Start before the first command."""
        self._commands = _Commands()
        self._values = _Values()
        self._sent = 0
        self._outstanding: deque[int] = deque()

    def requests(self, data: bytes) -> list[Request]:
        """Return the commands completed by `data`, named in capitals."""
        found = []
        for name in self._commands.feed(data):
            self._sent += 1
            self._outstanding.append(self._sent)
            found.append(Request(self._sent, name))
        return found

    def replies(self, data: bytes) -> list[Reply]:
        """Return the replies that start in `data`."""
        offsets = list(self._values.feed(data))
        expected = min(len(offsets), len(self._outstanding))
        return [Reply(self._outstanding.popleft(), offsets[i]) for i in range(expected)]


class _Commands:
    """Split the client's half of a RESP connection into commands."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[str]:
        self._buffer += data
        while (found := self._first()) is not None:
            name, end = found
            del self._buffer[:end]
            yield name

    def _first(self) -> tuple[str, int] | None:
        """Return name and end of the first command, None while it is not whole."""
        line_end = self._buffer.find(b"\r\n")
        if line_end < 0:
            return None
        head, end = bytes(self._buffer[:line_end]), line_end + 2
        if not head.startswith(b"*"):  # an inline command
            return (head.split() or [b""])[0].decode("latin-1").upper(), end
        name = b""
        for position in range(int(head[1:])):
            line_end = self._buffer.find(b"\r\n", end)
            if line_end < 0:
                return None
            start = line_end + 2
            stop = start + int(self._buffer[end + 1 : line_end])
            end = stop + 2
            if end > len(self._buffer):
                return None
            if position == 0:
                name = bytes(self._buffer[start:stop])
        return name.decode("latin-1").upper(), end


class _Values:
    """Walk over the server's half of a RESP connection without keeping it."""

    _BULKS = b"$=!"
    _LISTS = b"*~>"
    _MAPS = b"%|"
    _NOT_A_REPLY = b">|"  # a push, an attribute before the reply proper

    def __init__(self) -> None:
        self._missing = 0  # values still to come of the one that is being read
        self._skip = 0  # bytes still to come of a bulk string
        self._line = bytearray()

    def feed(self, data: bytes) -> Iterator[int]:
        """Yield the offsets at which replies start."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                at += step
                self._skip -= step
                self._missing -= not self._skip
                continue
            if not self._missing and not self._line:
                self._missing = 1
                if data[at] not in self._NOT_A_REPLY:
                    yield at
            end = data.find(b"\n", at)
            self._line += data[at:] if end < 0 else data[at : end + 1]
            at = len(data) if end < 0 else end + 1
            if end >= 0:
                self._take_line()

    def _take_line(self) -> None:
        kind, text = self._line[0], bytes(self._line[1:-2])
        self._line.clear()
        if kind in self._BULKS and int(text) >= 0:
            self._skip = int(text) + 2
        elif kind in self._LISTS:
            self._missing += max(int(text), 0) - 1
        elif kind in self._MAPS:
            self._missing += 2 * int(text) - 1
        else:
            self._missing -= 1


class GrpcDialect:
    """gRPC over HTTP/2: the n-th message up a stream is answered by its n-th message down.

    That is exact for unary calls and for streams that answer each message with one. An end of the
    stream (an error, say) counts as the reply to the next message. The server sends a unary reply
    only when its handler has returned, so a reply that has started means that the work is done.
    """

    def __init__(self) -> None:
        """Start before the connection preface."""
        self._up, self._down = _Frames(preface_bytes=24), _Frames()
        self._asked: defaultdict[int, _Messages] = defaultdict(_Messages)
        self._replies: defaultdict[int, _Messages] = defaultdict(_Messages)

    def requests(self, data: bytes) -> list[Request]:
        """Return the messages completed by `data`, keyed by (stream, number)."""
        found = []
        for piece in self._up.feed(data):
            if piece.kind == _DATA:
                _, ended = self._asked[piece.stream].feed(piece.payload)
                found += [Request((piece.stream, number), "message") for number in ended]
        return found

    def replies(self, data: bytes) -> list[Reply]:
        """Return the reply messages, or ends of streams, that start in `data`."""
        found = []
        for piece in self._down.feed(data):
            if piece.kind == _DATA:
                started, _ = self._replies[piece.stream].feed(piece.payload)
                found += [Reply((piece.stream, n), piece.offset + at) for n, at in started]
            if piece.is_last:
                following = self._replies[piece.stream].started + 1
                found.append(Reply((piece.stream, following), piece.offset))
                self._replies.pop(piece.stream)
                self._asked.pop(piece.stream, None)
        return found


_DATA, _HEADERS, _RST_STREAM = 0, 1, 3
_END_STREAM = 0x1
_FRAME_HEADER_BYTES, _MESSAGE_PREFIX_BYTES = 9, 5


class _Messages:
    """Count the length-prefixed messages of one direction of one stream."""

    def __init__(self) -> None:
        self.started = self.ended = 0
        self._prefix = bytearray()
        self._left = 0

    def feed(self, payload: bytes) -> tuple[list[tuple[int, int]], list[int]]:
        """Return (number, offset) of the messages that start, the numbers of those that end."""
        started, ended, at = [], [], 0
        while at < len(payload):
            if not self._left and not self._prefix:
                self.started += 1
                started.append((self.started, at))
            at = self._take(payload, at)
            if not self._left and not self._prefix:
                self.ended += 1
                ended.append(self.ended)
        return started, ended

    def _take(self, payload: bytes, at: int) -> int:
        """Take the rest of the prefix or of the body; return where that ends."""
        if self._left:
            step = min(self._left, len(payload) - at)
            self._left -= step
            return at + step
        step = min(_MESSAGE_PREFIX_BYTES - len(self._prefix), len(payload) - at)
        self._prefix += payload[at : at + step]
        if len(self._prefix) == _MESSAGE_PREFIX_BYTES:
            self._left = int.from_bytes(self._prefix[1:], "big")
            self._prefix.clear()
        return at + step


@dataclass(frozen=True, slots=True)
class _Piece:
    """A frame, or a part of a DATA frame; `offset` is where its bytes start in the data fed."""

    kind: int
    stream: int
    offset: int
    payload: bytes
    is_last: bool


class _Frames:
    """Walk over one direction of an HTTP/2 connection. gRPC never pads its frames."""

    def __init__(self, preface_bytes: int = 0) -> None:
        self._skip = preface_bytes
        self._header = bytearray()
        self._frame = (-1, 0, 0)  # kind, flags, stream of the frame whose body is being read

    def feed(self, data: bytes) -> Iterator[_Piece]:
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                if self._frame[0] == _DATA:
                    yield self._piece(at, data[at : at + step])
                at += step
                continue
            start = at
            at += self._take_header(data, at)
            if len(self._header) == _FRAME_HEADER_BYTES:
                self._open_frame()
                if self._frame[0] in (_HEADERS, _RST_STREAM) or not self._skip:
                    yield self._piece(start, b"")

    def _take_header(self, data: bytes, at: int) -> int:
        step = min(_FRAME_HEADER_BYTES - len(self._header), len(data) - at)
        self._header += data[at : at + step]
        return step

    def _open_frame(self) -> None:
        self._skip = int.from_bytes(self._header[:3], "big")
        stream = int.from_bytes(self._header[5:], "big") & 0x7FFFFFFF
        self._frame = (self._header[3], self._header[4], stream)
        self._header.clear()

    def _piece(self, offset: int, payload: bytes) -> _Piece:
        kind, flags, stream = self._frame
        is_whole = kind != _DATA or not self._skip
        ends = kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and bool(flags & _END_STREAM))
        return _Piece(kind, stream, offset, payload, is_whole and ends)
