"""`timernn ping`: is there a server, and which?"""

# No postponed annotations here: Typer reads them when a command is made.
from datetime import UTC, datetime
from typing import Annotated

import typer

from service.cli.describe import format_span, server_json
from service.cli.options import parse_optional_address
from service.cli.output import fail, print_json
from service.cli.remote import DEFAULT_SERVER, AsJson, Proxy, Server, Timeout, connected
from service.probe import ProbeError, check

Health = Annotated[
    str,
    typer.Option(
        "--health",
        envvar="TIMERNN_HEALTH_LISTEN",
        metavar="HOST:PORT",
        parser=parse_optional_address,
        show_default=False,
        help="Ask this health port (--health-listen of the server) instead, if no --server is named.",
        rich_help_panel="Connection",
    ),
]


def ping(
    *,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 5.0,
    proxy: Proxy = None,
    health: Health = "",
    json: AsJson = False,
) -> None:
    """Ask a server whether it is ready; exit code 0 if it is, 1 if not.

    With --json it also prints the server's limits. A health port says no more than whether it is ready.

    Examples:
      timernn ping
      timernn ping --server 10.0.0.7:50051 --timeout 2
      timernn ping --json
    """
    if health and server == DEFAULT_SERVER:
        _ask_health(health, timeout, as_json=json)
        return
    with connected(server, timeout, proxy) as client:
        answer = client.ping()
        if not answer.serving:
            fail(f"the server at {answer.address} is not ready")
            raise typer.Exit(1)
        info = client.server_info()
    if json:
        print_json(server_json(info, answer))
        return
    print(
        f"{answer.address} is ready: timernn {info.server_version}, replica {info.replica_id},"
        f" up {format_span(datetime.now(UTC) - info.start_time)},"
        f" answered in {answer.latency_s * 1000:.1f} ms"
    )


def _ask_health(address: str, timeout_s: float, *, as_json: bool) -> None:
    try:
        check(address, timeout_s=timeout_s)
    except (ProbeError, OSError) as error:
        fail(f"{address}: {error}")
        raise typer.Exit(1) from error
    if as_json:
        print_json({"address": address, "serving": True})
    else:
        print(f"{address} is ready")
