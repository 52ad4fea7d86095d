"""Builds a server from its parts, runs it, and shuts it down in the right order.

The only module that knows every layer. The order of the shutdown: health becomes NOT_SERVING, load
balancers get time to notice, clients of streams are asked to move, calls in flight end, then the domain,
the store's connections and last the embedded store are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # has no stubs

from service.access import Access
from service.compute.scheduler import Scheduler
from service.connection_failures import in_words
from service.domain.errors import DomainError, Unavailable
from service.domain.limits_policy import SameLimits
from service.domain.model_cache import ModelCache
from service.domain.session_cache import SessionCache
from service.domain.tapes import TapeCache
from service.domain.use_cases import Caches, build_use_cases
from service.exposure import ExposedError
from service.failpoints import FailpointError, Failpoints
from service.listening import try_to_bind
from service.logs import log_to_stderr
from service.memory import FreedMemory, keep_freed_memory
from service.metrics.heartbeat import Heartbeat
from service.metrics.recorder import Recorder
from service.rpc.admission import TenantAdmissions
from service.rpc.auth import DEFAULT_TENANT
from service.rpc.logins import TokenLogin
from service.rpc.server import RpcServer, rpc_types
from service.rpc.server_info import ServerInfo
from service.rpc.stream import StreamRules
from service.rpc.tls import TlsIdentity
from service.security.files import SecretFileError
from service.store.addresses import parse_store_url
from service.store.connect import UnfitStoreError, open_store
from service.store.credentials import PasswordFileError
from service.store.embedded import EmbeddedStore, EmbeddedStoreError
from service.store.failures import why
from service.telemetry import NULL_OBSERVER, Observers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from aiohttp.web import RouteDef

    from service.domain.limits_policy import LimitsPolicy
    from service.domain.use_cases import UseCases
    from service.metrics.recorder import Snapshot
    from service.rpc.auth import Authenticator
    from service.security.certificates import ServerCertificate
    from service.settings import Settings
    from service.store.connect import Store
    from service.telemetry import Observer

CHECK_S: Final = 1.0  # the interval of health checks of the store

_GARBAGE_THRESHOLD: Final = 10_000  # objects made and not freed since the last collection

_LOGGER = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the message is one line for the operator."""


