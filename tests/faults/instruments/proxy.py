"""A TCP proxy that breaks things on purpose, by a seed, and counts what it broke.

It stands between a client and a server of gRPC or Redis and can delay, slow down, slice, swallow,
stall, reset and close; knowing where replies start (`dialects`), it can also do what hurts most:
let a request do its work and lose the reply, or hold the reply until it is released.

The proxy runs its own event loop in a thread; every public method may be called from anywhere.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from instruments.dialects import Dialect, RawDialect, Request

if TYPE_CHECKING:
    from collections.abc import Hashable

_CHUNK_BYTES = 65536
_QUEUED_CHUNKS = 64
_POLL_S = 0.002
_CONTROL_TIMEOUT_S = 10.0

T = TypeVar("T")
How = Literal["reset", "close"]
_NOT_FAULTS = frozenset(
    {"connections", "requests", "bytes_up", "bytes_down", "blackhole_bytes", "upstream_down"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How one direction behaves.

    Attributes:
        latency_s: Delay of every chunk, in seconds; chunks in flight do not add up.
        jitter_s: Up to so many seconds more or less, order kept.
        bandwidth_bytes_per_s: At most so fast; None is unlimited.
        slice_bytes: Pass on pieces of at most so many bytes; None leaves chunks whole.
        slice_gap_s: Pause after each piece, in seconds.
        blackhole: Swallow what comes, as a peer that vanished does. A connection that lost bytes
            is reset when the fault is lifted, since nothing after a hole can be right.
        stall: Pass on nothing until lifted, lose nothing: a partition that heals.
        limit_bytes: Close the connection after so many bytes of it; None is unlimited.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth_bytes_per_s: float | None = None
    slice_bytes: int | None = None
    slice_gap_s: float = 0.0
    blackhole: bool = False
    stall: bool = False
    limit_bytes: int | None = None


_VANISHED = Link(blackhole=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """All that is wrong at a time, for present and new connections.

    Attributes:
        up: From the client to the server.
        down: From the server to the client.
        drop_reply_p: Probability that a request is forwarded, its reply swallowed and the
            connection reset.
        reset_p: Probability that the connection is reset in place of forwarding a request.
        only: Names of the requests that both of these may hit (`dialects.SCRIPT_CALLS`); empty
            means every one.
        refuse: Reset new connections at once.
        slow_close_s: Pass an end of stream on so many seconds late.
    """

    up: Link = field(default_factory=Link)
    down: Link = field(default_factory=Link)
    drop_reply_p: float = 0.0
    reset_p: float = 0.0
    only: frozenset[str] = frozenset()
    refuse: bool = False
    slow_close_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """One reply that is kept: `reached` is set when it is there, `released` lets it go."""

    released: threading.Event
    reached: threading.Event = field(default_factory=threading.Event)


Decision = Literal["reset", "drop"] | Hold


@dataclass(slots=True)
class _Plan:
    """What `drop_reply_after` and `hold_reply_until` asked for; used on the proxy's loop only."""

    pass_first: int = 0
    drop: int = 0
    hold: Hold | None = None


