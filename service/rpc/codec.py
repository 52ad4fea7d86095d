"""Between bytes and messages, within the limit on their size.

Messages reach gRPC as bytes and are parsed here: what cannot be parsed is then refused with a
reason, and not by gRPC with UNKNOWN.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from service.rpc.errors import malformed, message_too_large
from service.rpc.wire import SMALL_BYTES, Wire

M = TypeVar("M", bound=Message)


class Codec:
    """Parses and serializes messages of at most `message_bytes`."""

    def __init__(self, message_bytes: int) -> None:
        self._message_bytes = message_bytes
        self._wires: dict[type[Message], Wire] = {}

    def parse(self, message_class: type[M], raw: bytes) -> M:
        """Return a message from its bytes, or raise MALFORMED or MESSAGE_TOO_LARGE."""
        size = len(raw)
        if size > self._message_bytes:
            raise message_too_large("request", size, self._message_bytes)
        if size > SMALL_BYTES:
            self._check_parts(message_class, raw)
        try:
            return message_class.FromString(raw)
        except DecodeError as error:
            raise malformed(message_class.DESCRIPTOR.name) from error

    def _check_parts(self, message_class: type[Message], raw: bytes) -> None:
        wire = self._wires.get(message_class)
        if wire is None:
            wire = self._wires[message_class] = Wire(message_class)
        wire.check(raw)

    def serialize(self, message: Message) -> bytes:
        """Return a message's bytes, or raise MESSAGE_TOO_LARGE."""
        raw = message.SerializeToString()
        size = len(raw)
        if size > self._message_bytes:
            raise message_too_large("answer", size, self._message_bytes)
        return raw