async def serve(settings: Settings, on_ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code.

    A second signal aborts the calls in flight.

    Args:
        settings: How to run.
        on_ready: Called once with the address, when calls are answered.

    Returns:
        0; 1 when a second signal cut the drain short.

    Raises:
        StartError: If a port, the data directory or the store cannot be used.
    """
    log_to_stderr(settings.log_level, settings.worker, settings.log_format)
    points = _failpoints(settings)
    signals = _Signals()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(signals)
        if settings.supervised:
            stack.enter_context(_ends_with_stdin(signals))
        # Results must not depend on how many cores there are.
        stack.enter_context(threadpool_limits(1, "blas"))
        access = _access(settings)
        embedded = await _start_embedded(settings, stack)
        recorder = Recorder(rpc_types()) if settings.metrics_listen else None
        observer = _observer(recorder, settings, stack)
        policy = access.tenants or SameLimits(settings.limits)
        admissions = _tenant_admissions(access, settings)
        store = await _open_store(settings, embedded, stack, observer=observer, policy=policy)
        login = _login(access, recorder)
        server = build_server(
            settings,
            store,
            stack,
            authenticator=login,
            points=points,
            observer=observer,
            policy=policy,
            tenants=admissions,
        )
        if signals.is_stopping:
            return 0
        identity = TlsIdentity(access.certificate.value) if access.certificate else None
        address = await _listen(settings.listen, partial(server.start, identity=identity), settings)
        stack.push_async_callback(server.drain, 0)
        if settings.health_listen:
            health = await _listen(settings.health_listen, server.start_health, settings)
            _LOGGER.info("health on %s", health)
        changes: list[Callable[[ServerCertificate], None]] = []
        if identity is not None:
            changes.append(identity.change)
        if recorder is not None:
            page = await _page_routes(
                server,
                store,
                stack,
                settings=settings,
                recorder=recorder,
                login=login,
                access=access,
            )
            changes += await _start_metrics(
                recorder, server, store, access, settings, stack, routes=page
            )
        renew = admissions.renew if admissions else (lambda: None)
        stack.enter_context(access.watched(*changes, on_tenants=renew))
        keep_freed_memory()
        _collect_garbage_less_often()
        server.health.set_serving(True)
        watching = [
            asyncio.create_task(_watch_store(server, store, embedded)),
            asyncio.create_task(FreedMemory(server.bytes_in_work).watch()),
        ]
        text = "timernn %s serves on %s; store %s, durability %s"
        _LOGGER.info(text, version("timernn"), address, store.address, settings.durability)
        on_ready(address)
        await signals.stop.wait()
        for watch in watching:
            watch.cancel()
        signals.is_draining = True
        await points.hit("before_drain")
        await _drain(server, settings, signals)
    return int(signals.hasten.is_set())


def _collect_garbage_less_often() -> None:
    """Let the garbage collector skip what lives as long as the process, and run less often.

    What a chunk needs is freed by its reference count. Collecting at each 700th new object, as Python does by
    default, traverses the chunks in work again and again and finds nothing.
    """
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)


class _Signals:
    """SIGTERM and SIGINT: the first one starts the drain, the second cuts it short.

    The third ends the process at once, and so does the second if the drain has not begun.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hasten = asyncio.Event()
        self.is_draining = False

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self.stop.is_set()

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def __exit__(self, *_exc: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self.stop.is_set():
            self.stop.set()
        elif self.is_draining and not self.hasten.is_set():
            self.hasten.set()
        else:
            os._exit(1)


async def _start_embedded(
    settings: Settings, stack: contextlib.AsyncExitStack
) -> EmbeddedStore | None:
    if settings.redis_url:
        return None
    embedded = EmbeddedStore(settings.data_dir)
    stack.push_async_callback(asyncio.to_thread, embedded.stop)
    try:
        await asyncio.to_thread(embedded.start)
    except EmbeddedStoreError as error:
        raise StartError(str(error)) from error
    return embedded


async def _open_store(
    settings: Settings,
    embedded: EmbeddedStore | None,
    stack: contextlib.AsyncExitStack,
    *,
    observer: Observer,
    policy: LimitsPolicy,
) -> Store:
    url = embedded.url if embedded else settings.redis_url
    if embedded and settings.redis_password_file:
        raise StartError("--redis-password-file needs --redis-url")
    try:
        shown = f"the store at {parse_store_url(url)}"
        store = await open_store(url, settings, observer, policy=policy)
        stack.push_async_callback(store.close)
        with _quiet():
            await store.check()
    except ValueError as error:
        raise StartError(f"--redis-url: {error}") from error
    except PasswordFileError as error:
        raise StartError(f"--redis-password-file: {error}") from error
    except Unavailable as error:
        raise StartError(f"{shown} cannot be reached: {why(error)}") from error
    except UnfitStoreError as error:
        raise StartError(f"{shown} cannot be used: {error}") from error
    return store


def build_server(
    settings: Settings,
    store: Store,
    stack: contextlib.AsyncExitStack,
    *,
    authenticator: Authenticator | None = None,
    points: Failpoints | None = None,
    observer: Observer = NULL_OBSERVER,
    policy: LimitsPolicy | None = None,
    tenants: TenantAdmissions | None = None,
) -> RpcServer:
    """Wire every layer over an open store; the stack closes what has work to finish."""
    limits = settings.limits
    policy = policy or SameLimits(limits)
    scheduler = Scheduler(settings.max_batch_rows, settings.threads, observer)
    if points:
        scheduler = points.wrap_scheduler(scheduler)
        store = replace(
            store,
            sessions=points.wrap_store(store.sessions),
            models=points.wrap_store(store.models),
        )
    stack.push_async_callback(asyncio.to_thread, scheduler.close)
    caches = Caches(
        ModelCache(
            store.models, limits.head_max_age_ms, settings.weights_cache_bytes, observer=observer
        ),
        SessionCache(settings.session_cache_bytes),
        TapeCache(settings.session_cache_bytes),
    )
    observer.cache_added("sessions", caches.sessions.counts)
    observer.cache_added("tapes", caches.tapes.counts)
    use_cases = build_use_cases(
        store.sessions,
        store.models,
        caches,
        scheduler=scheduler,
        limits=limits,
        policy=policy,
        observer=observer,
    )
    stack.push_async_callback(_finish, use_cases, caches.models, settings.drain_s)
    info = ServerInfo(
        server_version=version("timernn"),
        replica_id=secrets.token_hex(8),
        start_time_ms=int(time.time() * 1000),
        limits=limits,
        policy=policy,
        durability=settings.durability,
    )
    stream_rules = StreamRules(
        deadline_s=limits.default_deadline_ms / 1000, age_s=settings.connection_age_ms / 1000
    )
    return RpcServer(
        use_cases,
        info,
        authenticator=authenticator,
        observer=observer,
        rules=stream_rules,
        tenants=tenants,
        reuse_port=settings.supervised,
    )


def _access(settings: Settings) -> Access:
    try:
        return Access(settings)
    except (ExposedError, SecretFileError) as error:
        raise StartError(str(error)) from error


async def _start_metrics(
    recorder: Recorder,
    server: RpcServer,
    store: Store,
    access: Access,
    settings: Settings,
    stack: contextlib.AsyncExitStack,
    *,
    routes: Sequence[RouteDef],
) -> list[Callable[[ServerCertificate], None]]:
    """Begin to measure, and show it on the metrics port; return who has to know of a new certificate."""
    # Its HTTP server takes longer to import than all the rest.
    from service.metrics.start import serve_metrics, serve_worker, start_measuring  # noqa: PLC0415
    from service.page.assets import asset_routes  # noqa: PLC0415

    async def count_sessions() -> dict[str, int]:
        tenants = sorted(_tenants(access))
        return {tenant: await store.sessions.count_sessions(tenant) for tenant in tenants}

    async def snapshot() -> Snapshot:
        return recorder.snapshot()

    recorder.ask(
        lambda: {
            "timernn_store_usable": float(server.health.is_serving),
            "timernn_operations_in_flight": server.admission.operations,
            "timernn_request_bytes_in_flight": server.admission.request_bytes,
        }
    )
    await start_measuring(recorder, count_sessions, access, settings=settings, stack=stack)
    if settings.supervised:
        await serve_worker(recorder, settings.metrics_listen, stack, routes=routes)
        return []
    try:
        address, tls = await serve_metrics(
            snapshot, access, settings=settings, stack=stack, routes=[*asset_routes(), *routes]
        )
    except OSError as error:
        reason = in_words(error) or "the address cannot be bound"
        raise StartError(f"cannot listen on {settings.metrics_listen}: {reason}") from error
    _LOGGER.info("metrics on %s://%s/metrics", "https" if tls else "http", address)
    return [tls.change] if tls else []


async def _page_routes(
    server: RpcServer,
    store: Store,
    stack: contextlib.AsyncExitStack,
    *,
    settings: Settings,
    recorder: Recorder,
    login: TokenLogin | None,
    access: Access,
) -> list[RouteDef]:
    """Begin to beat, and return what answers the page."""
    from service.page.api import PageApi  # noqa: PLC0415 - its HTTP server takes long to import

    info = server.info
    about = {
        "version": info.server_version,
        "host": socket.gethostname(),
        "worker": settings.worker,
        "start_time_ms": info.start_time_ms,
    }
    heart = Heartbeat(
        store.replicas,
        recorder,
        server.use_cases.recent_steps,
        replica_id=info.replica_id,
        about=about,
    )
    # A login on the page is signed by what all replicas share, so that is known before the first.
    with contextlib.suppress(DomainError):
        await heart.beat()
    stack.callback(asyncio.ensure_future(heart.run()).cancel)
    api = PageApi(
        server.use_cases,
        store.sessions,
        store.replicas,
        secret=lambda: heart.secret,
        login=login,
        tenants=partial(_tenants, access),
        is_relayed=settings.supervised,
    )
    return api.routes()


def _tenants(access: Access) -> set[str]:
    """Return the tenants that tokens name, and the one of before there were any."""
    return {DEFAULT_TENANT} | {
        token.tenant for token in (access.tokens.value if access.tokens else ())
    }


def _tenant_admissions(access: Access, settings: Settings) -> TenantAdmissions | None:
    if access.tenants is None:
        return None
    return TenantAdmissions(access.tenants.rates_of, parts=settings.worker_count)


def _observer(
    recorder: Recorder | None, settings: Settings, stack: contextlib.AsyncExitStack
) -> Observer:
    """Return who sees what the server does: the metrics, the traces, both or nobody."""
    observers: list[Observer] = [recorder] if recorder else []
    if settings.traces:
        try:
            from service.tracing import start_tracing  # noqa: PLC0415 - an extra of its own
        except ModuleNotFoundError as error:
            raise StartError("--traces needs more: pip install 'timernn[otel]'") from error
        spans, finish = start_tracing(settings.worker)
        stack.push_async_callback(asyncio.to_thread, finish)
        observers.append(spans)
    if len(observers) > 1:
        return Observers(*observers)
    return observers[0] if observers else NULL_OBSERVER


def _login(access: Access, recorder: Recorder | None) -> TokenLogin | None:
    tokens = access.tokens
    if tokens is None:
        return None

    def on_login(result: str) -> None:
        if recorder is not None:
            recorder.add("timernn_logins_total", result)

    return TokenLogin(lambda: tokens.value, on_login)


def _failpoints(settings: Settings) -> Failpoints:
    try:
        points = Failpoints(settings.failpoints)
    except FailpointError as error:
        raise StartError(f"--failpoints: {error}") from error
    if points and not settings.testing:
        raise StartError("--failpoints: only for tests; add --testing, never in production")
    return points


async def _listen(listen: str, start: Callable[[str], Awaitable[str]], settings: Settings) -> str:
    """Open a port; if that fails, raise a StartError with the reason."""
    try:
        try_to_bind(listen, is_shared=settings.supervised)
        return await start(listen)
    except OSError as error:
        reason = in_words(error) or "the address cannot be bound"
        raise StartError(f"cannot listen on {listen}: {reason}") from error


async def _watch_store(server: RpcServer, store: Store, embedded: EmbeddedStore | None) -> None:
    """Set health by whether the store can be used; restart the embedded store if it died."""
    while True:
        await asyncio.sleep(CHECK_S)
        try:
            if embedded:
                await embedded.keep_running()
            await store.check()
        except Exception as error:  # noqa: BLE001 - whatever it is, the store cannot be used now
            if server.health.is_serving:
                reason = error.__cause__ or error
                _LOGGER.error("not serving: the store cannot be used: %s", reason)  # noqa: TRY400 - one line per change, no traceback
            server.health.set_serving(False)
        else:
            if not server.health.is_serving:
                _LOGGER.warning("serving again: the store can be used")
            server.health.set_serving(True)


async def _drain(server: RpcServer, settings: Settings, signals: _Signals) -> None:
    _LOGGER.info("draining")
    server.health.set_serving(False)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(signals.hasten.wait(), settings.drain_notice_s)
    draining = asyncio.create_task(server.drain(settings.drain_s))
    hastening = asyncio.create_task(signals.hasten.wait())
    await asyncio.wait({draining, hastening}, return_when=asyncio.FIRST_COMPLETED)
    if signals.hasten.is_set():
        await server.drain(0)
    hastening.cancel()
    await draining


async def _finish(use_cases: UseCases, model_cache: ModelCache, limit_s: float) -> None:
    """Wait for what was begun, and for reads ahead, before the store's connections are closed."""
    try:
        async with asyncio.timeout(limit_s):
            await use_cases.drain()
            await model_cache.drain()
    except TimeoutError:
        _LOGGER.warning("some of what was begun did not end in time")


@contextlib.contextmanager
def _ends_with_stdin(signals: _Signals) -> Iterator[None]:
    """Stop when the supervisor has ended for whatever reason: its end of the pipe is closed then."""
    loop = asyncio.get_running_loop()

    def on_readable() -> None:
        if not os.read(0, 1):
            loop.remove_reader(0)
            signals.stop.set()

    loop.add_reader(0, on_readable)
    try:
        yield
    finally:
        loop.remove_reader(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress log lines about a failure that the StartError reports."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
