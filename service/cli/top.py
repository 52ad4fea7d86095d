"""`timernn top`: what runs now, in the terminal; the JSON behind the metrics port's page."""

# No postponed annotations here: Typer reads them when a command is made.
import asyncio
import functools
import ssl
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.describe import format_span
from service.cli.options import parse_address, parse_number
from service.cli.output import print_json
from service.cli.remote import TLS_ADVICE, TOKEN_NEEDED, AsJson, Connection, connects
from service.connection_failures import NO_TLS, NOT_TRUSTED, in_words
from service.listening import UNIX, is_loopback
from service.logs import escaped
from service.settings import MIB

if TYPE_CHECKING:
    import aiohttp
    from rich.console import Console, RenderableType

DEFAULT_METRICS = "127.0.0.1:9464"

_DURATIONS = {"forward": "Forward", "backward": "Backward", "update": "Update", "store": "Store"}
_PLAIN_WIDTH = 140  # where there is no terminal to fit into
_SHOWN_SESSIONS = 10


class TopError(Exception):
    """There is nothing to show; the message is one line."""


class Refused(TopError):
    """The server does not say it to this caller."""


@connects(timeout=5.0, without=("server", "proxy"), for_operators=True)
def top(
    *,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            envvar="TIMERNN_METRICS",
            metavar="HOST:PORT",
            parser=parse_address,
            help="The metrics port of a replica (--metrics-listen of the server); any one shows all.",
            rich_help_panel="Connection",
        ),
    ] = DEFAULT_METRICS,
    connection: Connection,
    model: Annotated[
        str,
        typer.Option(envvar="TIMERNN_MODEL", metavar="MODEL", help="Only sessions of this model."),
    ] = "",
    interval: Annotated[
        float,
        typer.Option(
            parser=functools.partial(parse_number, kind=float, least=0.5),
            metavar="SECONDS",
            help="How often to ask.",
        ),
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    json: AsJson = False,
) -> None:
    """Show what runs now: replicas, chunks a second, durations, refusals, models, sessions.

    The server needs --metrics-listen. Ctrl-C ends it; without a terminal it prints once, as with
    --once. --json prints what the page's /api answers.

    Examples:
      timernn top
      timernn top --metrics node1:9464 --tls-ca ca.crt --token-file token
      timernn top --once --json
    """
    port = _Port(metrics, connection, model=model)
    if json or once or not sys.stdout.isatty():
        found = asyncio.run(port.ask_once())
        if json:
            print_json(found)
        else:
            _console().print(_shown(found))
        return
    with suppress(KeyboardInterrupt):
        asyncio.run(_show_live(port, interval))


