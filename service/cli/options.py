"""The options of `timernn serve`: one for each field of `Settings` and of `Limits`.

They are made from the dataclasses, so that name, type and default cannot drift apart from what the
server uses; only the explanations stand here.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from service.settings import Limits, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CHOICES = {
    "durability": ("primary", "replica"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("console", "json"),
}
LIMIT_PREFIX = "limit_"
MAY_BE_0 = ("drain_s", "drain_notice_s", "compute_threads", "limit_head_max_age_ms")
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


def takes_settings(command: Callable[[Settings], None]) -> Callable[..., None]:
    """Give a command that takes `Settings` an option for each of their fields."""
    parameters = [
        *_parameters(Settings, SETTINGS_HELP, prefix="", panel="Server"),
        *_parameters(Limits, LIMITS_HELP, prefix=LIMIT_PREFIX, panel="Limits"),
    ]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        command(settings_from(values))

    # Typer reads these two attributes instead of the wrapper's signature.
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    del with_options.__wrapped__
    return with_options


def settings_from(values: dict[str, Any]) -> Settings:
    """Build the Settings from the options' values.

    Args:
        values: By option name: `batch_size` of the limits is `limit_batch_size`.
    """
    limits = {f.name: values[LIMIT_PREFIX + f.name] for f in fields(Limits)}
    others = {f.name: values[f.name] for f in fields(Settings) if f.name in values}
    return Settings(**others, limits=Limits(**limits))


def _parameters(
    settings: type[Settings | Limits], explained: dict[str, str], *, prefix: str, panel: str
) -> list[inspect.Parameter]:
    """Return one keyword parameter per field, annotated as Typer needs it."""
    types = get_type_hints(settings)
    return [
        inspect.Parameter(
            prefix + f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=Annotated[
                types[f.name], _option(prefix + f.name, f.default, explained.get(f.name, ""), panel)
            ],
        )
        for f in fields(settings)
        if f.default is not MISSING
    ]


def _option(name: str, default: object, explained: str, panel: str) -> Any:  # noqa: PLR0911 - a kind each
    """Describe one option; its environment variable is named after it."""
    flag = "--" + name.replace("_", "-")
    common: dict[str, Any] = {
        "help": explained,
        "envvar": f"TIMERNN_{name.upper()}",
        "rich_help_panel": panel,
    }
    if name.endswith("_bytes") or "_bytes_" in name:
        assert isinstance(default, int)  # noqa: S101 - a field named so is a size
        shown = format_bytes(default)
        return typer.Option(flag, parser=parse_bytes, metavar="BYTES", show_default=shown, **common)
    if name == "listen":
        return typer.Option(flag, parser=parse_address, metavar="HOST:PORT", **common)
    if choices := CHOICES.get(name):
        parser = functools.partial(parse_choice, choices=choices)
        return typer.Option(flag, parser=parser, metavar="|".join(choices), **common)
    if isinstance(default, Path):
        return typer.Option(flag, file_okay=False, metavar="DIR", **common)
    if name in FILES:
        return typer.Option(flag, metavar="FILE", show_default=False, **common)
    if name in OPTIONAL_ADDRESSES:
        return typer.Option(
            flag, parser=parse_optional_address, metavar="HOST:PORT", show_default=False, **common
        )
    if isinstance(default, bool) and name not in HIDDEN:
        return typer.Option(flag, **common)
    if name == "redis_url":
        return typer.Option(flag, metavar="URL", show_default="an embedded store", **common)
    if name in HIDDEN:
        return typer.Option(flag, hidden=True, **common)
    least = 0 if name in MAY_BE_0 else 1
    return typer.Option(flag, min=least, **common)
