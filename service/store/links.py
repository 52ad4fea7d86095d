"""Connections to a store that detect when they were cut, and are kept from one round trip to the next.

redis-py hands out an idle connection again unless it sees that the server has closed it. It does not
see a reset, and with its maintenance notifications, which RESP3 turns on, it does not check at all.
After a failover each idle connection would then fail one call, and the retry of that call another.

redis-py's pipeline takes a connection from the pool, polls its socket, sets a timer for each step and
gives it back: that costs more than everything else that a commit needs. A connection ("link") that has
carried a round trip therefore stays here for the next one.
"""

from __future__ import annotations

import asyncio
import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.maint_notifications import MaintNotificationsConfig

from service.deadlines import Deadlines
from service.telemetry import NULL_OBSERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio import ConnectionPool

    from service.telemetry import Observer

    Command = tuple[Any, ...]  # of bytes, memoryviews, texts and numbers

WITHOUT_NOTICES = MaintNotificationsConfig(enabled=False)
# The most idle links that are kept here; the pool's limit is for all connections together, and calls
# may be waiting for one of the others.
KEPT_LINKS = 4
# The throughput to expect at least of a store that other calls and its append-only file keep busy.
SLOWEST_BYTES_PER_S = 8 << 20
# A larger value is written to the socket without being copied into the packed command.
BIG_BYTES = 1 << 15

# hiredis declares the type for tuples of one element only.
_packed: Callable[[Command], bytes] = hiredis.pack_command


def _pieces(command: Command) -> tuple[bytes | memoryview, ...]:
    """Return the bytes of a command; a big value is a piece of its own, since packing copies it twice."""
    if not _is_big_write(command):
        return (_packed(command),)
    name, key, value, *options = command
    _, before = _packed((name, key)).split(b"\r\n", 1)
    _, after = _packed((*options, "")).split(b"\r\n", 1)
    head = b"*%d\r\n%b$%d\r\n" % (len(command), before, len(value))
    return head, value, b"\r\n" + after.removesuffix(b"$0\r\n\r\n")


def _is_big_write(command: Command) -> bool:
    if command[0] != "SET":
        return False
    return isinstance(command[2], (bytes, memoryview)) and len(command[2]) > BIG_BYTES


class _WatchedLink:
    """A mixin over redis-py's connection classes, of whichever kind."""

    @property
    def is_cut(self) -> bool:
        """Whether the event loop has seen the end of the connection."""
        link: Any = self
        if not link.is_connected:
            return True
        reader = link._reader  # noqa: SLF001 - redis-py reports the reader's end only by polling the socket
        return reader.exception() is not None or reader.at_eof()

    async def can_read(self) -> bool:
        """Return whether the connection is unfit to be handed out."""
        base: Any = super()
        return self.is_cut or bool(await base.can_read())

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Send; on every event loop, a connection that was closed a moment ago is a ConnectionError."""
        base: Any = super()
        try:
            await base.send_packed_command(*args, **options)
        except RuntimeError as error:  # uvloop raises this for a closed connection
            raise redis_errors.ConnectionError("the connection was closed") from error

    async def round_trip(self, pieces: Sequence[bytes | memoryview], count: int) -> list[Any]:
        """Send the bytes of so many commands and return their answers; the caller sets the timeout."""
        link: Any = self
        answers: list[Any] = []
        try:
            # No wait for the write buffer to drain: once the answers are there, it has.
            link._writer.writelines(pieces)  # noqa: SLF001
            for _ in range(count):
                try:
                    answers.append(
                        await link.read_response(disable_decoding=True, timeout=math.inf)
                    )
                except redis_errors.ResponseError as error:
                    answers.append(error)
        except RuntimeError as error:  # uvloop raises this for a connection closed a moment ago
            raise redis_errors.ConnectionError("the connection was closed") from error
        return answers


class StoreClient(Redis):
    """redis-py's client, with a cheaper method to send many commands in one round trip.

    Attributes:
        observer: Is called with each of these round trips; set by the code that makes the client.
    """

    observer: Observer = NULL_OBSERVER

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take the same arguments as redis-py's client."""
        super().__init__(*args, **options)
        self._kept: list[Any] = []
        self._deadlines = Deadlines(self.connection_pool.connection_kwargs["socket_timeout"])

    async def round_trip(
        self, commands: Sequence[Command], answer_bytes: int = 0, name: str = ""
    ) -> list[Any]:
        """Send commands and return their answers; an error the server gave stands in its place.

        Args:
            commands: What to send.
            answer_bytes: How much the answers may bring.
            name: What the observer is to call it; otherwise the first command's name.

        Raises:
            RedisError, OSError: If the connection broke or nothing came in time.
        """
        began_at = perf_counter()
        pieces: list[bytes | memoryview] = []
        big_bytes = answer_bytes
        for command in commands:
            some = _pieces(command)
            pieces += some
            if len(some) > 1:
                big_bytes += len(command[2])
        answers: list[Any] | None = None
        try:
            answers = await self._round_trip(pieces, len(commands), big_bytes)
            return answers
        finally:
            self.observer.round_trip_ended(
                name or commands[0][0],
                commands=len(commands),
                duration_s=perf_counter() - began_at,
                sent_bytes=sum(map(len, pieces)),
                received_bytes=0 if answers is None else _value_bytes(answers),
                is_lost=answers is None,
            )

    async def _round_trip(
        self, pieces: Sequence[bytes | memoryview], count: int, big_bytes: int
    ) -> list[Any]:
        """Make a round trip over a link that is kept, or one of the pool.

        Args:
            pieces: The bytes of the commands.
            count: How many commands they are.
            big_bytes: Of big values in them and in their answers: more of these get more time.
        """
        link = await self._take()
        deadlines = self._deadlines
        if big_bytes > BIG_BYTES:
            deadlines = Deadlines(deadlines.limit_s + big_bytes / SLOWEST_BYTES_PER_S)
        try:
            answers: list[Any] = await deadlines.bound(link.round_trip(pieces, count))
        except BaseException as error:
            unfit = [link]
            if not isinstance(error, asyncio.CancelledError):
                # The others lead to the same server. None of them may fail the retry of this call, nor
                # be taken by another call while they are closed.
                unfit += self._kept
                self._kept = []
            for each in unfit:
                await self._give_up(each)
            raise
        # At least one stays with the pool, for health checks.
        if len(self._kept) < min(KEPT_LINKS, self.connection_pool.max_connections - 1):
            self._kept.append(link)
        else:
            await self.connection_pool.release(link)
        return answers

    async def _take(self) -> Any:
        while self._kept:
            link = self._kept.pop()
            if not link.is_cut and self._is_to_master(link):
                return link
            await self._give_up(link)
        return await self.connection_pool.get_connection()

    def _is_to_master(self, link: Any) -> bool:
        """Return whether a link leads to the master that Sentinel named last; True without Sentinel."""
        master = getattr(self.connection_pool, "master_address", None)
        return master is None or master == (link.host, link.port)

    async def _give_up(self, link: Any) -> None:
        await link.disconnect(nowait=True)
        await self.connection_pool.release(link)


def _value_bytes(answers: Sequence[Any]) -> int:
    """Return the bytes of the values in answers, lists of them included."""
    size = 0
    for answer in answers:
        if isinstance(answer, bytes):
            size += len(answer)
        elif isinstance(answer, list):
            size += _value_bytes(answer)
    return size


def watch_links(pool: ConnectionPool) -> None:
    """Let a pool make connections that detect when they were cut."""
    kind = pool.connection_class
    pool.connection_class = type(f"Watched{kind.__name__}", (_WatchedLink, kind), {})
