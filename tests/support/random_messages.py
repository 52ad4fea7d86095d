"""Messages that nobody meant to send: made by a contract's descriptors, or valid ones with something changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from google.protobuf.message import Message

_DEPTH = 4
_SHARE_FILLED = 0.7
# Around the limits of the server that is fuzzed, and at the edges of the types.
INTEGERS = (
    0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, -1, 1000, 1001, 2**31 - 1, 2**32, 2**53 - 1, 2**53, 2**53 + 1,
    2**63 - 1, -(2**63),
)  # fmt: skip
_UNSIGNED = tuple(value for value in INTEGERS if value >= 0)
_FLOATS = (
    0.0, -0.0, 0.1, 1.0, -1.0, 1e-45, 1e-300, 1e38, 3.5e38, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
NAMES = (
    "..", "a/../b", "../../etc/passwd", "/x", "x/", " ..", ".. ", "a\0b", "\0", "{}", "*", "s{*", "line\nbreak",
    "\x1b[31mred", "\u202emirrored", "\uff4dodel", "\u043codel", "m" * 129, "%s%n", "'; FLUSHALL",
    "~", "$(id)", "\ud7ff", "\U0010ffff", "",
)  # fmt: skip
"""Names that reach for something else: paths, patterns, escapes, look-alikes, too long ones."""
_TEXTS = ("m", "m", "s", "s", "CON", "m" * 128, *NAMES)
_BYTES = (
    b"", bytes(4), bytes(24), bytes(96), b"\x80\x04K\x01.", b"PK\x03\x04", b"\x93NUMPY", b"\xff" * 16,
    b"\x00\x00\xc0\x7f" * 6, b"\x00\x00\x80\x7f" * 6, b"\x01\x00\x00\x00" * 6,
)  # fmt: skip


def random_message(message_class: type[Message], source: random.Random, depth: int = 0) -> Any:
    """Return a message whose fields are mostly filled, with values at and beyond their edges."""
    message: Any = message_class()
    fields: Any = message_class.DESCRIPTOR.fields
    for field in fields:
        if source.random() > _SHARE_FILLED or depth > _DEPTH:
            continue
        if field.is_repeated:
            for _ in range(source.choice((0, 1, 1, 2, 3, 5))):
                _append(message, field, source, depth)
        else:
            _set(message, field, source, depth)
    return message


def with_a_change(message: Any, source: random.Random) -> Any:
    """Return a copy of a message in which one field, at any depth, has another value, is cleared or is there twice."""
    changed = type(message)()
    changed.CopyFrom(message)
    places = [*_places(changed)]
    if not places:
        return changed
    holder, field = source.choice(places)
    action = source.randrange(4)
    if action == 0:
        holder.ClearField(field.name)
    elif field.is_repeated:
        values = getattr(holder, field.name)
        if action == 1 and len(values):
            values.MergeFrom([*values])
        elif action == 2 and len(values):
            del values[source.randrange(len(values))]
        else:
            _append(holder, field, source, 1)
    elif action == 1 and field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        value = getattr(holder, field.name)
        setattr(holder, field.name, (value + value)[: source.choice((1, 3, len(value) + 1, 4000))])
    else:
        _set(holder, field, source, 1)
    return changed


def mutated(raw: bytes, source: random.Random) -> bytes:
    """Return bytes with a few of them changed, doubled, cut out or inflated."""
    data = bytearray(raw)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        action = source.randrange(5)
        if action == 0 and at < len(data):
            data[at] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])
        elif action == 1:
            data[at:at] = source.randbytes(source.randint(1, 12))
        elif action == 2:
            del data[at : at + source.randint(1, 8)]
        elif action == 3:
            del data[at:]
        else:
            data[at:at] = data[at : at + source.randint(1, 40)]
    return bytes(data)


def _places(message: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each field of a message and of the messages in it, with what holds it."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if field.is_repeated:
            for each in getattr(message, field.name):
                yield from _places(each)
        elif message.HasField(field.name):
            yield from _places(getattr(message, field.name))


def _set(message: Any, field: Any, source: random.Random, depth: int) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = random_message(GetMessageClass(field.message_type), source, depth + 1)
        getattr(message, field.name).CopyFrom(inner)
    else:
        setattr(message, field.name, _value(field, source))


def _append(message: Any, field: Any, source: random.Random, depth: int) -> None:
    target = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = random_message(GetMessageClass(field.message_type), source, depth + 1)
        target.add().CopyFrom(inner)
    else:
        target.append(_value(field, source))


_NUMBERS = {
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 1, 2, 3, 99, -1),
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
    FieldDescriptor.CPPTYPE_UINT64: _UNSIGNED,
    FieldDescriptor.CPPTYPE_UINT32: tuple(value for value in _UNSIGNED if value < 2**32),
    FieldDescriptor.CPPTYPE_INT32: tuple(value for value in INTEGERS if -(2**31) <= value < 2**31),
    FieldDescriptor.CPPTYPE_INT64: INTEGERS,
}


def _value(field: Any, source: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return source.choice(_TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return source.choice(_BYTES)
    return source.choice(_NUMBERS[field.cpp_type])
