"""The asyncio frontend: the same names as `timernn`, to be awaited.

async with timernn.aio.connect("localhost:50051") as client:
    async with client.session("weather", session_id="device-7") as session:
        hs = await session.forward(xs)
        async for hs in session.stream(chunks):
            ...
        h = await session.state
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
import grpc.aio

from timernn import errors
from timernn._core import arguments
from timernn._core.arguments import checked, checked_with
from timernn._core.channels import Links
from timernn._core.client import ClientCore
from timernn._core.effects import (
    END,
    NOT_YET,
    AskToken,
    Download,
    InTurn,
    OpenStream,
    Pull,
    Read,
    RpcCall,
    Sleep,
    Upload,
    Write,
)
from timernn._core.frontends import drives, shortened, spans_of
from timernn._core.models import ModelsCore
from timernn._core.options import Options
from timernn._core.retry import RetryPolicy
from timernn._core.session import SessionCore
from timernn._core.stream import StreamCore
from timernn._core.targets import addresses_of
from timernn._core.views import SessionView

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
    from datetime import timedelta
    from types import TracebackType

    import numpy.typing as npt

    from timernn._core.channels import Link
    from timernn._core.contract import Rpc
    from timernn._core.credentials import Credentials, Metadata, TokenSource
    from timernn._core.effects import (
        Effect,
        Headers,
        Op,
    )
    from timernn._core.frame import Frames
    from timernn._core.options import Traces
    from timernn._core.tls import TLS
    from timernn._core.tracing import Spans, TracedStream
    from timernn.types import (
        Array,
        Contributions,
        ModelInfo,
        OnExists,
        Reduction,
        ReturnHs,
        SessionInfo,
        UpdateResult,
        Version,
        Waiting,
    )

__all__ = ["Client", "Session", "connect"]

P = ParamSpec("P")
R = TypeVar("R")


def connect(
    target: str | Sequence[str],
    *,
    timeout: float = 60.0,  # the same argument as the blocking connect's
    connect_timeout: float = 10.0,
    retry: RetryPolicy | None = None,
    log_limit: int = 64,
    log_bytes: int = 16 << 20,
    log_total_bytes: int = 256 << 20,
    max_message_bytes: int = 16 << 20,
    proxy: str | None = None,
    tls: TLS | bool = False,
    token: TokenSource = None,
    token_over_plaintext: bool = False,
    metadata: Metadata = None,
    traces: Traces = False,
) -> Client:
    """Make a client; the first call connects. The arguments are those of `timernn.connect`.

    The callable that `token` may be runs in the event loop; it may return an awaitable.
    """
    options = Options(
        timeout_s=timeout,
        connect_timeout_s=connect_timeout,
        retry=RetryPolicy() if retry is None else retry,
        log_limit=log_limit,
        log_bytes=log_bytes,
        log_total_bytes=log_total_bytes,
        max_message_bytes=max_message_bytes,
        proxy=proxy,
        tls=tls,
        token=token,
        token_over_plaintext=token_over_plaintext,
        metadata=metadata,
        traces=traces,
    )
    return Client(addresses_of(target), options)


class _Stream:
    """A bidirectional call over `grpc.aio`."""

    def __init__(self, link: Link, rpc: Rpc[Any, Any], timeout_s: float, headers: Headers) -> None:
        self.link, self.rpc = link, rpc
        self._call = link.begin(rpc, None, timeout_s, headers)
        self._has_begun = False

    async def write(self, message: Any) -> None:
        if not self._has_begun:
            await self._wait_until_begun()
        # It has ended: the read that follows says why.
        with contextlib.suppress(asyncio.InvalidStateError):
            await self._call.write(self.rpc.serialize(message))

    async def _wait_until_begun(self) -> None:
        """Wait until the call is on its way or over: gRPC's write waits for the first alone."""
        # A call that its channel's close cancels before never begins.
        waits = [
            asyncio.ensure_future(each)
            for each in (self._call.wait_for_connection(), self._call.code())
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        self._has_begun = True

    async def read(self) -> bytes | None:
        message = await self._call.read()
        return None if message is grpc.aio.EOF else message

    def close(self) -> None:
        self._call.cancel()


class _Transport:
    """Carries out effects on the loop that runs at the first call."""

    def __init__(
        self, addresses: Sequence[str], options: Options, credentials: Credentials
    ) -> None:
        # A channel belongs to the loop that it is made in, hence none before the first call.
        self._links = Links(addresses, options, grpc.aio, credentials)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking = asyncio.Lock()

    async def run(self, op: Op[R]) -> R:
        """Drive a generator of the core to its end."""
        self._check()
        try:
            return await self._drive(op)
        except errors.Error as error:
            raise shortened(error) from None

    run_part = run  # of a call of the caller's that takes several

    def stream(self, core: StreamCore) -> StreamCore | TracedStream:
        """Return what carries a stream out."""
        return core

    async def close(self, frames: Frames) -> None:
        """Leave the frames' stream and close the channels."""
        is_elsewhere = self._loop not in {None, asyncio.get_running_loop()}
        if self._links.is_inherited:
            return  # they are the parent's, and gRPC's threads are not here
        if not is_elsewhere:
            frames.close()
        for link in self._links.close():
            if not is_elsewhere:  # else they go with the last that holds them
                await link.channel.close()

    def _check(self) -> None:
        self._links.check()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise errors.WrongLoop(
                "the client belongs to the event loop of its first call; connect again in this one"
            )

    async def _drive(self, op: Op[R]) -> R:
        try:
            effect = next(op)
            while True:
                try:
                    outcome = await self._perform(effect)
                except BaseException as error:  # noqa: BLE001  # a cancellation too is the core's to see
                    effect = op.throw(error)
                else:
                    effect = op.send(outcome)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def _perform(self, effect: Effect) -> Any:
        match effect:
            case Pull(source, block):
                return await source.pull(block)
            case AskToken(credentials):
                return await self._ask(credentials)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case InTurn(lock, op):
                async with lock:
                    return await self._drive(op)
            case Read(stream) | Write(stream, _):
                link = stream.link  # type: ignore[attr-defined]
            case _:
                link = self._links.get(effect.address)
        started = time.monotonic()
        try:
            return await _over(link, effect)
        except grpc.RpcError as failure:
            error = link.error_of(failure)
            self._links.leave_if_silent(link, error, started)
            raise error from failure
        except (asyncio.CancelledError, GeneratorExit, errors.Error):
            raise
        except BaseException:
            self._links.leave(link)  # an interrupt may have left it half done
            self._check()  # gRPC's own, when the client was closed meanwhile
            raise

    async def _ask(self, credentials: Credentials) -> None:
        async with self._asking:
            if credentials.is_due and credentials.source is not None:
                with credentials.asking():
                    token = credentials.source()
                    if inspect.isawaitable(token):
                        token = await token
                credentials.take(token)


class _TracedTransport(_Transport):
    """The same, with a span for each call of the caller's."""

    def __init__(
        self,
        addresses: Sequence[str],
        options: Options,
        credentials: Credentials,
        spans: Spans,
    ) -> None:
        super().__init__(addresses, options, credentials)
        self._spans = spans

    async def run(self, op: Op[R]) -> R:
        """Drive a generator of the core to its end, as one call."""
        return await super().run(self._spans.call(op))

    def stream(self, core: StreamCore) -> TracedStream:
        """Return what carries a stream out, as one call."""
        return self._spans.stream(core)


async def _over(link: Link, effect: Effect) -> Any:
    """Carry out an effect over a channel."""
    match effect:
        case RpcCall(rpc, request, _, timeout_s, headers):
            call = link.begin(rpc, rpc.serialize(request), timeout_s, headers)
            answered: Any = rpc.read(await call)
        case Write(stream, message):
            return await stream.write(message)  # type: ignore[attr-defined]
        case Read(stream):
            message = await stream.read()  # type: ignore[attr-defined]
            answered = None if message is None else stream.rpc.read(message)  # type: ignore[attr-defined]
        case Download(rpc, request, _, timeout_s, headers):
            call = link.begin(rpc, rpc.serialize(request), timeout_s, headers)
            answered = [rpc.read(message) async for message in call]
        case Upload(rpc, requests, _, timeout_s, headers):
            messages = map(rpc.serialize, requests)
            answered = rpc.read(await link.begin(rpc, messages, timeout_s, headers))
        case OpenStream(rpc, _, timeout_s, headers):
            return _Stream(link, rpc, timeout_s, headers)
        case _:
            raise TypeError(f"{type(effect).__name__} needs no channel")
    link.answered = time.monotonic()
    return answered


def _of_client(
    op: Callable[Concatenate[ClientCore, P], Op[R]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of a generator of the client's core."""

    @drives(op, "Client")
    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._transport.run(op(self._core, *args, **kwargs))

    return method


def _of_models(
    op: Callable[Concatenate[ModelsCore, P], Op[R]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of a generator about models."""

    @drives(op, "Client")
    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._transport.run(op(self._core.models, *args, **kwargs))

    return method


def _of_session(
    op: Callable[Concatenate[SessionCore, P], Op[R]],
) -> Callable[Concatenate[Session, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of a generator of the session's core: one at a time."""

    @drives(op, "Session")
    async def method(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        async with self._lock:
            return await self._transport.run(op(self._core, *args, **kwargs))

    return method


class Client:
    """A connection to the service, for the tasks of one event loop. Made by `connect`."""

    def __init__(self, addresses: list[str], options: Options) -> None:
        self._core = ClientCore(addresses, options, asyncio.Lock)
        credentials = self._core.context.caller.credentials
        spans = spans_of(options.traces, addresses)
        self._transport = (
            _Transport(addresses, options, credentials)
            if spans is None
            else _TracedTransport(addresses, options, credentials, spans)
        )
        self._frame_lock = asyncio.Lock()

    create_model = _of_models(ModelsCore.create_model)
    import_model = _of_models(ModelsCore.import_model)
    get_model = _of_models(ModelsCore.get_model)
    delete_model = _of_models(ModelsCore.delete_model)
    get_weights = _of_models(ModelsCore.get_weights)
    put_weights = _of_models(ModelsCore.put_weights)
    export_weights = _of_models(ModelsCore.export_weights)
    import_weights = _of_models(ModelsCore.import_weights)
    create_checkpoint = _of_models(ModelsCore.create_checkpoint)
    list_checkpoints = _of_models(ModelsCore.list_checkpoints)
    restore_checkpoint = _of_models(ModelsCore.restore_checkpoint)
    delete_checkpoint = _of_models(ModelsCore.delete_checkpoint)
    get_session = _of_client(ClientCore.get_session)
    get_state = _of_client(ClientCore.get_state)
    close_session = _of_client(ClientCore.close_session)
    discard_gradients = _of_client(ClientCore.discard_gradients)
    forward = _of_client(ClientCore.forward)
    server_info = _of_client(ClientCore.server_info)
    ping = _of_client(ClientCore.ping)

    def session(
        self,
        model_id: str,
        session_id: str | None = None,
        *,
        batch_size: int = 1,
        train: bool = False,
        initial_state: npt.ArrayLike | None = None,
        ttl: float | timedelta | None = None,
        on_exists: OnExists = "resume",
        must_exist: bool = False,
    ) -> Session:
        """Open a session, or go on with a live one; `resumed` says which it was.

        Args:
            model_id: The model to run.
            session_id: Its name; None: one of 128 random bits.
            batch_size: N.
            train: Let `forward` leave tapes for `backward`.
            initial_state: The first hidden state, shape (N, H); None: zero. Not used on resuming.
            ttl: Time to live after each operation, in seconds; None: the server's default.
            on_exists: "resume" goes on with a live one or begins it, "fail" refuses a live one,
                "reset" begins it anew, "must_exist" goes on with a live one and begins none.
            must_exist: Short for on_exists="must_exist".

        Raises:
            SessionNotFound: With "must_exist", if there never was one; SessionExpired or
                SessionClosed if there was.
            SessionExists: With "fail", if it is live.
        """
        return Session(
            self,
            self._core.open_session(
                model_id,
                session_id,
                batch_size=batch_size,
                train=train,
                initial_state=initial_state,
                ttl=ttl,
                on_exists=on_exists,
                must_exist=must_exist,
            ),
        )

    async def update(
        self,
        model_id: str,
        contributions: Iterable[Contributions | str] | None = None,
        *,
        sessions: Sequence[Session] | None = None,
        lr: float | None = None,
        clip_norm: float = 0.0,
        reduction: Reduction = "sum",
        expected_version: Version | None = None,
        take_waiting: bool = False,
    ) -> UpdateResult:
        """Make one optimizer step over the contributions of many sessions.

        With `sessions` it takes exactly what these contributed since their last update, expects
        the head that this client has seen last, and can be healed after lost writes. Without, it
        takes what waits on the server, whoever contributed it.

        Args:
            model_id: The model.
            contributions: Which, or session names; None: all that wait.
            sessions: Open training sessions of this client; then `contributions` is not used.
            lr: Learning rate of this step only; None: the optimizer's.
            clip_norm: Scale the joined gradient down to this global norm; 0: off.
            reduction: "sum" or "mean" over the contributions.
            expected_version: Refuse with VersionConflict unless the head is this one.
            take_waiting: With `sessions`, take what waits of these on the server too, whichever
                program contributed it.

        Raises:
            NoGradients: If nothing waits.
        """
        own = None if sessions is None else self._core.own("sessions", sessions)
        op = self._core.update(
            model_id,
            contributions,
            sessions=own,
            lr=lr,
            clip_norm=clip_norm,
            reduction=reduction,
            expected_version=expected_version,
            take_waiting=take_waiting,
        )
        async with AsyncExitStack() as stack:
            await _take_locks(stack, own or ())
            return await self._transport.run(op)

    @checked_with(chunks=arguments.chunks_of_sessions)
    async def frame(
        self,
        chunks: Iterable[tuple[Session, npt.ArrayLike]],
        *,
        return_hs: ReturnHs = "all",
        train: bool = False,
    ) -> list[Array | errors.Error]:
        """Apply chunks of many sessions in one message of one stream.

        Args:
            chunks: Open sessions of this client, each with its inputs (N, T, D). The same session
                may come several times; its chunks are applied in this order.
            return_hs: "all" hidden states, the "last" alone, or "none".
            train: Leave tapes for `backward`; each session has to be open to train.

        Returns:
            In the order given, the hidden states, or the error of a session that failed: it
            disturbs no other. It stands in the place of that session's later chunks as well,
            which are not applied, and names the chunk that failed.
        """
        items = list(chunks)
        sessions = self._core.own("chunks", (session for session, _ in items))
        async with AsyncExitStack() as stack:
            await _take_locks(stack, sessions)
            await stack.enter_async_context(self._frame_lock)
            op = self._core.frame(items, return_hs=return_hs, train=train)
            outcomes = await self._transport.run(op)
        return [shortened(each) if isinstance(each, errors.Error) else each for each in outcomes]

    @checked
    async def list_models(self, *, page_size: int = 100) -> AsyncIterator[ModelInfo]:
        """Go through all models by name, a page at a time."""
        token = ""
        while True:
            models, token = await self._transport.run(
                self._core.models.models_page(page_size, token)
            )
            for model in models:
                yield model
            if not token:
                return

    @checked
    async def list_sessions(
        self, model_id: str | None = None, *, page_size: int = 100
    ) -> AsyncIterator[SessionInfo]:
        """Go through all live sessions, the next to expire first, a page at a time.

        Args:
            model_id: Only those of this model.
            page_size: Sessions a call, 1 to 1000.
        """
        token = ""
        while True:
            sessions, token = await self._transport.run(
                self._core.sessions_page(model_id, page_size, token)
            )
            for session in sessions:
                yield session
            if not token:
                return

    async def close(self) -> None:
        """Close the connections; sessions stay on the server."""
        await self._transport.close(self._core.frames)

    def __repr__(self) -> str:
        return f"<timernn.aio.Client {', '.join(self._core.context.caller.addresses)}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class Session(SessionView):
    """One sequence whose hidden state the service holds. Made by `client.session`.

    `async with client.session(...)` and `await client.session(...)` both open it. Leaving the
    block leaves the session on the server, where it can be resumed by its name; `close` ends it.
    Several tasks may share one: their calls take turns.
    """

    def __init__(self, client: Client, opening: Op[SessionCore] | None) -> None:
        self._client, self._opening = client, opening
        self._transport, self._lock = client._transport, asyncio.Lock()  # noqa: SLF001

    forward = _of_session(SessionCore.forward)
    backward = _of_session(SessionCore.backward)
    update = _of_session(SessionCore.update)
    discard_gradients = _of_session(SessionCore.discard_gradients)
    get_state = _of_session(SessionCore.get_state)
    get_waiting = _of_session(SessionCore.get_waiting)
    set_state = _of_session(SessionCore.set_state)
    reset_state = _of_session(SessionCore.reset_state)
    get_info = _of_session(SessionCore.get_info)
    settle = _of_session(SessionCore.settle)
    close = _of_session(SessionCore.close)

    @property
    def state(self) -> Coroutine[Any, Any, Array]:
        """The hidden state, read from the server when awaited, shape (N, H)."""
        return self.get_state()

    @property
    def waiting(self) -> Coroutine[Any, Any, list[Waiting]]:
        """What waits of it on the server, read from there when awaited: see `get_waiting`."""
        return self.get_waiting()

    async def fork(
        self, new_id: str | None = None, *, ttl: float | timedelta | None = None
    ) -> Session:
        """Open another session from this one's present state.

        Args:
            new_id: The new session's name; None: one of 128 random bits.
            ttl: Its time to live in seconds; None: this one's.
        """
        async with self._lock:
            core = await self._transport.run(self._core.fork(new_id, ttl=ttl))
        fork = Session(self._client, None)
        fork._core = core  # of its own class
        return fork

    @checked_with(chunks=arguments.async_chunks)
    def stream(
        self,
        chunks: Iterable[npt.ArrayLike] | AsyncIterable[npt.ArrayLike],
        *,
        in_flight: int = 4,
        return_hs: ReturnHs = "all",
        train: bool = False,
    ) -> AsyncIterator[Array]:
        """Apply chunk after chunk without waiting for each answer; yields in the same order.

        A chunk that is refused raises in its turn, after the answers of those before it; the error
        names it (`metadata["chunk_seq"]`), and none behind it is applied. After any error, another
        stream that begins with the first chunk without an output goes on without applying one
        twice. Leaving the loop early leaves the session in order: chunks that were sent count.

        Args:
            chunks: Inputs (N, T, D), T may vary. An asynchronous source holds no answer back.
            in_flight: Chunks sent and not answered, at most; with 1 each answer comes before the
                next chunk is read. The server's replay window bounds it.
            return_hs: "all" hidden states of each chunk, the "last" alone, or "none".
            train: Leave a tape for `backward` with each chunk, as many as the server keeps.
        """
        source = _AsyncSource(chunks) if isinstance(chunks, AsyncIterable) else _Source(chunks)
        core = self._transport.stream(
            StreamCore(self._core, source, in_flight=in_flight, return_hs=return_hs, train=train)
        )
        return _Answers(self._transport, self._lock, core=core, source=source)

    def __getattr__(self, name: str) -> Any:
        """Name what was forgotten, where `_core` is not there yet."""
        if name != "_core":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise errors.SessionNotOpen(
            "the session is not open: use `async with client.session(...)`, or "
            "`session = await client.session(...)`; after a failed opening, ask for a new one"
        )

    def __repr__(self) -> str:
        return super().__repr__() if "_core" in vars(self) else "<Session that is not open>"

    async def _open(self) -> Session:
        if self._opening is not None:
            opening, self._opening = self._opening, None
            self._core = await self._transport.run(opening)
        self._core  # noqa: B018  # raises after an opening that failed
        return self

    def __await__(self) -> Generator[Any, None, Session]:
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return


async def _take_locks(stack: AsyncExitStack, sessions: Sequence[Session]) -> None:
    """Take the locks of several sessions, always in the same order."""
    for session in sorted(set(sessions), key=id):
        await stack.enter_async_context(session._lock)  # noqa: SLF001


class _Source:
    """Reads the caller's chunks from an ordinary iterable."""

    def __init__(self, chunks: Iterable[npt.ArrayLike]) -> None:
        self._chunks = iter(chunks)

    async def pull(self, block: bool) -> Any:  # noqa: ARG002, FBT001  # it cannot know without waiting
        return next(self._chunks, END)

    def close(self) -> None:
        pass


class _AsyncSource:
    """Reads the caller's chunks from an asynchronous iterable, the next one in the background."""

    def __init__(self, chunks: AsyncIterable[npt.ArrayLike]) -> None:
        self._chunks = aiter(chunks)
        self._next: asyncio.Future[Any] | None = None

    async def pull(self, block: bool) -> Any:  # noqa: FBT001
        if self._next is None:
            self._next = asyncio.ensure_future(self._read())
        if not block:
            await asyncio.sleep(0)  # a source that has its chunk ready needs one turn of the loop
            if not self._next.done():
                return NOT_YET
        item, self._next = await self._next, None
        return item

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()

    async def _read(self) -> Any:
        return await anext(self._chunks, END)


class _Answers(AsyncIterator["Array"]):
    """What `stream` gives back.

    A class and not an asynchronous generator: one that a loop leaves early is finalized only some
    turns of the event loop later, and until then the session would be in use.
    """

    def __init__(
        self,
        transport: _Transport,
        lock: asyncio.Lock,
        *,
        core: StreamCore | TracedStream,
        source: Any,
    ) -> None:
        self._transport, self._lock, self._core, self._source = transport, lock, core, source
        self._is_open = self._is_over = False

    async def __anext__(self) -> Array:
        if self._is_over:
            raise StopAsyncIteration
        try:
            if not self._is_open:
                async with self._lock:
                    await self._transport.run_part(self._core.open())
                self._is_open = True
            hs = await self._transport.run_part(self._core.step())
        except BaseException:
            self._close(is_left=False)
            raise
        if hs is END:
            self._close(is_left=False)
            raise StopAsyncIteration
        return hs  # type: ignore[return-value]  # all but END is an array

    async def aclose(self) -> None:
        """Leave the stream."""
        self._close(is_left=True)

    def __del__(self) -> None:
        self._close(is_left=True)

    def _close(self, *, is_left: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._core.close(is_left=is_left)
            self._source.close()
