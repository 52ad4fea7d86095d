"""The rights that the store's user needs; a test compares them and docs/operations.md with a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from service.store.addresses import StoreAddress

COMMANDS: Final = (
    *("eval", "evalsha", "info"),
    *(
        "exists",
        "get",
        "getrange",
        "persist",
        "pexpire",
        "pexpiretime",
        "pttl",
        "rename",
        "set",
        "setrange",
    ),
    *("strlen", "time", "unlink"),
    *("hdel", "hget", "hgetall", "hincrby", "hkeys", "hlen", "hmget", "hset"),
    *("zadd", "zcard", "zcount", "zrange", "zrangebylex", "zrangebyscore", "zrem", "zscore"),
)
"""Commands that are needed on every store."""
DATABASE_COMMANDS: Final = ("select",)
"""Commands that are needed in addition where the URL names a database other than 0."""
CLUSTER_COMMANDS: Final = ("asking", "cluster|slots")
"""Commands that are needed in addition on the nodes of a Cluster."""
WAIT_COMMANDS: Final = ("wait",)
"""Commands that are needed in addition with `--durability replica`."""
KEY_PATTERNS: Final = ("s{*", "m{*", "t{*")
WAIT_KEY_PATTERNS: Final = ("timernn-wait",)
"""Keys that are needed in addition with `--durability replica`."""

PAGE_KEY_PATTERNS: Final = ("r{*",)
"""Keys that are needed in addition with `--metrics-listen`: what the replicas say of themselves."""


def commands_for(address: StoreAddress, *, waits: bool) -> tuple[str, ...]:
    """Return the commands that are needed on the store of a URL."""
    return (
        *COMMANDS,
        *(DATABASE_COMMANDS if address.database else ()),
        *(CLUSTER_COMMANDS if address.form.endswith("cluster") else ()),
        *(WAIT_COMMANDS if waits else ()),
    )


def keys_for(*, waits: bool, beats: bool) -> tuple[str, ...]:
    """Return the patterns of keys that are needed."""
    return (
        *KEY_PATTERNS,
        *(WAIT_KEY_PATTERNS if waits else ()),
        *(PAGE_KEY_PATTERNS if beats else ()),
    )
