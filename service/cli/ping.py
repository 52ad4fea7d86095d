"""`timernn ping`: is there a server, and which?"""

# No postponed annotations here: Typer reads them when a command is made.
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.describe import format_span, ping_json, server_json
from service.cli.options import parse_optional_address
from service.cli.output import fail, print_json
from service.cli.remote import DEFAULT_SERVER, AsJson, Connection, connects
from service.connection_failures import in_words
from service.probe import ProbeError, check

if TYPE_CHECKING:
    import timernn

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


@connects(timeout=5.0)
def ping(
    *,
    connection: Connection,
    health: Health = "",
    json: AsJson = False,
) -> None:
    """Ask a server whether it is ready; exit code 0 if it is, 1 if not.

    With --json it also prints the server's limits. What the server is and its limits need a token
    where it has tokens; whether it is ready needs none. A health port says no more than that.

    Examples:
      timernn ping
      timernn ping --server 10.0.0.7:50051 --timeout 2
      timernn ping --json
    """
    if health and connection.server == DEFAULT_SERVER:
        _ask_health(health, connection.timeout, as_json=json)
        return
    with connection.open() as client:
        answer = client.ping()
        if not answer.serving:
            fail(f"the server at {answer.address} is not ready")
            raise typer.Exit(1)
        info = _server_info(client)
    if info is None:
        if json:
            print_json(ping_json(answer))
        else:
            print(
                f"{answer.address} is ready; it tells its version and limits only to callers with a token"
            )
        return
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
        why = in_words(error) if isinstance(error, OSError) else str(error)
        fail(f"{address}: {why or error}")
        raise typer.Exit(1) from error
    if as_json:
        print_json({"address": address, "serving": True})
    else:
        print(f"{address} is ready")


def _server_info(client: "timernn.Client") -> "timernn.ServerInfo | None":
    """Return what the server says about itself; None if it does not know the caller."""
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    try:
        return client.server_info()
    except timernn.Unauthenticated:
        return None
