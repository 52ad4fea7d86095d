"""The options of `timernn serve`: one for each field of `Settings` and of `Limits`.

They are made from the dataclasses, so that name, type and default cannot drift apart from what the
server uses; only the explanations stand here. `OPTIONS` is what the command line, the file of --config and
the table in docs/operations.md are made from.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, get_type_hints

import typer

from service.settings import Limits, Settings

if TYPE_CHECKING:
    from enum import StrEnum

Parser: TypeAlias = Callable[[Any], Any]

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CHOICES = {
    "durability": ("primary", "replica"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("console", "json"),
}
LIMIT_PREFIX = "limit_"
MAY_BE_0 = ("drain_s", "drain_notice_s", "compute_threads", "limit_head_max_age_ms", "worker")
FILES = ("tls_cert", "tls_key", "tls_client_ca", "tokens", "tenants", "redis_password_file")
OPTIONAL_ADDRESSES = ("metrics_listen", "health_listen")
HIDDEN = (
    "failpoints",
    "testing",
    "supervised",
    "worker",
    "worker_count",
)  # for tests and for the supervisor of workers

SETTINGS_HELP = {
    "listen": "Address to serve on: HOST:PORT, where port 0 picks a free one, or unix:PATH.",
    "tls_cert": "Certificate to serve TLS with, PEM, followed by those that signed it. Read again when it"
    " changes.",
    "tls_key": "Its private key, PEM, which not everybody may read.",
    "tls_client_ca": "Authority of the certificates that clients have to show (mTLS).",
    "tokens": "File of the tokens that callers need; `timernn tokens` makes it. Read again when it changes.",
    "health_listen": "Second address, in plaintext, that answers health checks and nothing else: for probes"
    " that have no certificate.",
    "tenants": "File of what each tenant may have, TOML. Read again when it changes.",
    "insecure": "Serve on an address that strangers can reach without TLS, or without a login.",
    "metrics_listen": "Address where Prometheus reads /metrics: HOST:PORT, apart from --listen.",
    "metrics_tenants": "Show sessions by tenant in metrics.",
    "redis_url": "Redis or Valkey that keeps the state: redis://, rediss:// (TLS) or unix://,"
    " redis+sentinel://HOST:26379,…/NAME, redis+cluster://HOST:6379,…. Without it the server runs a"
    " store of its own in --data-dir.",
    "redis_password_file": "File with the password of the store's user, read again for each connection.",
    "data_dir": "Folder of the embedded store: what it holds survives a restart.",
    "drain_s": "Seconds that calls in flight may take after SIGTERM.",
    "drain_notice_s": "Seconds that health says NOT_SERVING before calls are refused, so that a"
    " load balancer can turn away first.",
    "connection_age_ms": "Milliseconds after which a connection, or a stream, is asked to move, so"
    " that load spreads over replicas that were added.",
    "session_cache_bytes": "Memory for the hidden states of warm sessions.",
    "weights_cache_bytes": "Memory for weights versions.",
    "max_batch_rows": "Rows of one forward pass that joins several sessions.",
    "compute_threads": "Big batches of one model that a process computes at once; 0: two, or the"
    " cores of each worker if these are fewer.",
    "store_connections": "Connections to the store.",
    "store_timeout_ms": "Milliseconds that the store may take for one answer.",
    "durability": "What an answer waits for: that the store's primary has its writes, or that a"
    " replica has them too.",
    "durability_timeout_ms": "Milliseconds that it waits for the replica; less than"
    " --store-timeout-ms.",
    "log_level": "What to log on stderr.",
    "traces": "Send traces by OTLP, as the environment variables OTEL_... say; needs timernn[otel].",
    "log_format": "How: lines for people, or a JSON object a line.",
    "workers": "Server processes on the one port, about one a core; sessions move between them freely.",
    "failpoints": "Where to fail on purpose; see service/failpoints.py.",
    "testing": "Allow --failpoints.",
    "worker": "Which worker of the supervisor this is, for its log.",
    "worker_count": "How many workers there are, which divide a tenant's rates among them.",
    "supervised": "Share the port, and stop when stdin closes.",
}

LIMITS_HELP = {
    "batch_size": "Largest N, the rows of a session.",
    "chunk_steps": "Largest T, the time steps of a chunk.",
    "input_size": "Largest D, the inputs of a model.",
    "hidden_size": "Largest H, the hidden units of a model.",
    "message_bytes": "Largest message, either way.",
    "operations_per_message": "Operations in one message of a stream.",
    "stream_operations_in_flight": "Operations of one stream that may be unanswered at once.",
    "operations_in_flight": "Operations that may be in work or waiting at once.",
    "request_bytes_in_flight": "Bytes of requests that may be in work or waiting at once, and of the"
    " answers that are being made.",
    "sessions_per_tenant": "Live sessions of a tenant.",
    "models_per_tenant": "Models of a tenant.",
    "weights_bytes": "Largest weights version, without the optimizer's moments.",
    "tapes_per_session": "Forward passes of one session that may wait for their backward pass.",
    "counted_tapes_per_session": "The same after their backward pass, kept for a retry of it.",
    "counted_tape_bytes_per_session": "Bytes of those.",
    "contributions_per_model": "Gradients of one model that may wait for an update.",
    "contribution_bytes_per_model": "Bytes of gradients of one model that may wait for an update.",
    "superseded_bytes_per_model": "Bytes of superseded weights versions kept a model.",
    "checkpoints_per_model": "Checkpoints of a model.",
    "remembered_requests_per_model": "Request ids of updates remembered a model.",
    "remembered_contributions_per_model": "Counted gradients remembered a model, so that none"
    " counts twice.",
    "replay_window": "Chunks of one session that may be unacknowledged.",
    "min_ttl_ms": "Shortest time to live of a session, in milliseconds.",
    "max_ttl_ms": "Longest time to live of a session, in milliseconds.",
    "default_ttl_ms": "Time to live of a session that names none, in milliseconds.",
    "tape_ttl_ms": "Milliseconds after which a forward pass can no longer be taken back.",
    "contribution_ttl_ms": "Milliseconds that a gradient waits for an update.",
    "head_max_age_ms": "Milliseconds by which the served weights may be older than the newest.",
    "default_deadline_ms": "Deadline of a call that sets none, in milliseconds.",
}


def parse_bytes(text: str | int) -> int:
    """Parse a size such as 1048576, 512KiB or 16MiB.

    Raises:
        typer.BadParameter: If it is not one.
    """
    found = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    if not found or found[2].upper() not in UNITS:
        raise typer.BadParameter(f"expected bytes, such as 1048576 or 16MiB, got {text!r}")
    return int(found[1]) * UNITS[found[2].upper()]


def format_bytes(count: int) -> str:
    """Format a size with the largest unit that divides it, such as 16MiB."""
    for unit in ("GiB", "MiB", "KiB"):
        size = UNITS[unit.upper()]
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def parse_address(text: str) -> str:
    """Check a HOST:PORT, or a unix:PATH.

    Raises:
        typer.BadParameter: If it is neither.
    """
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]+):(\d{1,5})", text)
    if not found or int(found[2]) > 65535:
        raise typer.BadParameter(f"expected HOST:PORT, such as 127.0.0.1:50051, got {text!r}")
    return text


def parse_optional_address(text: str) -> str:
    """Check a HOST:PORT, or a unix:PATH, or nothing.

    Raises:
        typer.BadParameter: If it is none of these.
    """
    return parse_address(text) if text else text


def parse_choice(text: str, choices: tuple[str, ...]) -> str:
    """Check that a word is one of the choices, in upper or lower case.

    Raises:
        typer.BadParameter: If it is not.
    """
    if text.lower() not in choices:
        raise typer.BadParameter(f"expected one of {', '.join(choices)}, got {text!r}")
    return text.lower()


def parse_number(given: str | float, kind: type[int | float], least: float) -> int | float:
    """Check a number against the least that it may be.

    Raises:
        typer.BadParameter: If it is none, or less.
    """
    what = "a whole number" if kind is int else "a number"
    try:
        number = kind(given)
    except ValueError:
        number = kind(-1)
    if not least <= number < math.inf:
        raise typer.BadParameter(f"expected {what} of at least {least}, got {given!r}")
    return number


def parse_path(text: str | Path) -> Path:
    """Check the path of a file, which need not be there.

    Raises:
        typer.BadParameter: If it is none, or a folder's.
    """
    if not str(text):
        raise typer.BadParameter("expected a file, got nothing")
    path = Path(text)
    if path.is_dir():
        raise typer.BadParameter(f"expected a file, got the folder {path}")
    return path


def parse_file(text: str | Path) -> Path:
    """Check the path of a file that is there.

    Raises:
        typer.BadParameter: If it is none.
    """
    path = parse_path(text)
    if not path.exists():
        raise typer.BadParameter(f"there is no file {path}")
    return path


def parse_folder(text: str | Path) -> Path:
    """Check the path of a folder, which need not be there.

    Raises:
        typer.BadParameter: If it is none, or a file's.
    """
    if not str(text):
        raise typer.BadParameter("expected a folder, got nothing")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"expected a folder, got the file {path}")
    return path


def number_option(kind: type[int | float], least: float) -> dict[str, Any]:
    """Return the arguments of Typer's option for a number."""
    parse = functools.partial(parse_number, kind=kind, least=least)
    return {"parser": parse, "metavar": "NUMBER"}


