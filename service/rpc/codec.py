"""Between bytes and messages, within the limit on their size.

Messages reach gRPC as bytes and are parsed here: what cannot be parsed is then refused with a
reason, and not by gRPC with UNKNOWN.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from service.rpc.errors import malformed, message_too_large
from service.rpc.wire import Wire

M = TypeVar("M", bound=Message)


class Codec:
    """Parses and serializes messages of at most `message_bytes`."""

    def __init__(self, message_bytes: int) -> None:
        self._message_bytes = message_bytes
        self._wires: dict[type[Message], Wire] = {}

    def parse(self, message_class: type[M], raw: bytes) -> M:
        """Return a message from its bytes, or raise MALFORMED or MESSAGE_TOO_LARGE."""
        if len(raw) > self._message_bytes:
            raise message_too_large("request", len(raw), self._message_bytes)
        wire = self._wires.get(message_class)
        if wire is None:
            wire = self._wires[message_class] = Wire(message_class)
        wire.check(raw)
        try:
            return message_class.FromString(raw)
        except DecodeError as error:
            raise malformed(message_class.DESCRIPTOR.name) from error

    def serialize(self, message: Message) -> bytes:
        """Return a message's bytes, or raise MESSAGE_TOO_LARGE."""
        raw = message.SerializeToString()
        if len(raw) > self._message_bytes:
            raise message_too_large("answer", len(raw), self._message_bytes)
        return raw