class _Port:
    """A metrics port, and how to ask it."""

    def __init__(self, address: str, connection: Connection, *, model: str) -> None:
        if address.startswith(UNIX):
            raise typer.BadParameter("expected HOST:PORT", param_hint="'--metrics'")
        self.address = address
        self._timeout_s = connection.timeout
        self._query = {"tenant": connection.tenant}
        self._model = model
        self._tls = _context(connection) if connection.checked_tls() else None
        self._server_name = connection.tls_server_name
        self._token = connection.token()
        if (
            self._token
            and not self._tls
            and not is_loopback(address)
            and not connection.token_over_plaintext
        ):
            raise typer.BadParameter(
                f"would be sent to {address} in plaintext: add --tls or --tls-ca; or"
                " --token-over-plaintext, where nobody else can read it",
                param_hint="'--token-file'",
            )

    async def ask_once(self) -> dict[str, Any]:
        """Ask over a connection that is closed again."""
        async with self.open() as session:
            return await self.ask(session)

    def open(self) -> "aiohttp.ClientSession":
        """Return what questions go over."""
        import aiohttp  # noqa: PLC0415 - not for --help and usage errors

        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return aiohttp.ClientSession(
            headers=headers, timeout=aiohttp.ClientTimeout(self._timeout_s)
        )

    async def ask(self, session: "aiohttp.ClientSession") -> dict[str, Any]:
        """Return what runs now, a page of models and a page of sessions.

        Raises:
            TopError: If the port does not answer as one does.
        """
        return {
            "now": await self._get(session, "now"),
            "models": await self._get(session, "models"),
            "sessions": await self._get(session, "sessions", model=self._model),
        }

    async def _get(self, session: "aiohttp.ClientSession", path: str, **query: str) -> Any:
        import aiohttp  # noqa: PLC0415 - not for --help and usage errors

        scheme = "https" if self._tls else "http"
        given = {name: value for name, value in {**self._query, **query}.items() if value}
        try:
            async with session.get(
                f"{scheme}://{self.address}/api/{path}",
                params=given,
                ssl=self._tls or False,
                server_hostname=self._server_name,
                allow_redirects=False,
            ) as answer:
                status, body = answer.status, await answer.json()
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            why = _why(error)
            part = {NOT_TRUSTED: "tls.ca", NO_TLS: "tls"}.get(why, "")
            raise TopError(f"{self.address}: {why}{TLS_ADVICE.get(part, '')}") from None
        except (aiohttp.ContentTypeError, ValueError):
            raise TopError(
                f"{self.address} is no metrics port of timernn that has a page"
            ) from None
        except aiohttp.ClientConnectorError as error:
            text = f"{self.address}: {_why(error)}; the server needs --metrics-listen"
            raise TopError(text) from None
        except TimeoutError:
            raise TopError(
                f"{self.address} has not answered within {self._timeout_s:g} s"
            ) from None
        except aiohttp.ClientError:
            advice = "" if self._tls else "; if it speaks TLS, add --tls or --tls-ca"
            raise TopError(f"{self.address} closed the connection{advice}") from None
        if status != 200:
            raise _refusal(self.address, status, body)
        return body


def _context(connection: Connection) -> ssl.SSLContext:
    connection.check_certificates()
    context = ssl.create_default_context(cafile=connection.tls_ca)
    if connection.tls_cert is not None:
        context.load_cert_chain(connection.tls_cert, connection.tls_key)
    return context


def _refusal(address: str, status: int, body: Any) -> TopError:
    error = body.get("error", {}) if isinstance(body, dict) else {}
    message = str(error.get("message", f"status {status}"))
    if error.get("reason") == "NO_CREDENTIALS":
        message = TOKEN_NEEDED
    return Refused(f"{address}: {message}")


def _why(error: Any) -> str:
    """Return a connection's failure in words, without Python's own."""
    reason = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return in_words(reason) or "it cannot be reached"


async def _show_live(port: _Port, interval_s: float) -> None:
    from rich.console import Group  # noqa: PLC0415 - a third of a second, for this command alone
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    async with port.open() as session:
        found = await port.ask(session)
        with Live(_shown(found), console=_console(), screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval_s)
                try:
                    found = await port.ask(session)
                except Refused:
                    raise
                except TopError as error:
                    trouble = Text(f"What is shown is old: {escaped(str(error))}", style="bold red")
                    live.update(Group(trouble, _shown(found)), refresh=True)
                else:
                    live.update(_shown(found), refresh=True)


def _console() -> "Console":
    from rich.console import Console  # noqa: PLC0415 - a third of a second, for this command alone

    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def _shown(found: Mapping[str, Any]) -> "RenderableType":
    from rich.console import Group  # noqa: PLC0415 - a third of a second, for this command alone
    from rich.padding import Padding  # noqa: PLC0415

    now = found["now"]
    parts: list[RenderableType] = [_summary(now)]
    if now["figures"] is not None:
        parts += [_durations(now["figures"]), _replicas(now)]
    parts += [_models(found["models"], now["time_ms"]), _sessions(found["sessions"])]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _summary(now: Mapping[str, Any]) -> "RenderableType":
    from rich.text import Text  # noqa: PLC0415 - a third of a second, for this command alone

    figures = now["figures"]
    rows: list[list[tuple[str, object]]] = [
        [("tenant", now["tenant"]), ("sessions", f"{now['sessions']:,}")]
    ]
    if figures is not None:
        refusals = [f"{reason} {rate:g}/s" for reason, rate in figures["refusals_per_s"].items()]
        rows[0] += [
            ("replicas", len(now["replicas"])),
            ("chunks", f"{_number(figures['chunks_per_s'])}/s"),
            ("steps", f"{_number(figures['steps_per_s'])}/s"),
        ]
        rows += [
            [
                ("in work", figures["operations_in_flight"]),
                ("chunks a batch", _number(figures["batch_chunks"]["mean"])),
                ("memory", _memory(figures["memory_bytes"])),
                ("cores", _number(figures["cpu_cores"])),
            ],
            [("refusals", ", ".join(refusals) or "none")],
        ]
    text = Text("timernn", style="bold")
    for number, row in enumerate(rows):
        text.append("\n       " if number else "")
        for name, value in row:
            text.append(f"   {name} ", style="dim not bold")
            text.append(escaped(str(value)), style="not bold")
    if figures is None:
        note = "\n          figures of the server are for the roles admin and operator"
        text.append(note, style="dim not bold")
    return text


