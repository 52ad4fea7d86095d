"""`timernn sessions`: show live sessions and end them."""

# No postponed annotations here: Typer reads them when a command is made.
from typing import Annotated

import typer

from service.cli.describe import SESSION_HEADINGS, session_fields, session_json, session_row
from service.cli.output import print_fields, print_json, print_table
from service.cli.remote import DEFAULT_SERVER, AsJson, Proxy, Server, SessionId, Timeout, connected

app = typer.Typer(help="Look at live sessions and end them.", no_args_is_help=True)


@app.command("list")
def list_sessions(
    *,
    model: Annotated[
        str | None,
        typer.Option(envvar="TIMERNN_MODEL", metavar="MODEL", help="Only sessions of this model."),
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    proxy: Proxy = None,
    json: AsJson = False,
) -> None:
    """List live sessions, the next to expire first.

    Examples:
      timernn sessions list
      timernn sessions list --model weather --json
    """
    with connected(server, timeout, proxy) as client:
        found = list(client.list_sessions(model))
    if json:
        print_json([session_json(session) for session in found])
    else:
        print_table(SESSION_HEADINGS, map(session_row, found))


@app.command()
def show(
    session: SessionId,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    proxy: Proxy = None,
    *,
    json: AsJson = False,
) -> None:
    """Show one session.

    Example:
      timernn sessions show device-7
    """
    with connected(server, timeout, proxy) as client:
        found = client.get_session(session)
    if json:
        print_json(session_json(found))
    else:
        print_fields(session_fields(found))


@app.command()
def close(
    session: SessionId,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    proxy: Proxy = None,
) -> None:
    """End a session: its state is dropped.

    Example:
      timernn sessions close device-7
    """
    with connected(server, timeout, proxy) as client:
        ended = client.close_session(session)
    print(f"closed {session}" if ended else f"{session} had ended before")
