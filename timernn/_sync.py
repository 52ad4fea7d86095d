"""The blocking face: each method drives one of the core's generators over a plain gRPC channel."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
import numpy as np

from timernn._core import arguments
from timernn._core.arguments import checked, checked_with
from timernn._core.channels import addresses_of, channel_options
from timernn._core.client import ClientCore
from timernn._core.effects import (
    END,
    NOT_YET,
    Call,
    Download,
    OpenStream,
    Pull,
    Read,
    Sleep,
    Upload,
    Write,
)
from timernn._core.faces import documented_by
from timernn._core.options import Options
from timernn._core.retry import RetryPolicy
from timernn._core.session import SessionCore
from timernn._core.status import error_from_rpc
from timernn._core.stream import StreamCore
from timernn._core.views import SessionView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import timedelta
    from types import TracebackType

    import numpy.typing as npt

    from timernn import errors
    from timernn._core.contract import Rpc
    from timernn._core.effects import (
        Effect,
        Op,
    )
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
    )

P = ParamSpec("P")
R = TypeVar("R")


def connect(
    target: str | Sequence[str],
    *,
    timeout: float = 60.0,
    connect_timeout: float = 10.0,
    retry: RetryPolicy | None = None,
    log_limit: int = 64,
    log_bytes: int = 16 << 20,
    log_total_bytes: int = 256 << 20,
    max_message_bytes: int = 16 << 20,
) -> Client:
    """Make a client; the first call connects.

    Args:
        target: An address such as "localhost:50051", a gRPC target such as
            "dns:///timernn:50051", or several, of which the next is used when one fails.
        timeout: Seconds for one call with all its attempts; then the last error is raised.
        connect_timeout: The same until something has answered for the first time.
        retry: How failed calls are tried again.
        log_limit: Answered operations kept a session, to heal a store that lost them.
        log_bytes: Bytes of them, a session; the training sessions of one model share it.
        log_total_bytes: Bytes of all logs together; those written longest ago give way.
        max_message_bytes: Largest message either way; the server's own limit counts too.
    """
    options = Options(
        timeout_s=timeout,
        connect_timeout_s=connect_timeout,
        retry=RetryPolicy() if retry is None else retry,
        log_limit=log_limit,
        log_bytes=log_bytes,
        log_total_bytes=log_total_bytes,
        max_message_bytes=max_message_bytes,
    )
    return Client(addresses_of(target), options)


class _Stream:
    """A bidirectional call whose requests come from a queue."""

    def __init__(self, start: Any, timeout_s: float) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = start(iter(self._requests.get, None), timeout=timeout_s)

    def write(self, message: Any) -> None:
        self._requests.put(message)

    def read(self) -> Any:
        return next(self._call, None)

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()


class _Transport:
    """Carries out effects over one channel an address; calls of several threads may overlap."""

    def __init__(self, addresses: Sequence[str], max_message_bytes: int) -> None:
        options = channel_options(max_message_bytes)
        self._channels = [grpc.insecure_channel(address, options) for address in addresses]
        self._methods: dict[tuple[int, str], Any] = {}

    def run(self, op: Op[R]) -> R:
        """Drive a generator of the core to its end."""
        try:
            effect = next(op)
            while True:
                try:
                    outcome = self._perform(effect)
                except BaseException as error:  # noqa: BLE001  # an interrupt too is the core's to see
                    effect = op.throw(error)
                else:
                    effect = op.send(outcome)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _perform(self, effect: Effect) -> Any:
        try:
            return self._unmapped(effect)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    def _unmapped(self, effect: Effect) -> Any:  # noqa: PLR0911  # a table
        match effect:
            case Call(rpc, request, address, timeout_s):
                return self._method("unary_unary", address, rpc)(request, timeout=timeout_s)
            case Write(stream, message):
                return stream.write(message)  # type: ignore[attr-defined]
            case Read(stream):
                return stream.read()  # type: ignore[attr-defined]
            case Pull(source, block):
                return source.pull(block)
            case Sleep(seconds):
                return time.sleep(seconds)
            case OpenStream(rpc, address, timeout_s):
                return _Stream(self._method("stream_stream", address, rpc), timeout_s)
            case Download(rpc, request, address, timeout_s):
                return list(self._method("unary_stream", address, rpc)(request, timeout=timeout_s))
            case Upload(rpc, requests, address, timeout_s):
                start = self._method("stream_unary", address, rpc)
                return start(iter(requests), timeout=timeout_s)

    def _method(self, kind: str, address: int, rpc: Rpc[Any, Any]) -> Any:
        key = (address, rpc.path)
        if key not in self._methods:
            make = getattr(self._channels[address], kind)
            self._methods[key] = make(
                rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.deserialize
            )
        return self._methods[key]


def _of_client(
    op: Callable[Concatenate[ClientCore, P], Op[R]],
) -> Callable[Concatenate[Client, P], R]:
    """Make a blocking method of a generator of the client's core."""

    @wraps(op)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._transport.run(op(self._core, *args, **kwargs))

    return method


