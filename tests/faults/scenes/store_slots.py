"""One hash slot's keys set back to an older time, while every other slot stays as it is."""

from __future__ import annotations

from typing import Any, Self

import redis

from service.domain.types import ModelKey, SessionKey
from service.store import keys


class Slot:
    """The keys of one session or one model."""

    def __init__(self, store: Any, tag: bytes) -> None:
        """Remember them as they are now."""
        self._redis, self._tag = store, tag
        self._kept: dict[bytes, tuple[bytes, int]] = {}
        self.keep()

    def keep(self) -> None:
        """Remember the keys as they are now."""
        entries = {key: (self._redis.dump(key), self._redis.pttl(key)) for key in self._names()}
        # A key that went away between the listing and the copy was not there.
        self._kept = {key: (data, max(0, ttl)) for key, (data, ttl) in entries.items() if data}

    def lose(self) -> bool:
        """Set the keys back to what was kept, atomically; return whether that lost anything."""
        is_loss = self.contents() != {key: data for key, (data, _) in self._kept.items()}
        with self._redis.pipeline(transaction=True) as pipeline:
            for key in self._names():
                pipeline.delete(key)
            for key, (data, ttl_ms) in self._kept.items():
                pipeline.restore(key, ttl_ms, data)
            pipeline.execute()
        return is_loss

    def contents(self) -> dict[bytes, bytes]:
        """Return every key with its value, for a comparison."""
        return {key: self._redis.dump(key) for key in self._names()}

    def _names(self) -> list[bytes]:
        return sorted(self._redis.scan_iter(match=self._tag + b"*", count=1000))


class Slots:
    """Gives slots of one store over one connection."""

    def __init__(self, url: str) -> None:
        """Connect to the store."""
        self._redis: Any = redis.Redis.from_url(url)

    def of_session(self, session_id: str) -> Slot:
        """Keep the slot of a session as it is now."""
        return Slot(self._redis, keys.session_tag(SessionKey("default", session_id)))

    def of_model(self, model_id: str) -> Slot:
        """Keep the slot of a model as it is now."""
        return Slot(self._redis, keys.model_tag(ModelKey("default", model_id)))

    def __enter__(self) -> Self:
        """Give the open connection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._redis.close()
