import random

import pytest

from instruments.dialects import GrpcDialect, RespDialect


def command(*args: bytes) -> bytes:
    """Encode a command as a Redis client does."""
    parts = [b"*%d\r\n" % len(args), *(b"$%d\r\n%s\r\n" % (len(a), a) for a in args)]
    return b"".join(parts)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Encode one HTTP/2 frame."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def message(body: bytes) -> bytes:
    """Encode one gRPC message."""
    return b"\0" + len(body).to_bytes(4, "big") + body


def cuts(data: bytes, seed: int) -> list[bytes]:
    """Cut `data` at random places."""
    rng = random.Random(seed)
    places = sorted(rng.sample(range(1, len(data)), 12))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def starts(dialect: RespDialect | GrpcDialect, chunks: list[bytes]) -> dict[object, int]:
    """Feed replies; return where each starts in the whole."""
    found, before = {}, 0
    for chunk in chunks:
        for reply in dialect.replies(chunk):
            found[reply.key] = before + reply.offset
        before += len(chunk)
    return found


COMMANDS = [(b"GET", b"k"), (b"evalsha", b"\r\n*1\r\n$4", b"0"), (b"HMGET", b""), (b"PING",)]
REPLIES = [
    b"$8\r\n+a\r\n:1\r\n\r\n",
    b"*3\r\n$-1\r\n%1\r\n+x\r\n*0\r\n:5\r\n",
    b"*-1\r\n",
    b"-ERR no\r\n",
]
PUSH = b">2\r\n$3\r\nfoo\r\n*1\r\n+bar\r\n"


@pytest.mark.parametrize("seed", range(20))
def test_resp_commands_are_named_wherever_the_bytes_are_cut(seed: int) -> None:
    """Each command is reported once, when its last byte has arrived, whatever its arguments hold."""
    dialect = RespDialect()
    stream = b"".join(command(*c) for c in COMMANDS)
    names = [r.name for chunk in cuts(stream, seed) for r in dialect.requests(chunk)]
    assert names == ["GET", "EVALSHA", "HMGET", "PING"]


@pytest.mark.parametrize("seed", range(20))
def test_resp_replies_are_found_between_pushes(seed: int) -> None:
    """Each reply's first byte is found; a push, and line ends inside a bulk, are no reply."""
    dialect = RespDialect()
    for words in COMMANDS:
        dialect.requests(command(*words))
    stream, expected = b"", {}
    for number, reply in enumerate(REPLIES, 1):
        stream += PUSH
        expected[number] = len(stream)
        stream += reply
    assert starts(dialect, cuts(stream, seed)) == expected


def test_resp_attribute_belongs_to_the_reply_after_it() -> None:
    """An attribute in front is not taken for the reply."""
    dialect = RespDialect()
    dialect.requests(command(b"GET", b"k"))
    assert starts(dialect, [b"|1\r\n+ttl\r\n:3\r\n", b"$1\r\nv\r\n"]) == {1: 14}


@pytest.mark.parametrize("seed", range(20))
def test_grpc_messages_are_numbered_by_stream(seed: int) -> None:
    """Messages of two streams are reported when complete, also when they span frames."""
    long = message(b"x" * 40)
    stream = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    stream += frame(1, 4, 1, b"head") + frame(0, 0, 1, long[:3]) + frame(1, 4, 3, b"head")
    stream += frame(0, 0, 3, message(b"") + message(b"b")) + frame(0, 1, 1, long[3:])
    dialect = GrpcDialect()
    keys = [r.key for chunk in cuts(stream, seed) for r in dialect.requests(chunk)]
    assert keys == [(3, 1), (3, 2), (1, 1)]


@pytest.mark.parametrize("seed", range(20))
def test_grpc_reply_starts_at_its_message_or_at_the_end_of_the_stream(seed: int) -> None:
    """A reply message is found at its prefix, within a few bytes of a frame's header."""
    head = frame(4, 0, 0, b"123456") + frame(1, 4, 1, b"headers")
    body = head + frame(0, 0, 1, message(b"y" * 30))
    stream = body + frame(1, 5, 1, b"trailers") + frame(3, 0, 3, b"1234")
    found = starts(GrpcDialect(), cuts(stream, seed))
    assert set(found) == {(1, 1), (1, 2), (3, 1)}
    assert found[1, 1] == len(head) + 9
    assert len(body) <= found[1, 2] <= len(body) + 8