class FaultProxy:
    """Listen on a free port of 127.0.0.1 and forward each connection to `upstream`."""

    def __init__(
        self,
        upstream: str,
        *,
        dialect: Callable[[], Dialect] = RawDialect,
        seed: int = 0,
        faults: Faults | None = None,
    ) -> None:
        """Prepare a proxy; `start` or the `with` statement opens it.

        Args:
            upstream: `host:port`, or `unix:/path` for a Unix socket. May be set again later, for
                new connections.
            dialect: What the connections speak; one instance is made for each.
            seed: Decides every random draw, connection by connection.
            faults: What is wrong from the start; nothing by default.
        """
        self.upstream = upstream
        self.dialect = dialect
        self.seed = seed
        self.faults = faults or Faults()
        self.plan = _Plan()
        self.counted: Counter[str] = Counter()
        self.errors: list[Exception] = []
        self._accepted: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._server: asyncio.Server | None = None

    def start(self) -> Self:
        """Open the port and serve in a thread."""
        self._thread.start()
        self._call(self._listen)
        return self

    def stop(self) -> None:
        """Cut all connections, close the port, end the thread; raise what went wrong inside."""
        self._call(self._shut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.errors:
            raise ExceptionGroup("the proxy itself failed", self.errors)

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None, "the proxy has not been started"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """Where clients connect: `127.0.0.1:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def counts(self) -> Counter[str]:
        """How often each thing happened: connections, requests and every fault by its name."""
        return Counter(self.counted)

    @property
    def fault_count(self) -> int:
        """How many faults hit, of every kind."""
        return sum(n for name, n in self.counts.items() if name not in _NOT_FAULTS)

    def set(self, faults: Faults) -> None:
        """Let other faults hold from now on; `Faults()` lifts all."""

        async def change() -> None:
            self.faults = faults

        self._call(change)

    def drop_reply_after(self, requests: int = 0, *, count: int = 1) -> None:
        """Let `requests` more requests be, then lose the replies of the next `count`."""

        async def change() -> None:
            self.plan.pass_first, self.plan.drop = requests, count

        self._call(change)

    def hold_reply_until(self, released: threading.Event) -> threading.Event:
        """Keep the reply to the next request until `released` is set.

        Returns:
            An event that is set when the reply is there, hence the work is done.
        """
        hold = Hold(released)

        async def change() -> None:
            self.plan.hold = hold

        self._call(change)
        return hold.reached

    def reset_all(self) -> int:
        """Reset (RST) the connections of the moment; return how many."""
        return self._cut_all("reset")

    def close_all(self) -> int:
        """Close (FIN) the connections of the moment; return how many."""
        return self._cut_all("close")

    def vanish_all(self) -> int:
        """Swallow all that comes on the connections of the moment, for good; return how many."""

        async def vanish() -> int:
            for connection in self._connections:
                connection.is_vanished = True
            self.counted["vanish"] += len(self._connections)
            return len(self._connections)

        return self._call(vanish)

    def _cut_all(self, how: How) -> int:
        async def cut() -> int:
            for connection in self._connections:
                connection.cut(how)
            self.counted[how] += len(self._connections)
            return len(self._connections)

        return self._call(cut)

    def decide(self, request: Request, rng: random.Random) -> Decision | None:
        """Decide what becomes of `request` or its reply; None lets both pass."""
        faults, plan = self.faults, self.plan
        if faults.only and request.name not in faults.only:
            return None
        if rng.random() < faults.reset_p:
            return "reset"
        if plan.hold is not None:
            hold, plan.hold = plan.hold, None
            return hold
        if plan.drop and not plan.pass_first:
            plan.drop -= 1
            return "drop"
        plan.pass_first -= bool(plan.drop)
        return "drop" if rng.random() < faults.drop_reply_p else None

    def _call(self, function: Callable[[], Coroutine[object, object, T]]) -> T:
        future = asyncio.run_coroutine_threadsafe(function(), self._loop)
        return future.result(_CONTROL_TIMEOUT_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def _shut(self) -> None:
        assert self._server is not None
        # asyncio reports connections that it has accepted and cannot serve any more; let it.
        self._loop.set_exception_handler(lambda _loop, _context: None)
        self._server.close()
        # A connection may be anywhere between accepted and forwarded; asyncio's own tasks are left
        # to finish, ours are cancelled.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks.intersection(self._accepted):
                task.cancel()
            await asyncio.wait(tasks, timeout=_POLL_S)
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._accepted.add(task)
        self.counted["connections"] += 1
        number = self.counted["connections"]
        if self.faults.refuse:
            self.counted["refuse"] += 1
            _cut(writer, "reset")
            return
        try:
            server = await _connect(self.upstream)
        except OSError:
            self.counted["upstream_down"] += 1
            _cut(writer, "reset")
            return
        connection = _Connection(self, number, (reader, writer), server)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


_Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(upstream: str) -> _Pipe:
    if upstream.startswith("unix:"):
        return await asyncio.open_unix_connection(upstream.removeprefix("unix:"))
    host, _, port = upstream.rpartition(":")
    return await asyncio.open_connection(host, int(port))


def _cut(writer: asyncio.StreamWriter, how: How) -> None:
    """Reset (RST at once) or close (FIN after what was written) one side."""
    if how == "close":
        writer.close()
        return
    linger = struct.pack("ii", 1, 0)
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


class _CutError(Exception):
    """Ends a connection on purpose."""

    def __init__(self, how: How) -> None:
        super().__init__(how)
        self.how = how


@dataclass(slots=True)
class _Way:
    """One direction of one connection."""

    name: Literal["up", "down"]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    # Chunks with the time when they are due; an empty one is the end of the stream.
    queue: asyncio.Queue[tuple[float, bytes]] = field(
        default_factory=lambda: asyncio.Queue(_QUEUED_CHUNKS)
    )
    due: float = 0.0
    passed_bytes: int = 0
    is_lossy: bool = False


class _Connection:
    """One client's connection and its twin to the server."""

    def __init__(self, proxy: FaultProxy, number: int, client: _Pipe, server: _Pipe) -> None:
        self._proxy = proxy
        self._rng = random.Random(f"{proxy.seed}:{number}")
        self._dialect = proxy.dialect()
        self._decisions: dict[Hashable, Decision] = {}
        self.is_vanished = False
        self._up = _Way("up", client[0], server[1])
        self._down = _Way("down", server[0], client[1])

    async def run(self) -> None:
        """Forward until both sides have ended or one is cut."""
        how: How = "close"
        try:
            async with asyncio.TaskGroup() as group:
                for way in (self._up, self._down):
                    group.create_task(self._receive(way))
                    group.create_task(self._deliver(way))
        except* _CutError as cuts:
            how = next(e.how for e in cuts.exceptions if isinstance(e, _CutError))
        except* OSError:
            how = "reset"  # a side went away: so does the other
        except* asyncio.CancelledError:
            how = "reset"
        except* Exception as failures:  # noqa: BLE001 - `stop` raises them
            self._proxy.errors.append(failures)
        finally:
            self.cut(how)

    def cut(self, how: How) -> None:
        """Cut the connections on both sides."""
        _cut(self._down.writer, how)
        _cut(self._up.writer, how)

    def _link(self, way: _Way) -> Link:
        if self.is_vanished:
            return _VANISHED
        return self._proxy.faults.up if way.name == "up" else self._proxy.faults.down

    def _hit(self, fault: str, n: int = 1) -> None:
        self._proxy.counted[fault] += n

    async def _receive(self, way: _Way) -> None:
        """Read one side and note when each chunk is due on the other."""
        clock, data = asyncio.get_running_loop().time, b"-"
        while data:
            data = await way.reader.read(_CHUNK_BYTES)
            link = self._link(way)
            delay = link.latency_s + self._rng.uniform(-1, 1) * link.jitter_s
            if delay > 0:
                self._hit("delay")
            way.due = max(way.due, clock() + delay)
            await way.queue.put((way.due, data))

    async def _deliver(self, way: _Way) -> None:
        """Pass on what is due, with the faults of the moment."""
        clock, data = asyncio.get_running_loop().time, b"-"
        while data:
            due, data = await way.queue.get()
            await asyncio.sleep(max(0.0, due - clock()))
            await self._wait_while_stalled(way)
            if not data:
                break
            if self._is_swallowed(way, data):
                continue
            await (self._pass_requests(data) if way.name == "up" else self._pass_replies(data))
        if self._proxy.faults.slow_close_s:
            self._hit("slow_close")
            await asyncio.sleep(self._proxy.faults.slow_close_s)
        if not self._link(way).blackhole and way.writer.can_write_eof():
            way.writer.write_eof()

    async def _wait_while_stalled(self, way: _Way) -> None:
        if self._link(way).stall:
            self._hit("stall")
        while self._link(way).stall:  # noqa: ASYNC110 - a plain value may change
            await asyncio.sleep(_POLL_S)

    def _is_swallowed(self, way: _Way, data: bytes) -> bool:
        if self._link(way).blackhole:
            self._hit("blackhole")
            self._hit("blackhole_bytes", len(data))
            way.is_lossy = True
            return True
        if way.is_lossy:
            self._fail("reset")
        return False

    async def _pass_requests(self, data: bytes) -> None:
        for request in self._dialect.requests(data):
            self._hit("requests")
            decision = self._proxy.decide(request, self._rng)
            if decision == "reset":
                self._fail("reset")
            elif decision is not None:
                self._decisions[request.key] = decision
        await self._write(self._up, data)

    async def _pass_replies(self, data: bytes) -> None:
        passed = 0
        for reply in self._dialect.replies(data):
            decision = self._decisions.pop(reply.key, None)
            if decision is None:
                continue
            await self._write(self._down, data[passed : reply.offset])
            passed = reply.offset
            if not isinstance(decision, Hold):
                self._hit("drop_reply")
                raise _CutError("reset")
            self._hit("hold_reply")
            decision.reached.set()
            while not decision.released.is_set():  # noqa: ASYNC110 - another thread sets it
                await asyncio.sleep(_POLL_S)
        await self._write(self._down, data[passed:])

    async def _write(self, way: _Way, data: bytes) -> None:
        """Write at the pace and up to the length that the link allows."""
        link = self._link(way)
        room = len(data) if link.limit_bytes is None else link.limit_bytes - way.passed_bytes
        for piece in _pieces(data[: max(room, 0)], link):
            way.writer.write(piece)
            await way.writer.drain()
            way.passed_bytes += len(piece)
            self._hit(f"bytes_{way.name}", len(piece))
            pause_s = link.slice_gap_s + len(piece) / (link.bandwidth_bytes_per_s or float("inf"))
            if pause_s:
                self._hit("slow_piece")
                await asyncio.sleep(pause_s)
        if room < len(data):
            self._hit("limit_data")
            raise _CutError("close")

    def _fail(self, how: How) -> None:
        self._hit(how)
        raise _CutError(how)


def _pieces(data: bytes, link: Link) -> list[bytes]:
    """Cut `data` as the slicer says, and so that a slow link moves 20 times a second."""
    size = link.slice_bytes or _CHUNK_BYTES
    if link.bandwidth_bytes_per_s:
        size = max(1, min(size, int(link.bandwidth_bytes_per_s / 20)))
    return [data[at : at + size] for at in range(0, len(data), size)]
