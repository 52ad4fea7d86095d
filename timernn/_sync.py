"""The blocking frontend: each method drives one of the core's generators over a plain gRPC channel."""

from __future__ import annotations

import _thread
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import grpc
import numpy as np

from timernn import errors
from timernn._core import arguments
from timernn._core.arguments import checked, checked_with
from timernn._core.channels import Links
from timernn._core.client import ClientCore
from timernn._core.convert import copy_of_caller
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
    from collections.abc import Callable, Iterable, Iterator
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
    proxy: str | None = None,
    tls: TLS | bool = False,
    token: TokenSource = None,
    token_over_plaintext: bool = False,
    metadata: Metadata = None,
    traces: Traces = False,
) -> Client:
    """Make a client; the first call connects.

    Args:
        target: An address such as "localhost:50051", a gRPC target such as
            "dns:///timernn:50051", or several, of which the next is used when one fails.
        timeout: Seconds for one call with all its attempts; then the last error is raised.
        connect_timeout: The same until something has answered for the first time.
        retry: How failed calls are tried again.
        log_limit: Answered operations kept for each session, to heal a store that lost them.
        log_bytes: Bytes of them for each session; the training sessions of one model share it.
        log_total_bytes: Bytes of them for all sessions; those written longest ago give way.
        max_message_bytes: Largest message either way; the server's own limit counts too.
        proxy: "http://HOST:PORT" of an HTTP proxy to connect through, or "environment" to use what
            http_proxy, https_proxy and no_proxy say; None connects directly. A loopback address and
            a Unix socket are always reached directly.
        tls: True speaks TLS with a server whose certificate a public authority signed; a
            `timernn.TLS` names authorities, a certificate of the client's own, a server's name.
        token: What the server knows the caller by, or a callable that returns it: called before the
            first call, and again when the server refuses the token; the refused call is then
            repeated.
        token_over_plaintext: Send it also to other machines without TLS, where others can read it.
        metadata: Sent with every call.
        traces: True makes spans by OpenTelemetry, with the process's TracerProvider, or with one that
            is given instead; needs `pip install 'timernn[otel]'`.
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
    """A bidirectional call whose requests come from a queue; it ends when nobody uses it any more.

    To write and to close touch no lock of gRPC's, so that they may be interrupted.
    """

    def __init__(self, link: Link, rpc: Rpc[Any, Any], timeout_s: float, headers: Headers) -> None:
        self.link, self.rpc = link, rpc
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        calls: list[Any] = []
        requests = _sent(self._requests, calls, _at_end_of(self, self._requests))
        self._call = link.begin(rpc, requests, timeout_s, headers)
        calls.append(self._call)

    def write(self, message: Any) -> None:
        self._requests.put(self.rpc.serialize(message))

    def read(self) -> Any:
        """Return the next message; None at the end."""
        answer = next(self._call, None)
        return None if answer is None else self.rpc.read(answer)

    def close(self) -> None:
        self._requests.put(None)


def _sent(
    requests: queue.SimpleQueue[Any], calls: list[Any], _end: weakref.ref[Any]
) -> Iterator[bytes]:
    """Give gRPC the messages, in a thread of its own, and end the call when something else comes."""
    while isinstance(request := requests.get(), bytes):
        yield request
    calls[0].cancel()


def _at_end_of(owner: object, items: queue.SimpleQueue[Any]) -> weakref.ref[Any]:
    """Have something put into a queue when its owner is gone; whoever reads the queue keeps this.

    No Python code runs then, as in `__del__`, where an interrupt would be lost.
    """
    return weakref.ref(owner, items.put)


class _Worker:
    """A thread that makes one call at a time for another; it ends with this object."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.is_free = True
        given = (self._jobs, _at_end_of(self, self._jobs))
        thread = threading.Thread(target=_work, args=given, name="timernn-calls", daemon=True)
        # Not here: an interrupt inside start() would come out as an error of that one's locks.
        _thread.start_new_thread(thread.start, ())

    def call(self, function: Callable[..., R], *args: Any) -> R:
        """Call a function there and wait; interrupted, it is free no more."""
        outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.is_free = False
        self._jobs.put((outcomes, function, args))
        outcome, error = outcomes.get()
        self.is_free = True
        try:
            if error is not None:
                raise error
            return outcome  # type: ignore[no-any-return]
        finally:
            del outcome, error  # the error's traceback holds this frame


def _work(jobs: queue.SimpleQueue[Any], _end: weakref.ref[Any]) -> None:
    while isinstance(job := jobs.get(), tuple):
        _carry_out(*job)
        del job  # with what came of it, which nobody may want


