"""`timernn tenants`: what is done with all that one tenant has."""

# No postponed annotations here: Typer reads them when a command is made.
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.options import parse_file
from service.cli.output import counted, print_json
from service.cli.remote import AsJson

if TYPE_CHECKING:
    from service.store.purge import Purged

app = typer.Typer(help="Do something with all that one tenant has.", no_args_is_help=True)


class PurgeError(Exception):
    """Not everything was erased; the message is one line."""


@app.callback()
def _group() -> None:
    """Keep the name of the one command."""


@app.command()
def purge(
    tenant: Annotated[str, typer.Argument(help="Whose models and sessions.")],
    *,
    redis_url: Annotated[
        str,
        typer.Option(
            envvar="TIMERNN_REDIS_URL",
            metavar="URL",
            show_default=False,
            help="Store of the servers; a URL with a password belongs in the variable.",
        ),
    ],
    redis_password_file: Annotated[
        Path | None,
        typer.Option(
            envvar="TIMERNN_REDIS_PASSWORD_FILE",
            parser=parse_file,
            metavar="FILE",
            show_default=False,
            help="File with the password of the store's user.",
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", envvar="TIMERNN_YES", help="Erase; without it nothing happens.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Erase the models, checkpoints, sessions and waiting gradients of a tenant from the store.

    Revoke its tokens first: servers go on serving whoever holds one, and what begins meanwhile may stay.

    Example:
      timernn tenants purge acme --redis-url redis://127.0.0.1:6379 --yes
    """
    # Not imported for other commands.
    from service.security.tokens import check_name  # noqa: PLC0415
    from service.store.addresses import parse_store_url  # noqa: PLC0415

    try:
        check_name("tenant", tenant)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        parse_store_url(redis_url)
    except ValueError as error:
        raise typer.BadParameter(f"--redis-url: {error}") from error
    if not yes:
        raise typer.BadParameter(f"this erases all that {tenant} has, for ever: add --yes to do it")
    purged = asyncio.run(_purge(redis_url, str(redis_password_file or ""), tenant))
    if json:
        print_json({"tenant": tenant, "models": purged.models, "sessions": purged.sessions})
    else:
        models, sessions = counted(purged.models, "models"), counted(purged.sessions, "sessions")
        print(f"erased of {tenant}: {models}, {sessions}")


async def _purge(url: str, password_file: str, tenant: str) -> "Purged":
    # Not imported for other commands.
    from service.domain.errors import Unavailable  # noqa: PLC0415
    from service.settings import Settings  # noqa: PLC0415
    from service.store.connect import open_store  # noqa: PLC0415
    from service.store.failures import why  # noqa: PLC0415
    from service.store.purge import purge_tenant  # noqa: PLC0415

    settings = Settings(store_timeout_ms=5000, redis_password_file=password_file)
    store = await open_store(url, settings)
    try:
        return await purge_tenant(store, tenant)
    except Unavailable as error:
        text = f"the store at {store.address} cannot be reached: {why(error)}"
        raise PurgeError(f"{text}; the same command goes on where it ended") from error
    finally:
        await store.close()