def _durations(figures: Mapping[str, Any]) -> "RenderableType":
    rows = [
        (
            name,
            *(
                _number(figures["duration_ms"][kind][field])
                for field in ("per_s", "p50", "p90", "p99")
            ),
        )
        for kind, name in _DURATIONS.items()
    ]
    return _table(("MS", "A SECOND", "P50", "P90", "P99"), rows, right=(1, 2, 3, 4))


def _replicas(now: Mapping[str, Any]) -> "RenderableType":
    rows: list[tuple[str, ...]] = []
    for replica in now["replicas"]:
        if not replica["is_known"]:
            rows.append((replica["replica_id"], "another release", *[""] * 6))
            continue
        worker = f" worker {replica['worker']}" if replica["worker"] else ""
        rows.append(
            (
                replica["replica_id"],
                "serving" if replica["is_serving"] else "NOT SERVING",
                f"{replica['host']}{worker}",
                replica["version"],
                _span(now["time_ms"] - replica["start_time_ms"]),
                _number(replica["chunks_per_s"]),
                str(replica["operations_in_flight"]),
                _memory(replica["memory_bytes"]),
            )
        )
    headings = ("REPLICA", "STATE", "HOST", "VERSION", "UP", "CHUNKS/S", "IN WORK", "MEMORY")
    return _table(headings, rows, right=(4, 5, 6, 7))


def _models(page: Mapping[str, Any], now_ms: int) -> "RenderableType":
    rows = [
        (
            model["model_id"],
            f"{model['version']:,}",
            _number(model["steps_per_s"]),
            _number(model["gradient_norm"]),
            f"{_span(now_ms - model['last_step_ms'])} ago" if model["last_step_ms"] else "-",
            f"{model['waiting_contributions']:,}",
        )
        for model in page["models"]
    ]
    headings = ("MODEL", "VERSION", "STEPS/S", "GRADIENT NORM", "LAST STEP", "WAITING")
    return _table(headings, rows, right=(1, 2, 3, 4, 5), more=bool(page["next_page_token"]))


def _sessions(page: Mapping[str, Any]) -> "RenderableType":
    sessions = page["sessions"]
    rows = [
        (
            session["session_id"],
            session["model_id"],
            f"{session['chunks']:,}",
            _span(session["age_ms"]),
            f"{_span(session['idle_ms'])} ago",
            _span(session["expires_in_ms"]),
        )
        for session in sessions[:_SHOWN_SESSIONS]
    ]
    more = len(sessions) > _SHOWN_SESSIONS or bool(page["next_page_token"])
    headings = ("SESSION", "MODEL", "CHUNKS", "AGE", "LAST USED", "EXPIRES IN")
    return _table(headings, rows, right=(2, 3, 4, 5), more=more)


def _table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[int],
    more: bool = False,
) -> "RenderableType":
    from rich.table import Table  # noqa: PLC0415 - a third of a second, for this command alone
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(escaped(text)) for text in row))
    if not table.row_count:
        table.add_row(Text("none", style="dim"))
    if more:
        table.add_row(Text("and more", style="dim"))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _memory(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def _span(span_ms: float) -> str:
    return format_span(timedelta(milliseconds=max(0, span_ms)))
