"""Several server processes on one port: `timernn serve --workers N`.

Because of the GIL a process uses little more than one core, so several processes are needed to fill a
machine. Each worker is a replica like any other, with its own event loop and one BLAS thread; the kernel
spreads the clients' connections over them (SO_REUSEPORT), and a session moves between them as between
any replicas. The supervisor holds the port and the embedded store, restarts whichever of them died, and
forwards SIGTERM. It serves nothing itself and never imports gRPC: workers are new programs, not forks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from service.access import Access
from service.connection_failures import in_words
from service.listening import UNIX, shared_port
from service.logs import log_to_stderr
from service.security.files import SecretFileError
from service.settings import Limits, Settings
from service.store.embedded import EmbeddedStore, EmbeddedStoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from service.metrics.workers import WorkerMetrics

READY: Final = b"timernn ready on "
CHECK_S: Final = 1.0  # the interval at which the embedded store is looked after
FIRST_RESTART_S: Final = 0.2
LAST_RESTART_S: Final = 10.0
# If a worker does not become ready in so many starts, the supervisor ends.
STARTS_TRIED: Final = 3

_LOGGER = logging.getLogger(__name__)


class WorkerError(Exception):
    """The workers cannot be started; the message is one line for the operator."""


async def supervise(settings: Settings, on_ready: Callable[[str], None]) -> int:
    """Run the workers until SIGTERM or SIGINT and return the worst of their exit codes.

    A second signal is passed on to the workers, which cut their drain short.

    Args:
        settings: The settings of each worker; `workers` is the number of workers.
        on_ready: Called once with the address, when every worker serves.

    Raises:
        WorkerError: If the port or the store cannot be used, or a worker does not start.
    """
    log_to_stderr(settings.log_level, form=settings.log_format)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    workers: list[_Worker] = []

    def on_signal() -> None:
        if stop.is_set():
            for worker in workers:
                worker.stop()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with contextlib.AsyncExitStack() as stack:
        address = stack.enter_context(_port(settings.listen))
        health = ""
        if settings.health_listen:
            health = stack.enter_context(_port(settings.health_listen))
        own = replace(
            settings,
            listen=address,
            health_listen=health,
            redis_url=await stack.enter_async_context(_store(settings)),
            workers=1,
            worker_count=settings.workers,
            supervised=True,
            compute_threads=settings.threads,
        )
        metrics = await _serve_metrics(settings, stack) if settings.metrics_listen else None
        for index in range(1, settings.workers + 1):
            socket = f"{UNIX}{metrics.path(index)}" if metrics else ""
            workers.append(_Worker(index, environment_of(replace(own, metrics_listen=socket))))
        codes = await _run_all(workers, stop, lambda: on_ready(address))
    for code in codes:
        if isinstance(code, BaseException):
            raise code
    return max(code for code in codes if isinstance(code, int))


async def _run_all(
    workers: list[_Worker], stop: asyncio.Event, on_ready: Callable[[], None]
) -> list[int | BaseException]:
    """Run the workers until one ends for good or a stop is asked for; return how each ended."""
    running = [asyncio.create_task(worker.run()) for worker in workers]
    stopping = asyncio.create_task(stop.wait())
    try:
        await _until_ready(workers, running, stopping)
        if not stop.is_set():
            on_ready()
        await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        for worker in workers:
            worker.stop()
        codes = await asyncio.gather(*running, return_exceptions=True)
    return codes


async def _serve_metrics(settings: Settings, stack: contextlib.AsyncExitStack) -> WorkerMetrics:
    """Serve one metrics port for all workers; return where each of them is to answer."""
    # Its HTTP server takes longer to import than all the rest.
    from service.metrics.start import serve_metrics  # noqa: PLC0415
    from service.metrics.workers import WorkerMetrics  # noqa: PLC0415
    from service.page.assets import asset_routes  # noqa: PLC0415

    try:
        access = Access(settings)
        metrics = WorkerMetrics(settings.workers)
        stack.callback(metrics.close)
        routes = [*asset_routes(), *metrics.relays()]
        address, tls = await serve_metrics(
            metrics.snapshot, access, settings=settings, stack=stack, routes=routes
        )
    except SecretFileError as error:
        raise WorkerError(str(error)) from error
    except OSError as error:
        reason = in_words(error) or "the address cannot be bound"
        raise WorkerError(f"cannot listen on {settings.metrics_listen}: {reason}") from error
    stack.enter_context(access.watched(*([tls.change] if tls else [])))
    _LOGGER.info("metrics on %s://%s/metrics", "https" if tls else "http", address)
    return metrics


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the variables that give a process these settings; secrets stay off command lines."""
    names: dict[str, object] = {}
    for field in fields(Settings):
        if field.name != "limits":
            names[field.name] = getattr(settings, field.name)
    names |= {
        f"limit_{field.name}": getattr(settings.limits, field.name) for field in fields(Limits)
    }
    variables = {f"TIMERNN_{name.upper()}": str(value) for name, value in names.items()}
    # An empty variable is as good as none: without this one, the file would say what an option had taken back.
    return {**variables, "TIMERNN_CONFIG": ""}