def _carry_out(
    outcomes: queue.SimpleQueue[Any], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        outcomes.put((function(*args), None))
    except BaseException as error:  # noqa: BLE001  # raised where it was called from
        outcomes.put((None, error))


class _Transport:
    """Carries out effects; calls of several threads may overlap.

    Signals are raised in the main thread alone, as Ctrl-C is, at any moment. Raised inside gRPC they
    would leave its locks held, and whoever takes these next waits for ever. So gRPC never runs there:
    the main thread hands its calls to another and waits. A call whose caller was interrupted runs on
    to its end or its deadline, unheard.
    """

    def __init__(
        self, addresses: Sequence[str], options: Options, credentials: Credentials
    ) -> None:
        self._links = Links(addresses, options, grpc, credentials)
        self._worker: _Worker | None = None
        self._asking = threading.RLock()

    def run(self, op: Op[R]) -> R:
        """Drive a generator of the core to its end."""
        self._links.check()
        try:
            return self._drive(op)
        except errors.Error as error:
            raise shortened(error) from None

    run_part = run  # of a call of the caller's that takes several

    def stream(self, core: StreamCore) -> StreamCore | TracedStream:
        """Return what carries a stream out."""
        return core

    def close(self, frames: Frames) -> None:
        """Leave the frames' stream and close the channels."""
        if self._links.is_inherited:
            return  # they are the parent's, and gRPC's threads are not here
        frames.close()
        self._aside(_close, self._links.close())
        self._worker = None

    def _drive(self, op: Op[R]) -> R:
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

    def _perform(self, effect: Effect) -> Any:  # noqa: PLR0911  # one for each kind
        match effect:
            case Pull(source, block):
                return source.pull(block)
            case AskToken(credentials):
                return self._ask(credentials)
            case Sleep(seconds):
                return time.sleep(seconds)
            case InTurn(lock, op):
                with lock:
                    return self._drive(op)
            case Write(stream, message):
                return stream.write(message)  # type: ignore[attr-defined]
            case Read(stream):
                link = stream.link  # type: ignore[attr-defined]
                return self._aside(self._over, link, _read, effect)
            case _:
                return self._aside(self._called, effect)

    def _ask(self, credentials: Credentials) -> None:
        with self._asking:
            if credentials.is_due and credentials.source is not None:
                with credentials.asking():
                    token = credentials.source()
                credentials.take(token)

    def _called(self, effect: Any) -> Any:
        return self._over(self._links.get(effect.address), _call, effect)

    def _over(self, link: Link, do: Callable[[Link, Any], Any], effect: Effect) -> Any:
        """Carry out an effect over a channel, and learn from the outcome."""
        started = time.monotonic()
        try:
            return do(link, effect)
        except grpc.RpcError as failure:
            error = link.error_of(failure)
            self._links.leave_if_silent(link, error, started)
            raise error from failure
        except ValueError:  # gRPC's, when another thread has closed the client
            self._links.check()
            raise

    def _aside(self, function: Callable[..., R], *args: Any) -> R:
        """Call a function where no signal is raised."""
        if threading.current_thread() is not threading.main_thread():
            return function(*args)
        worker = self._worker
        if worker is None or not worker.is_free:
            worker = self._worker = _Worker()
        return worker.call(function, *args)


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

    def run(self, op: Op[R]) -> R:
        """Drive a generator of the core to its end, as one call."""
        return super().run(self._spans.call(op))

    def stream(self, core: StreamCore) -> TracedStream:
        """Return what carries a stream out, as one call."""
        return self._spans.stream(core)


def _close(links: Iterable[Link]) -> None:
    for link in links:
        link.channel.close()


def _read(link: Link, effect: Read) -> Any:
    answer = effect.stream.read()  # type: ignore[attr-defined]
    link.answered = time.monotonic()
    return answer


def _call(link: Link, effect: Effect) -> Any:
    match effect:
        case RpcCall(rpc, request, _, timeout_s, headers):
            answer = link.begin(rpc, rpc.serialize(request), timeout_s, headers)
            answered: Any = rpc.read(answer)
        case Download(rpc, request, _, timeout_s, headers):
            call = link.begin(rpc, rpc.serialize(request), timeout_s, headers)
            answered = [rpc.read(message) for message in call]
        case Upload(rpc, requests, _, timeout_s, headers):
            messages = map(rpc.serialize, requests)
            answered = rpc.read(link.begin(rpc, messages, timeout_s, headers))
        case OpenStream(rpc, _, timeout_s, headers):
            return _Stream(link, rpc, timeout_s, headers)
        case _:
            raise TypeError(f"{type(effect).__name__} needs no channel")
    link.answered = time.monotonic()
    return answered


def _of_client(
    op: Callable[Concatenate[ClientCore, P], Op[R]],
) -> Callable[Concatenate[Client, P], R]:
    """Make a blocking method of a generator of the client's core."""

    @drives(op, "Client")
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._transport.run(op(self._core, *args, **kwargs))

    return method


def _of_models(
    op: Callable[Concatenate[ModelsCore, P], Op[R]],
) -> Callable[Concatenate[Client, P], R]:
    """Make a blocking method of a generator about models."""

    @drives(op, "Client")
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._transport.run(op(self._core.models, *args, **kwargs))

    return method


def _of_session(
    op: Callable[Concatenate[SessionCore, P], Op[R]],
) -> Callable[Concatenate[Session, P], R]:
    """Make a blocking method of a generator of the session's core: one at a time."""

    @drives(op, "Session")
    def method(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return self._transport.run(op(self._core, *args, **kwargs))

    return method


class Client:
    """A connection to the service; safe to share between threads. Made by `connect`."""

    def __init__(self, addresses: list[str], options: Options) -> None:
        self._core = ClientCore(addresses, options, threading.Lock)
        credentials = self._core.context.caller.credentials
        spans = spans_of(options.traces, addresses)
        self._transport = (
            _Transport(addresses, options, credentials)
            if spans is None
            else _TracedTransport(addresses, options, credentials, spans)
        )
        self._frame_lock = threading.RLock()

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
        return _holding(_locks(own or ()), lambda: self._transport.run(op))

    @checked_with(chunks=arguments.chunks_of_sessions)
    def frame(
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
        locks = [*_locks(sessions), self._frame_lock]
        op = self._core.frame(items, return_hs=return_hs, train=train)
        outcomes = _holding(locks, lambda: self._transport.run(op))
        return [shortened(each) if isinstance(each, errors.Error) else each for each in outcomes]

    @checked
    def list_models(self, *, page_size: int = 100) -> Iterator[ModelInfo]:
        """Go through all models by name, a page at a time."""
        token = ""
        while True:
            models, token = self._transport.run(self._core.models.models_page(page_size, token))
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
        self._transport.close(self._core.frames)

    def __repr__(self) -> str:
        return f"<timernn.Client {', '.join(self._core.context.caller.addresses)}>"

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
        self._transport, self._lock = client._transport, threading.RLock()  # noqa: SLF001

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
    def state(self) -> Array:
        """The hidden state, read from the server, shape (N, H)."""
        return self.get_state()

    @property
    def waiting(self) -> list[Waiting]:
        """What waits of it on the server, read from there: see `get_waiting`."""
        return self.get_waiting()

    def fork(self, new_id: str | None = None, *, ttl: float | timedelta | None = None) -> Session:
        """Open another session from this one's present state.

        Args:
            new_id: The new session's name; None: one of 128 random bits.
            ttl: Its time to live in seconds; None: this one's.
        """
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
        train: bool = False,
    ) -> Iterator[Array]:
        """Apply chunk after chunk without waiting for each answer; yields in the same order.

        A chunk that is refused raises in its turn, after the answers of those before it; the error
        names it (`metadata["chunk_seq"]`), and none behind it is applied. After any error, another
        stream that begins with the first chunk without an output goes on without applying one
        twice. Leaving the loop early leaves the session in order: chunks that were sent count.

        Args:
            chunks: Inputs (N, T, D), T may vary. Unless it is a sequence, or in_flight is 1, it is
                read in a thread of its own, so that a slow source holds no answer back.
            in_flight: Chunks sent and not answered, at most; with 1 each answer comes before the
                next chunk is read. The server's replay window bounds it.
            return_hs: "all" hidden states of each chunk, the "last" alone, or "none".
            train: Leave a tape for `backward` with each chunk, as many as the server keeps.
        """
        source = _source(chunks, in_flight)
        core = self._transport.stream(
            StreamCore(self._core, source, in_flight=in_flight, return_hs=return_hs, train=train)
        )
        try:
            with self._lock:
                self._transport.run_part(core.open())
            while (hs := self._transport.run_part(core.step())) is not END:
                yield hs  # type: ignore[misc]  # all but END is an array
        except GeneratorExit:
            core.close(is_left=True)
            raise
        finally:
            try:
                core.close()
            finally:
                core.close()  # again, if an interrupt ended the first
                source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return


def _locks(sessions: Sequence[Session]) -> list[threading.RLock]:
    """Return the locks of several sessions, always in the same order."""
    return [session._lock for session in sorted(set(sessions), key=id)]  # noqa: SLF001


def _holding(locks: Sequence[threading.RLock], run: Callable[[], R]) -> R:
    """Run while holding locks.

    An interrupt may come right after a lock was taken, before anything could note it. So they are
    asked: one that this thread does not hold refuses to be released, and is passed over.
    """
    try:
        for lock in locks:
            lock.acquire()
        return run()
    finally:
        try:
            _release(locks)
        finally:
            _release(locks)  # again, if an interrupt ended the first


def _release(locks: Sequence[threading.RLock]) -> None:
    for lock in locks:
        with suppress(RuntimeError):
            lock.release()


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
                self._items.put(copy_of_caller(chunk))
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