def choice_option(kind: type[StrEnum]) -> dict[str, Any]:
    """Return the arguments of Typer's option for one of some words."""

    def parse(text: str) -> StrEnum:
        return kind(parse_choice(text, tuple(kind)))

    return {"parser": parse, "metavar": "|".join(kind)}


@dataclass(frozen=True, slots=True)
class Kind:
    """What values a setting takes.

    Attributes:
        expected: What a value has to be, for messages.
        toml: What types it may have in a TOML file.
        parse: Checks a value and returns it as the server takes it; raises a typer.BadParameter.
        unit: In what it is counted, for the table of settings.
        shown: Further arguments of Typer's option.
    """

    expected: str
    toml: tuple[type, ...]
    parse: Parser | None = None
    unit: str = ""
    shown: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServeOption:
    """One setting as an operator sees it.

    Attributes:
        name: Of its parameter: `batch_size` of the limits is `limit_batch_size`.
        type: Of its field.
        default: Of its field.
        help: What it does.
        panel: Under which heading it stands.
        kind: What values it takes.
    """

    name: str
    type: Any
    default: Any
    help: str
    panel: str
    kind: Kind

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"TIMERNN_{self.name.upper()}"

    @property
    def is_hidden(self) -> bool:
        """Whether it is for tests and for the supervisor of workers alone."""
        return self.name in HIDDEN

    def parameter(self) -> inspect.Parameter:
        """Return the keyword parameter of a command, annotated as Typer needs it."""
        shown: dict[str, Any] = {"parser": self.kind.parse} if self.kind.parse else {}
        option = typer.Option(
            self.flag,
            help=self.help,
            envvar=self.variable,
            rich_help_panel=self.panel,
            hidden=self.is_hidden,
            **shown,
            **self.kind.shown,
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[self.type, option],
        )


