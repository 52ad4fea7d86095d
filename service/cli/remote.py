"""How client commands reach a server: one set of options for all of them."""

from __future__ import annotations

import functools
import inspect
import os
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path  # noqa: TC003 - Typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from service.cli.options import number_option, parse_file, parse_number
from service.files import read_file
from service.security.roles import TENANT_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import timernn

DEFAULT_SERVER = "127.0.0.1:50051"
TOKEN_VARIABLE = "TIMERNN_TOKEN"  # noqa: S105 - the variable's name
TOKEN_NEEDED = f"a token is needed: --token-file, or the variable {TOKEN_VARIABLE}"
_PANEL = "Connection"
_A_FILE: dict[str, Any] = {
    "parser": parse_file, "metavar": "FILE", "show_default": False, "rich_help_panel": _PANEL,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Connection:
    """How a command reaches its server; each field is an option of every client command.

    The variables of TLS are not named after their options: TIMERNN_TLS_CERT is what a server shows.
    """

    server: Annotated[
        str,
        typer.Option(
            "--server",
            envvar="TIMERNN_SERVER",
            metavar="HOST[:PORT]",
            help="The server, or several by commas to be tried in turn.",
            rich_help_panel=_PANEL,
        ),
    ] = DEFAULT_SERVER
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            envvar="TIMERNN_TIMEOUT",
            parser=functools.partial(parse_number, kind=float, least=0.001),
            metavar="SECONDS",
            help="How long to try, retries included.",
            rich_help_panel=_PANEL,
        ),
    ] = 30.0
    proxy: Annotated[
        str | None,
        typer.Option(
            "--proxy",
            envvar="TIMERNN_PROXY",
            metavar="URL",
            show_default="a direct connection",
            help='HTTP proxy, http://HOST:PORT, or "environment" for what http_proxy says; never used for'
            " a loopback address.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            envvar="TIMERNN_CLIENT_TLS",
            help="Speak TLS; the options --tls-... imply it.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            envvar="TIMERNN_CLIENT_TLS_CA",
            help="Authorities that the server's certificate has to be signed by, PEM; the public ones if"
            " not given.",
            **_A_FILE,
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            envvar="TIMERNN_CLIENT_TLS_CERT",
            help="Certificate to show to the server, PEM.",
            **_A_FILE,
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key",
            envvar="TIMERNN_CLIENT_TLS_KEY",
            help="Its private key, PEM.",
            **_A_FILE,
        ),
    ] = None
    tls_server_name: Annotated[
        str | None,
        typer.Option(
            "--tls-server-name",
            envvar="TIMERNN_CLIENT_TLS_SERVER_NAME",
            metavar="NAME",
            show_default="the address's host",
            help="Name that the server's certificate has to hold.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            envvar="TIMERNN_TOKEN_FILE",
            help="File whose last line is the token; without it the variable TIMERNN_TOKEN may hold one.",
            **_A_FILE,
        ),
    ] = None
    token_over_plaintext: Annotated[
        bool,
        typer.Option(
            "--token-over-plaintext",
            envvar="TIMERNN_TOKEN_OVER_PLAINTEXT",
            help="Send the token also without TLS to another machine, where others can read it.",
            rich_help_panel=_PANEL,
        ),
    ] = False

    tenant: Annotated[
        str,
        typer.Option(
            "--tenant",
            envvar="TIMERNN_TENANT",
            metavar="NAME",
            show_default="the token's",
            help="Whose, for a token of the role operator; any other is refused.",
            rich_help_panel=_PANEL,
        ),
    ] = ""

    @contextmanager
    def open(self) -> Iterator[timernn.Client]:
        """Connect for one command.

        Raises:
            typer.BadParameter: If an option does not fit.
        """
        import timernn  # noqa: PLC0415 - not for --help and usage errors

        addresses = [address.strip() for address in self.server.split(",") if address.strip()]
        if not addresses:
            raise typer.BadParameter("expected HOST:PORT, got nothing", param_hint="'--server'")
        with _names_options():
            connecting = timernn.connect(
                addresses,
                timeout=self.timeout,
                connect_timeout=self.timeout,
                proxy=self.proxy,
                tls=self.checked_tls(),
                token=self.token(),
                token_over_plaintext=self.token_over_plaintext,
                metadata={TENANT_KEY: self.tenant} if self.tenant else None,
            )
        with connecting as client:
            yield client

    def checked_tls(self) -> timernn.TLS | bool:
        """Return the certificates to use, or whether TLS is spoken at all.

        Raises:
            typer.BadParameter: If an option does not fit.
        """
        import timernn  # noqa: PLC0415 - not for --help and usage errors

        parts = (self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)
        with _names_options():
            return self.tls if parts == (None,) * 4 else timernn.TLS(*parts)

    def check_certificates(self) -> None:
        """Read the files of TLS as the library does, for who then uses them otherwise.

        Raises:
            typer.BadParameter: If one cannot be used.
        """
        import timernn  # noqa: PLC0415 - not for --help and usage errors
        from timernn._core.tls import Certificates  # noqa: PLC0415

        with _names_options():
            Certificates(timernn.TLS(self.tls_ca, self.tls_cert, self.tls_key))

    def token(self) -> str | None:
        """Return the token of file or variable: what `timernn tokens create` printed may be the file.

        Raises:
            typer.BadParameter: If the file has none.
        """
        if self.token_file is None:
            return os.environ.get(TOKEN_VARIABLE) or None
        try:
            lines = read_file(self.token_file, takes_pipe=True).decode().split()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "expected text"
            raise typer.BadParameter(why, param_hint="'--token-file'") from error
        if not lines:
            raise typer.BadParameter("expected a token, got nothing", param_hint="'--token-file'")
        return lines[-1]


