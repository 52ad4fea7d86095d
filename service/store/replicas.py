"""Which replicas run, a record each that lapses unless it is written again, and logins on their page: all in one hash slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.domain.ports import ReplicaBeat
from service.settings import DAY_MS
from service.store import keys, layouts
from service.store.scripts import ScriptCall, load_script

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from service.store.scripts import ScriptRunner

BEAT_TTL_MS = 10_000  # a replica that has not beaten for so long is gone
SECRET_TTL_MS = DAY_MS
MOST_REPLICAS = 200  # in one answer

_BEAT = load_script("beat")
_COUNT_ENDED_LOGINS = load_script("count_ended_logins")
_END_LOGINS = load_script("end_logins")
_LIST_REPLICAS = load_script("list_replicas")


class RedisReplicaStore:
    """The ReplicaStore port over a Redis or Valkey server."""

    def __init__(self, runner: ScriptRunner) -> None:
        """Keep the runner."""
        self._runner = runner

    async def beat(self, replica_id: str, figures: Mapping[str, Any], secret: bytes) -> bytes:
        """Note that a replica runs; return the secret that all of them share."""
        slot = (
            keys.replicas_key(),
            keys.replica_prefix() + replica_id.encode(),
            keys.page_secret_key(),
        )
        record = layouts.beat_to_bytes(figures)
        arguments = (replica_id, record, BEAT_TTL_MS, secret, SECRET_TTL_MS)
        return bytes(await self._runner.run(ScriptCall(_BEAT, slot, arguments)))

    async def list_replicas(self) -> list[ReplicaBeat]:
        """Read who has beaten lately, by name; a record of another layout comes without its figures."""
        call = ScriptCall(
            _LIST_REPLICAS, (keys.replicas_key(),), (keys.replica_prefix(), MOST_REPLICAS)
        )
        flat = await self._runner.run(call)
        parts = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        found = [
            ReplicaBeat(name.decode(), BEAT_TTL_MS - int(left), layouts.beat_from_bytes(record))
            for name, left, record in parts
        ]
        return sorted(found, key=lambda beat: beat.replica_id)

    async def count_ended_logins(self, token_id: str) -> int:
        """Return how often the logins of a token were ended."""
        call = ScriptCall(_COUNT_ENDED_LOGINS, (keys.ended_logins_key(token_id),), ())
        return int(await self._runner.run(call))

    async def end_logins(self, token_id: str, ended_before: int, ttl_ms: int) -> None:
        """End the logins of a token that were made when its logins had been ended so often, or less often."""
        key = keys.ended_logins_key(token_id)
        await self._runner.run(ScriptCall(_END_LOGINS, (key,), (ended_before, ttl_ms)))
