"""`timernn sessions`: show live sessions and end them."""

# No postponed annotations here: Typer reads them when a command is made.
from typing import Annotated

import typer

from service.cli.describe import SESSION_HEADINGS, session_fields, session_json, session_row
from service.cli.output import print_fields, print_json, print_table
from service.cli.remote import AsJson, Connection, SessionId, connects

app = typer.Typer(help="Look at live sessions and end them.", no_args_is_help=True)


@app.command("list")
@connects(for_operators=True)
def list_sessions(
    *,
    model: Annotated[
        str | None,
        typer.Option(envvar="TIMERNN_MODEL", metavar="MODEL", help="Only sessions of this model."),
    ] = None,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """List live sessions, the next to expire first.

    Examples:
      timernn sessions list
      timernn sessions list --model weather --json
    """
    with connection.open() as client:
        found = list(client.list_sessions(model))
    if json:
        print_json([session_json(session) for session in found])
    else:
        print_table(SESSION_HEADINGS, map(session_row, found))


@app.command()
@connects()
def show(
    session: SessionId,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Show one session.

    Example:
      timernn sessions show device-7
    """
    with connection.open() as client:
        found = client.get_session(session)
    if json:
        print_json(session_json(found))
    else:
        print_fields(session_fields(found))


@app.command()
@connects()
def close(
    session: SessionId,
    *,
    connection: Connection,
) -> None:
    """End a session: its state is dropped.

    Example:
      timernn sessions close device-7
    """
    with connection.open() as client:
        ended = client.close_session(session)
    print(f"closed {session}" if ended else f"{session} had ended before")
