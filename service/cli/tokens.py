"""`timernn tokens`: make and revoke the tokens that a server started with --tokens accepts."""

# No postponed annotations here: Typer reads them when a command is made.
import re
import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.options import choice_option, parse_path
from service.cli.output import fail, print_json, print_table, warn
from service.cli.remote import AsJson
from service.security.roles import Role

if TYPE_CHECKING:
    from service.security.tokens import Token

app = typer.Typer(
    help="Make and revoke the tokens that a server with --tokens accepts.", no_args_is_help=True
)

_LONGEST_LINE = 1024  # characters, of which a token has 64
_SPANS = {"m": "minutes", "h": "hours", "d": "days"}


class RoleName(StrEnum):
    """What a token may do."""

    INFER = "infer"
    TRAIN = "train"
    ADMIN = "admin"
    OPERATOR = "operator"


def parse_span(text: str) -> timedelta:
    """Read a span of time such as 90m, 12h or 30d.

    Raises:
        typer.BadParameter: If it is not one.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text)
    if not found:
        raise typer.BadParameter(f"expected a span such as 90m, 12h or 30d, got {text!r}")
    return timedelta(**{_SPANS[found[2]]: int(found[1])})


File = Annotated[
    Path,
    typer.Option(
        "--file", envvar="TIMERNN_TOKENS", metavar="FILE", parser=parse_path, help="File of tokens."
    ),
]


@app.command()
def create(
    *,
    file: File,
    role: Annotated[
        RoleName,
        typer.Option(
            **choice_option(RoleName), envvar="TIMERNN_ROLE", help="What the token's bearer may do."
        ),
    ],
    tenant: Annotated[
        str,
        typer.Option(
            envvar="TIMERNN_TENANT", help="Whose models and sessions; `default` without tenants."
        ),
    ],
    expires: Annotated[
        timedelta | None,
        typer.Option(
            envvar="TIMERNN_EXPIRES",
            parser=parse_span,
            metavar="SPAN",
            help="For how long, such as 30d.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(envvar="TIMERNN_NAME", help="What the log calls it; unique in the file.")
    ] = "",
) -> None:
    r"""Make a token; it is printed alone, as the last line of stdout, and kept nowhere.

    Servers that use the file accept it within seconds.

    Example:
      timernn tokens create --file tokens.toml --role train --tenant acme \
          --expires 30d
    """
    from service.security.tokens import create_token  # noqa: PLC0415 - not for other commands

    now = datetime.now(UTC).replace(microsecond=0)
    try:
        ends = now + expires if expires else None
    except OverflowError:
        raise typer.BadParameter("--expires: it would end after the year 9999") from None
    try:
        presented, token = create_token(file, Role(role.value), tenant, name=name, expires=ends)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    until = f"until {_moment(ends)}" if ends else "without an end"
    print(f"{token.id} {token.name}: role {role}, tenant {tenant}, {until}; shown this once:")
    print(presented)


@app.command("list")
def list_tokens(*, file: File, json: AsJson = False) -> None:
    """List the tokens of a file: what they may do, never themselves.

    Example:
      timernn tokens list --file tokens.toml
    """
    from service.security.tokens import read_tokens  # noqa: PLC0415 - not for other commands

    found, now = list(read_tokens(file)), datetime.now(UTC)
    if json:
        print_json([_json(token, now) for token in found])
    else:
        rows = [_json(token, now).values() for token in found]
        print_table(
            ("id", "name", "tenant", "role", "created", "expires", "state"),
            [[("never" if cell is None else cell) for cell in row] for row in rows],
        )


@app.command()
def revoke(
    *,
    file: File,
    name: Annotated[str, typer.Option(envvar="TIMERNN_NAME", help="The token of this name.")] = "",
    token_id: Annotated[
        str, typer.Option("--id", envvar="TIMERNN_ID", help="The token of this id.")
    ] = "",
    token_stdin: Annotated[
        bool,
        typer.Option(
            "--token-stdin", envvar="TIMERNN_TOKEN_STDIN", help="The token that stdin holds."
        ),
    ] = False,
) -> None:
    """Revoke a token: servers that use the file refuse it within 5 seconds.

    Examples:
      timernn tokens revoke --file tokens.toml --name acme-train-3fa1
      timernn tokens revoke --file tokens.toml --token-stdin < leaked-token
    """
    from service.security.tokens import read_tokens, revoke_tokens  # noqa: PLC0415

    if sum(map(bool, (name, token_id, token_stdin))) != 1:
        raise typer.BadParameter("expected one of --name, --id and --token-stdin")
    presented = _line_of_stdin() if token_stdin else ""
    if token_stdin and not presented:
        raise typer.BadParameter("--token-stdin: expected a token on stdin, got nothing")
    try:
        revoked = revoke_tokens(file, token_id=token_id, name=name, presented=presented)
    except LookupError as error:
        fail(str(error))
        raise typer.Exit(1) from error
    print(f"revoked {revoked.id} {revoked.name}")
    if not list(read_tokens(file)):
        warn(f"{file} holds no token any more: servers that use it refuse everybody")


def _line_of_stdin() -> str:
    """Return the first line of stdin, or what could be a token at its begin."""
    try:
        return sys.stdin.readline(_LONGEST_LINE).strip()
    except UnicodeDecodeError:
        raise typer.BadParameter("--token-stdin: expected a token on stdin, got no text") from None


def _json(token: "Token", now: datetime) -> dict[str, str | None]:
    return {
        "id": token.id,
        "name": token.name,
        "tenant": token.tenant,
        "role": token.role.value,
        "created": _moment(token.created),
        "expires": _moment(token.expires) if token.expires else None,
        "state": "expired" if token.has_expired(now) else "valid",
    }


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
