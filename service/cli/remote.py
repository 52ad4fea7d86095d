"""The options that all client commands share: the server, the timeout, the output format."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import timernn

DEFAULT_SERVER = "127.0.0.1:50051"

Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="TIMERNN_SERVER",
        metavar="HOST[:PORT]",
        help="The server, or several by commas to be tried in turn.",
        rich_help_panel="Connection",
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        envvar="TIMERNN_TIMEOUT",
        min=0.001,
        metavar="SECONDS",
        help="How long to try, retries included.",
        rich_help_panel="Connection",
    ),
]
Proxy = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        envvar="TIMERNN_PROXY",
        metavar="URL",
        show_default="a direct connection",
        help='HTTP proxy, http://HOST:PORT, or "environment" for what http_proxy says; never used for'
        " a loopback address.",
        rich_help_panel="Connection",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", envvar="TIMERNN_JSON", help="Print JSON.")]
ModelId = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="The model's name.")
]
SessionId = Annotated[
    str, typer.Argument(metavar="SESSION", show_default=False, help="The session's name.")
]

# The option for each argument of the library whose name is another.
_OPTIONS = {"target": "--server", "proxy": "--proxy"}


@contextmanager
def connected(server: str, timeout_s: float, proxy: str | None = None) -> Iterator[timernn.Client]:
    """Connect to one of the servers for one command.

    Args:
        server: HOST:PORT, or several by commas.
        timeout_s: For each call with its retries, in seconds.
        proxy: An HTTP proxy's URL, "environment", or None.
    """
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    addresses = [address.strip() for address in server.split(",") if address.strip()]
    if not addresses:
        raise typer.BadParameter("expected HOST:PORT, got nothing", param_hint="'--server'")
    try:
        connecting = timernn.connect(
            addresses, timeout=timeout_s, connect_timeout=timeout_s, proxy=proxy
        )
    except timernn.BadField as error:
        option = _OPTIONS.get(error.metadata.get("field", ""), "--timeout")
        _, _, why = error.message.partition(": ")
        raise typer.BadParameter(why, param_hint=f"'{option}'") from error
    with connecting as client:
        yield client
