"""`timernn serve`: run a server until SIGTERM."""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version
from typing import TYPE_CHECKING

import typer

from service.cli.output import warn
from service.cli.settings import takes_settings
from service.exposure import check_options, lacks
from service.listening import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.settings import Settings


# gRPC's poller for Python passes each event through a thread pool; without it, the thread that feeds the
# event loop polls the sockets itself (docs/adr/0020-grpc-poller.md). From 1.83 on the name is unknown,
# and each process that sets it would print a warning.
_GRPC_EXPERIMENTS = "-event_engine_poller_for_python"
_GRPC_LINE_WITH_EXPERIMENT = "1.82."


@takes_settings
def serve(settings: Settings) -> None:
    r"""Run a server until SIGTERM, then let the calls in flight end and exit with code 0.

    Once it serves it prints one line on stdout, `timernn ready on HOST:PORT`; everything else goes
    to stderr.

    Each option may stand in a TOML file, --config FILE, by its name without the dashes in front. An option
    counts more than its environment variable, and that more than the file. No password may stand in the
    file: use --redis-password-file.

      listen = "0.0.0.0:50051"
      tls-cert = "/etc/timernn/tls.crt"
      tls-key = "/etc/timernn/tls.key"
      tokens = "/etc/timernn/tokens.toml"
      workers = 4
      session-cache-bytes = "512MiB"

    Examples:
      timernn serve
      timernn serve --listen 127.0.0.1:0 --data-dir /var/lib/timernn
      timernn serve --listen 0.0.0.0:50051 --tls-cert tls.crt --tls-key tls.key \
          --tokens tokens.toml
      timernn serve --config /etc/timernn/timernn.toml
    """
    if (found := settings.contradiction()) is not None:
        option, message = found
        raise typer.BadParameter(message, param_hint=f"'{option}'")
    check_options(settings)
    is_open = bool(lacks(settings)) and not is_loopback(settings.listen)
    if is_open and not settings.supervised:  # once, not in every worker
        warn(f"{settings.listen} may be reached from other machines, without {lacks(settings)}")
    code = _run(settings)
    if code:
        raise typer.Exit(code)


def _run(settings: Settings) -> int:
    # Imported here, so that the other commands start without the engine and the store.
    if settings.workers > 1:
        from service.workers import supervise  # noqa: PLC0415

        return asyncio.run(supervise(settings, announce))
    if version("grpcio").startswith(_GRPC_LINE_WITH_EXPERIMENT):
        os.environ.setdefault("GRPC_EXPERIMENTS", _GRPC_EXPERIMENTS)
    from service.app import serve as serve_one  # noqa: PLC0415

    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        return runner.run(serve_one(settings, announce))


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop factory, or None where uvloop is not installed."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop


def announce(address: str) -> None:
    """Print the ready line."""
    print(f"timernn ready on {address}", flush=True)
