"""What an operator should know of a store: how it keeps what it is given, and how full it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.store.links import StoreClient


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """One primary, as its INFO and TIME say.

    Attributes:
        server: Name and version, such as "valkey 9.1.0".
        eviction_policy: `maxmemory-policy`.
        max_bytes: `maxmemory`; 0 for none.
        used_bytes: Memory in use.
        system_bytes: Memory of its machine; 0 where it does not say.
        has_append_only_file: Whether each write goes to a file.
        has_snapshots: Whether it has saved a snapshot, or changes wait for none.
        replicas: Connected replicas.
        time_s: Its clock, seconds since 1970.
    """

    server: str
    eviction_policy: str
    max_bytes: int
    used_bytes: int
    system_bytes: int
    has_append_only_file: bool
    has_snapshots: bool
    replicas: int
    time_s: float


async def facts_of(node: StoreClient) -> StoreFacts:
    """Ask one primary."""
    trip: Any = node.pipeline(transaction=False)
    trip.info("server", "memory", "persistence", "replication")
    trip.time()
    info, (seconds, microseconds) = await trip.execute()
    name = "valkey" if "valkey_version" in info else "redis"
    return StoreFacts(
        server=f"{name} {info.get('valkey_version') or info.get('redis_version', '?')}",
        eviction_policy=str(info.get("maxmemory_policy", "")),
        max_bytes=int(info.get("maxmemory", 0)),
        used_bytes=int(info.get("used_memory", 0)),
        system_bytes=int(info.get("total_system_memory", 0)),
        has_append_only_file=bool(info.get("aof_enabled", 0)),
        has_snapshots=int(info.get("rdb_saves", 0)) > 0,
        replicas=int(info.get("connected_slaves", 0)),
        time_s=int(seconds) + int(microseconds) / 1e6,
    )