@contextmanager
def _names_options() -> Iterator[None]:
    """Name the option where the library refuses the argument that it stands for."""
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    try:
        yield
    except timernn.BadField as error:
        option = _OPTIONS.get(error.metadata.get("field", ""), "--timeout")
        _, _, why = error.message.partition(": ")
        raise typer.BadParameter(why, param_hint=f"'{option}'") from error


def advise(error: timernn.Error) -> str:
    """Return the text of an error that an option mends, with the option; empty for other errors."""
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    if isinstance(error, timernn.NoCredentials):
        return TOKEN_NEEDED
    if isinstance(error, timernn.TlsFailed) and (problem := error.metadata.get("problem")):
        return problem + TLS_ADVICE.get(error.metadata.get("part", ""), "")
    return ""


def check_target(file: Path, *, force: bool) -> None:
    """Refuse to write a file where something is that must not be replaced, or into a folder that is not there.

    Raises:
        typer.BadParameter: If so.
    """
    wrong = ""
    if not file.parent.is_dir():
        wrong = f"there is no folder {file.parent}"
    elif file.exists() and not file.is_file():
        wrong = f"{file} is a device or a pipe, which a file would replace"
    elif file.exists() and not force:
        wrong = f"{file} exists; --force overwrites it"
    if wrong:
        raise typer.BadParameter(wrong, param_hint="'FILE'")


def connects(
    *, timeout: float = 30.0, without: tuple[str, ...] = (), for_operators: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes a `connection` an option for each of its fields.

    Args:
        timeout: The default of --timeout, in seconds.
        without: Fields that the command has no use for; they keep their defaults.
        for_operators: Whether it only looks at what the role operator sees of every tenant: then it takes --tenant.
    """
    unused = without if for_operators else (*without, "tenant")

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        options = [each for each in _parameters(timeout) if each.name not in unused]
        for each in inspect.signature(command).parameters.values():
            parameters += options if each.name == "connection" else [each]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            given = {option.name: values.pop(option.name) for option in options}
            command(connection=Connection(**given), **values)

        # Typer reads these two attributes instead of the wrapper's signature.
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        del with_options.__wrapped__
        return with_options

    return decorate


def _parameters(timeout: float) -> list[inspect.Parameter]:
    types = get_type_hints(Connection, include_extras=True)
    defaults = {field.name: field.default for field in fields(Connection)} | {"timeout": timeout}
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name]
        )
        for name, default in defaults.items()
    ]


AsJson = Annotated[bool, typer.Option("--json", envvar="TIMERNN_JSON", help="Print JSON.")]
ModelId = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="The model's name.")
]
MissingOk = Annotated[
    bool,
    typer.Option(
        "--missing-ok", envvar="TIMERNN_MISSING_OK", help="Succeed also when there is none."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", envvar="TIMERNN_FORCE", help="Overwrite FILE if it exists.")
]
ExpectVersion = Annotated[
    int | None,
    typer.Option(
        **number_option(int, 1),
        envvar="TIMERNN_EXPECT_VERSION",
        help="Refuse unless this is the newest version now.",
    ),
]
SessionId = Annotated[
    str, typer.Argument(metavar="SESSION", show_default=False, help="The session's name.")
]

# The option for each argument of the library whose name is another.
_OPTIONS = {
    "target": "--server",
    "proxy": "--proxy",
    "tls.ca": "--tls-ca",
    "tls.cert": "--tls-cert",
    "tls.key": "--tls-key",
    "tls.server_name": "--tls-server-name",
    "token": "--token-file",
    "metadata": "--tenant",
}
# What mends a failure of TLS, by the part of the library's argument that it hangs on.
TLS_ADVICE = {
    "tls": "; leave out --tls, the options --tls-... and their variables",
    "no tls": "; --tls or --tls-ca speaks it",
    "tls.ca": "; --tls-ca names one",
    "tls.cert": "; --tls-cert with --tls-key has one",
    "tls.server_name": "; --tls-server-name names the one to expect",
}