def _of_session(
    op: Callable[Concatenate[SessionCore, P], Op[R]],
) -> Callable[Concatenate[Session, P], R]:
    """Make a blocking method of a generator of the session's core: one at a time."""

    @wraps(op)
    def method(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return self._transport.run(op(self._core, *args, **kwargs))

    return method


class Client:
    """A connection to the service; safe to share between threads. Made by `connect`."""

    def __init__(self, addresses: list[str], options: Options) -> None:
        self._core = ClientCore(addresses, options)
        self._transport = _Transport(addresses, options.max_message_bytes)
        self._frame_lock = threading.Lock()

    create_model = _of_client(ClientCore.create_model)
    get_model = _of_client(ClientCore.get_model)
    delete_model = _of_client(ClientCore.delete_model)
    get_weights = _of_client(ClientCore.get_weights)
    put_weights = _of_client(ClientCore.put_weights)
    export_weights = _of_client(ClientCore.export_weights)
    import_weights = _of_client(ClientCore.import_weights)
    create_checkpoint = _of_client(ClientCore.create_checkpoint)
    list_checkpoints = _of_client(ClientCore.list_checkpoints)
    restore_checkpoint = _of_client(ClientCore.restore_checkpoint)
    delete_checkpoint = _of_client(ClientCore.delete_checkpoint)
    get_session = _of_client(ClientCore.get_session)
    close_session = _of_client(ClientCore.close_session)
    discard_gradients = _of_client(ClientCore.discard_gradients)
    forward = _of_client(ClientCore.forward)
    server_info = _of_client(ClientCore.server_info)
    ping = _of_client(ClientCore.ping)

    @documented_by(ClientCore.open_session)
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
        core = self._transport.run(
            self._core.open_session(
                model_id,
                session_id,
                batch_size=batch_size,
                train=train,
                initial_state=initial_state,
                ttl=ttl,
                on_exists=on_exists,
                must_exist=must_exist,
            )
        )
        return Session(self, core)

    @documented_by(ClientCore.update)
    def update(
        self,
        model_id: str,
        contributions: Iterable[Contributions | str] | None = None,
        *,
        sessions: Sequence[Session] | None = None,
        lr: float | None = None,
        clip_norm: float = 0.0,
        reduction: Reduction = "sum",
        expected_version: Version | None = None,
    ) -> UpdateResult:
        op = self._core.update(
            model_id,
            contributions,
            sessions=sessions,
            lr=lr,
            clip_norm=clip_norm,
            reduction=reduction,
            expected_version=expected_version,
        )
        with _all_locks(sessions or ()):
            return self._transport.run(op)

    @checked_with(chunks=arguments.chunks_of_sessions)
    @documented_by(ClientCore.frame)
    def frame(
        self,
        chunks: Iterable[tuple[Session, npt.ArrayLike]],
        *,
        return_hs: ReturnHs = "all",
    ) -> list[Array | errors.Error]:
        items = list(chunks)
        with _all_locks([session for session, _ in items]), self._frame_lock:
            return self._transport.run(self._core.frame(items, return_hs=return_hs))

    @checked
    def list_models(self, *, page_size: int = 100) -> Iterator[ModelInfo]:
        """Go through all models by name, a page at a time."""
        token = ""
        while True:
            models, token = self._transport.run(self._core.models_page(page_size, token))
            yield from models
            if not token:
                return

    @checked
    def list_sessions(
        self, model_id: str | None = None, *, page_size: int = 100
    ) -> Iterator[SessionInfo]:
        """Go through all live sessions, the next to expire first, a page at a time.

        Args:
            model_id: Only those of this model.
            page_size: Sessions a call, 1 to 1000.
        """
        token = ""
        while True:
            sessions, token = self._transport.run(
                self._core.sessions_page(model_id, page_size, token)
            )
            yield from sessions
            if not token:
                return

    def close(self) -> None:
        """Close the connections; sessions stay on the server."""
        self._core.frames.close()
        self._transport.close()

    def __repr__(self) -> str:
        return f"<timernn.Client {', '.join(self._core.caller.addresses)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Session(SessionView):
    """One sequence whose hidden state the service holds. Made by `client.session`.

    Leaving a `with` block leaves the session on the server, where it can be resumed by its name;
    `close` ends it. Several threads may share one: their calls take turns.
    """

    def __init__(self, client: Client, core: SessionCore) -> None:
        self._client, self._core = client, core
        self._transport, self._lock = client._transport, threading.Lock()  # noqa: SLF001

    forward = _of_session(SessionCore.forward)
    backward = _of_session(SessionCore.backward)
    update = _of_session(SessionCore.update)
    discard_gradients = _of_session(SessionCore.discard_gradients)
    get_state = _of_session(SessionCore.get_state)
    set_state = _of_session(SessionCore.set_state)
    reset_state = _of_session(SessionCore.reset_state)
    get_info = _of_session(SessionCore.get_info)
    settle = _of_session(SessionCore.settle)
    close = _of_session(SessionCore.close)

    @property
    def state(self) -> Array:
        """The hidden state, read from the server, shape (N, H)."""
        return self.get_state()

    @documented_by(SessionCore.fork)
    def fork(self, new_id: str | None = None, *, ttl: float | timedelta | None = None) -> Session:
        with self._lock:
            core = self._transport.run(self._core.fork(new_id, ttl=ttl))
        return Session(self._client, core)

    @checked_with(chunks=arguments.chunks)
    def stream(
        self,
        chunks: Iterable[npt.ArrayLike],
        *,
        in_flight: int = 4,
        return_hs: ReturnHs = "all",
    ) -> Iterator[Array]:
        """Apply chunk after chunk without waiting for each answer; yields in the same order.

        No tapes are left. A chunk that is refused raises in its turn, after the answers of those
        before it. Leaving the loop early leaves the session in order: chunks that were sent count.

        Args:
            chunks: Inputs (N, T, D), T may vary. Unless it is a sequence, or in_flight is 1, it is
                read in a thread of its own, so that a slow source holds no answer back.
            in_flight: Chunks sent and not answered, at most; with 1 each answer comes before the
                next chunk is read. The server's replay window bounds it.
            return_hs: "all" hidden states of each chunk, the "last" alone, or "none".
        """
        source = _source(chunks, in_flight)
        core = StreamCore(self._client._core, self._core, source, in_flight, return_hs)  # noqa: SLF001
        try:
            with self._lock:
                self._transport.run(core.open())
            while (hs := self._transport.run(core.step())) is not END:
                yield hs  # type: ignore[misc]  # all but END is an array
        finally:
            source.close()
            core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return


def _all_locks(sessions: Sequence[Session]) -> ExitStack:
    """Take the locks of several sessions, always in the same order."""
    stack = ExitStack()
    for session in sorted(set(sessions), key=id):
        stack.enter_context(session._lock)  # noqa: SLF001
    return stack


def _source(chunks: Iterable[npt.ArrayLike], in_flight: int) -> _InlineSource | _ThreadSource:
    if in_flight <= 1 or isinstance(chunks, Sequence | np.ndarray):
        return _InlineSource(chunks)
    return _ThreadSource(chunks, in_flight)


class _InlineSource:
    """Reads the caller's chunks where they are asked for."""

    def __init__(self, chunks: Iterable[npt.ArrayLike]) -> None:
        self._chunks = iter(chunks)

    def pull(self, block: bool) -> Any:  # noqa: ARG002, FBT001  # it cannot know without waiting
        return next(self._chunks, END)

    def close(self) -> None:
        pass


class _ThreadSource:
    """Reads the caller's chunks in a thread, as many ahead as may be in flight."""

    def __init__(self, chunks: Iterable[npt.ArrayLike], ahead: int) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._is_closed = False
        threading.Thread(target=self._read, args=(chunks,), daemon=True).start()

    def pull(self, block: bool) -> Any:  # noqa: FBT001
        try:
            item = self._items.get(block)
        except queue.Empty:
            return NOT_YET
        self._room.release()
        if isinstance(item, _Failure):
            raise item.error
        return item

    def close(self) -> None:
        self._is_closed = True
        self._room.release()

    def _read(self, chunks: Iterable[npt.ArrayLike]) -> None:
        try:
            for chunk in chunks:
                # Its own copy: the caller may fill one buffer again and again.
                self._items.put(np.array(chunk))
                self._room.acquire()
                if self._is_closed:
                    return
        except BaseException as error:  # noqa: BLE001  # raised where the chunk was asked for
            self._items.put(_Failure(error))
        else:
            self._items.put(END)


class _Failure:
    """What the caller's own iterator raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