def _options(
    settings: type[Settings | Limits], explained: dict[str, str], *, prefix: str, panel: str
) -> list[ServeOption]:
    types = get_type_hints(settings)
    return [
        ServeOption(
            name=prefix + f.name,
            type=types[f.name],
            default=f.default,
            help=explained.get(f.name, ""),
            panel=panel,
            kind=_kind(prefix + f.name, f.default),
        )
        for f in fields(settings)
        if f.default is not MISSING
    ]


def _kind(name: str, default: Any) -> Kind:  # noqa: PLR0911 - a kind each
    shown: dict[str, Any]
    if name.endswith("_bytes") or "_bytes_" in name:
        shown = {"metavar": "BYTES", "show_default": format_bytes(default)}
        expected = "bytes, such as 1048576 or 16MiB"
        return Kind(expected, (int, str), parse_bytes, unit="bytes", shown=shown)
    if name == "listen":
        return Kind("HOST:PORT", (str,), parse_address, shown={"metavar": "HOST:PORT"})
    if name in OPTIONAL_ADDRESSES:
        shown = {"metavar": "HOST:PORT", "show_default": False}
        return Kind("HOST:PORT", (str,), parse_optional_address, shown=shown)
    if choices := CHOICES.get(name):
        parse = functools.partial(parse_choice, choices=choices)
        return Kind(
            f"one of {', '.join(choices)}", (str,), parse, shown={"metavar": "|".join(choices)}
        )
    if isinstance(default, Path):
        return Kind("a path", (str,), parse_folder, shown={"metavar": "DIR"})
    if name in FILES:
        return Kind("a path", (str,), shown={"metavar": "FILE", "show_default": False})
    if isinstance(default, bool):
        return Kind("true or false", (bool,))
    if name == "redis_url":
        return Kind("a URL", (str,), shown={"metavar": "URL", "show_default": "an embedded store"})
    if isinstance(default, str):
        return Kind("a text", (str,))
    least = 0 if name in MAY_BE_0 else 1
    number = type(default)
    what = "a whole number" if number is int else "a number"
    return Kind(
        f"{what} of at least {least}",
        (int,) if number is int else (int, float),
        functools.partial(parse_number, kind=number, least=least),
        unit=next((unit for end, unit in _SUFFIXES.items() if name.endswith(end)), ""),
        shown={"metavar": "NUMBER"},
    )


_SUFFIXES: Final = {"_ms": "ms", "_s": "s"}

OPTIONS: Final = (
    *_options(Settings, SETTINGS_HELP, prefix="", panel="Server"),
    *_options(Limits, LIMITS_HELP, prefix=LIMIT_PREFIX, panel="Limits"),
)