class _Worker:
    """One server process, restarted until `stop` is called."""

    def __init__(self, number: int, environment: Mapping[str, str]) -> None:
        self._number = number
        self._environment = {**os.environ, **environment, "TIMERNN_WORKER": str(number)}
        self._process: asyncio.subprocess.Process | None = None
        self._is_stopping = False
        self.is_ready = asyncio.Event()

    async def run(self) -> int:
        """Keep a process running; return the exit code of the last."""
        pause_s, failed_starts = FIRST_RESTART_S, 0
        while True:
            code = await self._run_once()
            if self._is_stopping:
                return code
            failed_starts = 0 if self.is_ready.is_set() else failed_starts + 1
            if failed_starts == STARTS_TRIED:
                raise WorkerError(f"worker {self._number} does not start; its last words are above")
            _LOGGER.error("worker %d ended with %d: starting it again", self._number, code)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RESTART_S)

    def stop(self) -> None:
        """Ask the process to drain; from now on it is not started again."""
        self._is_stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def _run_once(self) -> int:
        # A process inherits what is blocked: SIGTERM waits until the worker has a handler for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "service",
                "serve",
                stdin=asyncio.subprocess.PIPE,  # closed by the system when this process ends
                stdout=asyncio.subprocess.PIPE,
                env=self._environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if self._is_stopping:
            process.terminate()
        reader = process.stdout
        if reader is None:
            raise RuntimeError("a worker has no output")
        while line := await reader.readline():
            if line.startswith(READY):
                self.is_ready.set()
        return await process.wait()


async def _until_ready(
    workers: list[_Worker], running: list[asyncio.Task[int]], stopping: asyncio.Task[bool]
) -> None:
    all_ready = asyncio.create_task(_all_ready(workers))
    await asyncio.wait({all_ready, stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
    all_ready.cancel()
    for task in running:
        if task.done():
            task.result()


async def _all_ready(workers: list[_Worker]) -> None:
    for worker in workers:
        await worker.is_ready.wait()


@contextlib.contextmanager
def _port(listen: str) -> Iterator[str]:
    """Hold a port for the workers; yield the address with its number."""
    if listen.startswith("unix:"):
        raise WorkerError("--workers: processes share a TCP port, not a unix socket")
    try:
        with shared_port(listen) as address:
            yield address
    except OSError as error:
        raise WorkerError(f"cannot listen on {listen}: {error.strerror}") from error


@contextlib.asynccontextmanager
async def _store(settings: Settings) -> AsyncIterator[str]:
    """Yield the store's URL; without one, that of an embedded store that lives as long as this."""
    if settings.redis_url:
        yield settings.redis_url
        return
    try:
        with EmbeddedStore(settings.data_dir) as embedded:
            watching = asyncio.create_task(_watch_store(embedded))
            try:
                yield embedded.url
            finally:
                watching.cancel()
    except EmbeddedStoreError as error:
        raise WorkerError(str(error)) from error


async def _watch_store(embedded: EmbeddedStore) -> None:
    """Start the embedded store again whenever it died; the workers find it at the address that they know."""
    while True:
        await asyncio.sleep(CHECK_S)
        try:
            await embedded.keep_running()
        except (EmbeddedStoreError, OSError) as error:
            _LOGGER.error("the embedded store does not start: %s", error)  # noqa: TRY400 - one line, no traceback
