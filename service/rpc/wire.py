"""Counts the parts of a message before it is parsed.

An empty message inside a repeated field takes two bytes on the wire and 50 in memory: 16 MiB of them would be
400 MB and most of a second of parsing. A sensible request has few parts and large tensors, so one with
too many parts is refused unparsed. Small fields are not descended into: all of them together cannot
grow into much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from google.protobuf.descriptor import FieldDescriptor

from service.rpc.errors import malformed

if TYPE_CHECKING:
    from google.protobuf.message import Message

    Fields: TypeAlias = "dict[int, Fields | None]"
    """What may be inside a field: another message's fields, or None for packed numbers."""

SMALL_BYTES: Final = 4096
"""A field up to this size is not descended into: 256 operations of it are 1 MiB, in memory 25 MB."""

MAX_PARTS: Final = 32_768
"""Fields of a message with all that is inside; 10,000 contributions are 10,000."""

MAX_PACKED_BYTES: Final = 128 << 10
"""A list of numbers; 10,000 chunks are 80,000 bytes."""

_MESSAGE: Final = FieldDescriptor.TYPE_MESSAGE
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5


class Wire:
    """Knows in which fields one kind of message can hold many parts."""

    def __init__(self, message_class: type[Message]) -> None:
        self._name = message_class.DESCRIPTOR.name
        self._fields = _fields_of(message_class.DESCRIPTOR)

    def check(self, raw: bytes) -> None:
        """Raise MALFORMED for more parts than a sensible message of this kind has.

        Bytes that are no message at all are left to the parser.
        """
        if len(raw) <= SMALL_BYTES:
            return
        try:
            has_too_many = _Parts(raw).exceed(0, len(raw), self._fields)
        except IndexError:
            return
        if has_too_many:
            raise malformed(self._name)


def _fields_of(message: Any) -> Fields:
    fields: Fields = {}
    for field in message.fields:
        if field.type == _MESSAGE:
            fields[field.number] = _fields_of(field.message_type)
        elif field.is_repeated:
            fields[field.number] = None
    return fields


class _Parts:
    """Counts the parts of one message."""

    __slots__ = ("_left", "_raw")

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._left = MAX_PARTS

    def exceed(self, at: int, end: int, fields: Fields) -> bool:
        """Count the parts from one offset to another; return whether they are too many now."""
        raw = self._raw
        while at < end and self._left >= 0:
            self._left -= 1
            key, at = _varint(raw, at)
            kind = key & 7
            if kind == _LENGTH:
                size, at = _varint(raw, at)
                number = key >> 3
                if size > SMALL_BYTES and number in fields:
                    inside = fields[number]
                    if inside is not None:
                        self.exceed(at, at + size, inside)
                    elif size > MAX_PACKED_BYTES:
                        self._left = -1
                at += size
            elif kind == _VARINT:
                _, at = _varint(raw, at)
            elif kind == _FIXED_64:
                at += 8
            elif kind == _FIXED_32:
                at += 4
        return self._left < 0


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at an offset, and the offset after it."""
    value = raw[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    shift = 7
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
