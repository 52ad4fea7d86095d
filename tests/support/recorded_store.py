"""A store's content as text, and back into a store of another day.

Not a dump of the server: another server, or a later one, may not load that, and records hold absolute
times. A recording is a line of JSON for each key: name, type, value and remaining time to live. It is
written back by ordinary commands, and every time inside a record is moved by what has passed since.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.store import keys

if TYPE_CHECKING:
    from pathlib import Path

_SESSION_TOUCHED = (
    32  # where a session's record says when the tenant's list was last brought up to date
)
_CHECKPOINT_CREATED = 24  # where a checkpoint says when it was made
_TAPE_EXPIRES = 0  # where an entry of the tape index says when the tape expires


@dataclass
class Recording:
    """What a store held, and how the server that wrote it went on.

    Attributes:
        release: Which release wrote it.
        time_ms: The store's clock when it was recorded, ms since 1970.
        records: A line for each key.
        answers: Calls that were made after it was recorded, in order, with their answers.
    """

    release: str
    time_ms: int
    records: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, store: Any, release: str) -> Recording:
        """Read a whole store."""
        recording = cls(release, _time_ms(store))
        for key in sorted(store.scan_iter()):
            kind = store.type(key).decode()
            recording.records.append(
                {
                    "key": to_text(key),
                    "type": kind,
                    "value": _READ[kind](store, key),
                    "ttl_ms": max(0, store.pttl(key)),
                }
            )
        return recording

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a recording from its file."""
        head, *lines = path.read_text().splitlines()
        recording = cls(**json.loads(head))
        for line in lines:
            entry = json.loads(line)
            (recording.records if "key" in entry else recording.answers).append(entry)
        return recording

    def save(self, path: Path) -> None:
        """Write the recording as lines of JSON."""
        head = {"release": self.release, "time_ms": self.time_ms}
        lines = [json.dumps(each) for each in (head, *self.records, *self.answers)]
        path.write_text("\n".join(lines) + "\n")

    def moved(self, passed_ms: int) -> Recording:
        """Return the same recording as if it had been made so much later; negative: earlier."""
        records = [
            record
            | {"value": moved(to_bytes(record["key"]), record["type"], record["value"], passed_ms)}
            for record in self.records
        ]
        return Recording(self.release, self.time_ms + passed_ms, records, self.answers)

    def restore(self, store: Any) -> None:
        """Write everything into a store, as if it had been recorded now."""
        for record in self.moved(_time_ms(store) - self.time_ms).records:
            key = to_bytes(record["key"])
            _WRITE[record["type"]](store, key, record["value"])
            if record["ttl_ms"]:
                store.pexpire(key, record["ttl_ms"])


def moved(key: bytes, kind: str, value: Any, passed_ms: int) -> Any:
    """Move the times inside a record: a value as `_READ` returns it, with times later by `passed_ms`."""
    slot, _, role = key.partition(b"}")
    is_session, is_model = slot.startswith(b"s{"), slot.startswith(b"m{")
    if kind == "zset":  # scores are times, but where the order is that of the names
        return [[name, score + passed_ms if score else score] for name, score in value]
    if is_session and role == b"":
        return to_text(_later(to_bytes(value), _SESSION_TOUCHED, passed_ms))
    if is_session and role == keys.tape_index_key(b""):
        return _moved_values(value, _TAPE_EXPIRES, passed_ms)
    if is_model and role == keys.checkpoints_key(b""):
        return _moved_values(value, _CHECKPOINT_CREATED, passed_ms)
    if is_model and role == b"":
        created = to_text(b"created")
        return {n: to_text(b"%d" % (int(to_bytes(v)) + passed_ms)) if n == created else v
                for n, v in value.items()}  # fmt: skip
    return value


def _moved_values(value: dict[str, str], at: int, passed_ms: int) -> dict[str, str]:
    return {name: to_text(_later(to_bytes(each), at, passed_ms)) for name, each in value.items()}


def _later(data: bytes, at: int, passed_ms: int) -> bytes:
    (time_ms,) = struct.unpack_from(">Q", data, at)
    return data[:at] + struct.pack(">Q", time_ms + passed_ms) + data[at + 8 :]


def _time_ms(store: Any) -> int:
    seconds, microseconds = store.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def to_text(data: bytes) -> str:
    """Write bytes as text; what compresses well is compressed."""
    packed = zlib.compress(data, 9)
    if len(packed) < len(data) // 2:
        return "zlib:" + base64.b64encode(packed).decode()
    return base64.b64encode(data).decode()


def to_bytes(text: str) -> bytes:
    """Read bytes from the text that `to_text` wrote."""
    if text.startswith("zlib:"):
        return zlib.decompress(base64.b64decode(text.removeprefix("zlib:")))
    return base64.b64decode(text)


def _read_hash(store: Any, key: bytes) -> dict[str, str]:
    return {to_text(name): to_text(value) for name, value in sorted(store.hgetall(key).items())}


def _read_zset(store: Any, key: bytes) -> list[list[Any]]:
    return [[to_text(name), score] for name, score in store.zrange(key, 0, -1, withscores=True)]


def _write_hash(store: Any, key: bytes, value: dict[str, str]) -> None:
    store.hset(key, mapping={to_bytes(name): to_bytes(each) for name, each in value.items()})


def _write_zset(store: Any, key: bytes, value: list[list[Any]]) -> None:
    store.zadd(key, {to_bytes(name): score for name, score in value})


_READ: dict[str, Any] = {
    "string": lambda store, key: to_text(store.get(key)),
    "hash": _read_hash,
    "zset": _read_zset,
}
_WRITE: dict[str, Any] = {
    "string": lambda store, key, value: store.set(key, to_bytes(value)),
    "hash": _write_hash,
    "zset": _write_zset,
}
