"""Connections to a store that notice when they have been cut.

redis-py hands out an idle connection again unless it sees that the server has closed it. It does not
see a reset, and with its notices of maintenance, which RESP3 turns on, it does not look at all. After
a failover each idle connection would then fail one call, and the resend of that call another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors
from redis.maint_notifications import MaintNotificationsConfig

if TYPE_CHECKING:
    from redis.asyncio import ConnectionPool

WITHOUT_NOTICES = MaintNotificationsConfig(enabled=False)


class _WatchedLink:
    """What is laid over redis-py's connections, of whichever kind."""

    async def can_read(self) -> bool:
        """Tell whether the connection is unfit to be handed out."""
        base: Any = super()
        reader: Any = getattr(self, "_reader", None)
        is_reset = reader is not None and reader.exception() is not None
        return is_reset or bool(await base.can_read())

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Send; a connection that was closed a moment ago is a lost one with every event loop."""
        base: Any = super()
        try:
            await base.send_packed_command(*args, **options)
        except RuntimeError as error:  # uvloop's word for it
            raise redis_errors.ConnectionError("the connection was closed") from error


def watch_links(pool: ConnectionPool) -> None:
    """Let a pool make connections that notice."""
    kind = pool.connection_class
    pool.connection_class = type(f"Watched{kind.__name__}", (_WatchedLink, kind), {})
