"""`timernn doctor`: what is wrong between this machine, a server and its store, and what to change."""

# No postponed annotations here: Typer reads them when a command is made.
import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.cgroup import machine_memory, memory_limit
from service.cli.options import format_bytes, number_option, parse_bytes, parse_file
from service.cli.output import counted, print_json
from service.cli.remote import AsJson, Connection, advise, connects
from service.cli.settings import config_option
from service.listening import is_loopback
from service.logs import escaped
from service.memory_bound import memory_bound_bytes
from service.settings import Settings

if TYPE_CHECKING:
    import timernn
    from service.store.facts import StoreFacts

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"

_CERTIFICATE_DAYS = 14
_SKEW_S = 5.0
_NEARLY_FULL = 0.8
_SETTINGS = Settings()
# What is asked here of the server's settings; its tls_cert is not what a client shows.
_OF_THE_SERVER = (
    "redis_url", "redis_password_file", "session_cache_bytes", "weights_cache_bytes", "workers"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was checked, in a word.
        status: ok, warning, failed or skipped.
        text: What was found.
        advice: What to change; empty where there is nothing.
    """

    check: str
    status: str
    text: str
    advice: str = ""


@connects(timeout=5.0)
def doctor(
    *,
    redis_url: Annotated[
        str,
        typer.Option(
            "--redis-url",
            envvar="TIMERNN_REDIS_URL",
            metavar="URL",
            show_default=False,
            help="The server's store, to check it too. A password belongs in the variable.",
        ),
    ] = "",
    redis_password_file: Annotated[
        Path | None,
        typer.Option(
            "--redis-password-file",
            envvar="TIMERNN_REDIS_PASSWORD_FILE",
            parser=parse_file,
            metavar="FILE",
            show_default=False,
            help="File with the password of the store's user.",
        ),
    ] = None,
    session_cache_bytes: Annotated[
        int,
        typer.Option(
            "--session-cache-bytes",
            envvar="TIMERNN_SESSION_CACHE_BYTES",
            parser=parse_bytes,
            metavar="BYTES",
            show_default=format_bytes(_SETTINGS.session_cache_bytes),
            help="As the server has it, for its memory.",
        ),
    ] = _SETTINGS.session_cache_bytes,
    weights_cache_bytes: Annotated[
        int,
        typer.Option(
            "--weights-cache-bytes",
            envvar="TIMERNN_WEIGHTS_CACHE_BYTES",
            parser=parse_bytes,
            metavar="BYTES",
            show_default=format_bytes(_SETTINGS.weights_cache_bytes),
            help="As the server has it, for its memory.",
        ),
    ] = _SETTINGS.weights_cache_bytes,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            envvar="TIMERNN_WORKERS",
            help="As the server has it.",
            **number_option(int, 1),
        ),
    ] = 1,
    _config: Annotated[Path | None, config_option(_OF_THE_SERVER)] = None,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Check a server from here: address, TLS, token, version, clock, store and memory.

    Each line says what was found and what to change. Exit code 0 if nothing failed, 1 if something did.
    With --redis-url, or the server's --config, the store is asked too. Run beside the server, in its
    container, it also compares the memory that the server may take with what the container may use.

    Examples:
      timernn doctor
      timernn doctor --server timernn.example.org:50051 --json
      TIMERNN_REDIS_URL=redis://store:6379/0 timernn doctor
    """
    findings: list[Finding] = []
    addresses = _addresses(connection.server)
    store = Settings(redis_url=redis_url, redis_password_file=str(redis_password_file or ""))
    _require_store_url(store)
    for address in addresses:
        findings += check_address(address, connection.timeout)
    info: list[timernn.ServerInfo] = []

    findings += check_server(connection.open, info.append)
    findings += check_store(store) if redis_url else [_store_skipped()]
    caches = 2 * session_cache_bytes + weights_cache_bytes
    findings += check_memory(addresses, info, caches, workers)
    has_failed = any(each.status == FAILED for each in findings)
    if json:
        print_json({"ok": not has_failed, "findings": [asdict(each) for each in findings]})
    else:
        _print(findings)
    if has_failed:
        raise typer.Exit(1)


def _addresses(server: str) -> list[str]:
    """Return the targets of --server, each host with its port."""
    import timernn  # noqa: PLC0415 - not for --help and usage errors
    from timernn._core.targets import addresses_of  # noqa: PLC0415

    try:
        return addresses_of([each.strip() for each in server.split(",") if each.strip()])
    except timernn.BadField as error:
        raise typer.BadParameter(error.message, param_hint="'--server'") from error


def _require_store_url(settings: Settings) -> None:
    """Refuse what is no URL of a store; the message holds nothing of it that may be secret."""
    if not settings.redis_url:
        return
    from service.store.addresses import parse_store_url  # noqa: PLC0415 - not for --help

    try:
        parse_store_url(settings.redis_url)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--redis-url'") from error


def check_address(address: str, timeout_s: float) -> Iterator[Finding]:
    """Check that something listens, and what it speaks.

    Args:
        address: As gRPC takes it, each host with its port.
        timeout_s: How long to wait for it.
    """
    if address.startswith(("unix:", "dns:", "ipv4:", "ipv6:", "unix-abstract:")):
        yield Finding("address", SKIPPED, f"{address}: only HOST:PORT is looked up from here")
        return
    host, _, port = address.rpartition(":")
    place = (host.strip("[]"), int(port))
    try:
        with socket.create_connection(place, timeout_s, all_errors=True):
            pass
    except socket.gaierror as error:
        advice = "check the name, or the resolver of this machine"
        yield Finding("address", FAILED, f"{host} has no address: {error.strerror}", advice)
        return
    except ExceptionGroup as errors:  # one for each address of the name
        advice = "start the server, check --listen, and what a firewall lets through"
        reasons = dict.fromkeys(
            getattr(each, "strerror", None) or "no answer in time" for each in errors.exceptions
        )
        text = f"{host}:{port} cannot be reached: {', '.join(reasons)}"
        yield Finding("address", FAILED, text, advice)
        return
    yield Finding("address", OK, f"{host}:{port} accepts connections")
    yield _check_tls(address, place, timeout_s)


def _check_tls(address: str, place: tuple[str, int], timeout_s: float) -> Finding:
    """Find out whether TLS is spoken, and for how long the certificate still holds."""
    from cryptography import x509  # noqa: PLC0415 - not for --help

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # what is shown is what matters here; the next check verifies it
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(place, timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=place[0]) as secured,
        ):
            shown = secured.getpeercert(binary_form=True) or b""
            protocol = secured.version() or "TLS"
    except OSError:
        if is_loopback(address):
            return Finding("tls", OK, "plaintext, on this machine alone")
        advice = "give the server --tls-cert and --tls-key: what is sent can be read on the way"
        return Finding("tls", WARNING, "plaintext, to another machine", advice)
    ends = x509.load_der_x509_certificate(shown).not_valid_after_utc
    days = (ends - datetime.now(UTC)).total_seconds() / 86400
    text = f"{protocol}, certificate until {ends:%Y-%m-%d %H:%M}Z, {counted(round(days), 'days')}"
    if days < 0:
        return Finding("tls", FAILED, text, "renew the certificate: it has expired")
    if days < _CERTIFICATE_DAYS:
        return Finding("tls", WARNING, text, "renew the certificate soon")
    return Finding("tls", OK, text)


def check_server(
    connect: Callable[[], AbstractContextManager["timernn.Client"]],
    on_info: Callable[["timernn.ServerInfo"], None],
) -> Iterator[Finding]:
    """Check what a server answers: health, login, version, clock.

    Args:
        connect: Connects with the command's options.
        on_info: Is given what the server says of itself, if it does.
    """
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    try:
        with connect() as client:
            answer = client.ping()
            if answer.serving:
                yield Finding("health", OK, f"ready, answered in {answer.latency_s * 1000:.1f} ms")
            else:
                advice = "read its log: the store cannot be used, or it is draining"
                yield Finding("health", FAILED, "the server answers and is not ready", advice)
            before = datetime.now(UTC)
            info = client.server_info()
            after = datetime.now(UTC)
    except timernn.Unauthenticated as error:
        advice = (
            "give a token that is valid by --token-file, see `timernn tokens list`; or check this"
            " machine's clock"
        )
        yield Finding("token", FAILED, advise(error) or error.message, advice)
    except timernn.Error as error:
        advice = (
            "if the lines above are good: do --tls, --tls-ca, --tls-cert and --tls-key here fit the server's"
            " --tls-cert and --tls-client-ca?"
        )
        yield Finding("server", FAILED, advise(error) or error.message, advice)
    else:
        on_info(info)
        yield Finding("token", OK, "the server lets this caller in")
        yield _check_version(info.server_version)
        if info.server_time is None:
            yield Finding("clock", SKIPPED, "the server does not say what time it has")
        else:
            yield _check_clock("the server", before, info.server_time, after)


def _check_version(of_server: str) -> Finding:
    own = version("timernn")
    text = f"client {own}, server {of_server}"
    if of_server.split(".")[:2] == own.split(".")[:2]:
        return Finding("version", OK, text)
    advice = "use one minor version in both; the notes of the later one say what the earlier lacks"
    return Finding("version", WARNING, text, advice)


def _check_clock(whose: str, before: datetime, theirs: datetime, after: datetime) -> Finding:
    """Compare a clock that was read between two readings of this machine's."""
    skew_s = max(0.0, (before - theirs).total_seconds(), (theirs - after).total_seconds())
    text = f"{whose} is {skew_s:.1f} s off this machine"
    if skew_s <= _SKEW_S:
        return Finding("clock", OK, text)
    advice = "let NTP set both: certificates, tokens and times to live end by the clock"
    return Finding("clock", WARNING, text, advice)


def _store_skipped() -> Finding:
    return Finding("store", SKIPPED, "not asked: --redis-url names none")


def check_store(settings: Settings) -> Iterator[Finding]:
    """Check a store: the rights of its user, its policy, persistence, memory and clock.

    Args:
        settings: Name the store, as the server's do.
    """
    from service.store.failures import why  # noqa: PLC0415 - not for --help

    before = datetime.now(UTC)
    try:
        facts = asyncio.run(_ask_store(settings))
    except Exception as error:  # noqa: BLE001 - whatever it is, the store cannot be used
        advice = "see what a store needs in docs/operations.md"
        yield Finding("store", FAILED, why(error), advice)
        return
    for each in facts:
        yield Finding("store", OK, f"{each.server}, its user has the rights, and it takes writes")
        yield _check_persistence(each)
        yield _check_store_memory(each)
        theirs = datetime.fromtimestamp(each.time_s, UTC)
        yield _check_clock("the store", before, theirs, datetime.now(UTC))


async def _ask_store(settings: Settings) -> list["StoreFacts"]:
    from service.store.connect import open_store  # noqa: PLC0415 - not for --help

    store = await open_store(settings.redis_url, settings)
    try:
        await store.check()
        return await store.facts()
    finally:
        await store.close()


def _check_persistence(store: "StoreFacts") -> Finding:
    if store.has_append_only_file:
        return Finding(
            "persistence", OK, f"append-only file, {counted(store.replicas, 'replicas')}"
        )
    advice = "set `appendonly yes` and `appendfsync everysec`"
    if store.has_snapshots:
        text = "snapshots only: a restart loses what came after the last one"
        return Finding("persistence", WARNING, text, advice)
    return Finding("persistence", WARNING, "none: a restart loses everything", advice)


def _check_store_memory(store: "StoreFacts") -> Finding:
    used = f"{store.used_bytes / (1 << 20):,.0f} MiB used"
    if not store.max_bytes:
        advice = "set maxmemory: without it the kernel ends the store when the machine is full"
        return Finding("store memory", WARNING, f"{used}, maxmemory is not set", advice)
    text = f"{used} of {store.max_bytes / (1 << 20):,.0f} MiB, policy {store.eviction_policy}"
    if store.used_bytes > _NEARLY_FULL * store.max_bytes:
        advice = "raise maxmemory, or shorten times to live: a full store refuses writes"
        return Finding("store memory", WARNING, text, advice)
    return Finding("store memory", OK, text)


def check_memory(
    addresses: list[str], info: list["timernn.ServerInfo"], cache_bytes: int, workers: int
) -> Iterator[Finding]:
    """Compare what a server here may take with what there is.

    Args:
        addresses: Of the server; only on this machine is its memory known.
        info: What it says of itself, if it answered.
        cache_bytes: The most bytes of its caches.
        workers: Its processes.
    """
    is_here = all(each.startswith("unix:") or is_loopback(each) for each in addresses)
    if not is_here or not info:
        why = "the server is not on this machine" if info else "the server did not answer"
        yield Finding("memory", SKIPPED, f"not compared: {why}")
        return
    limits: Any = info[0].limits
    most = workers * memory_bound_bytes(cache_bytes, limits)
    limit = memory_limit()
    there, whose = (limit, "the container") if limit else (machine_memory(), "the machine")
    text = f"at the worst the server takes {most >> 20:,} MiB of {whose}'s {there >> 20:,} MiB"
    if most <= there:
        yield Finding("memory", OK, text)
        return
    advice = (
        "lower --limit-weights-bytes (a step takes ten times as much), --limit-operations-in-flight,"
        " --limit-request-bytes-in-flight or the caches, or give it more: the kernel ends what takes"
        " more than there is"
    )
    yield Finding("memory", WARNING, text, advice)


def _print(findings: list[Finding]) -> None:
    width = max(len(each.check) for each in findings)
    for each in findings:
        print(f"{each.status:<7}  {each.check:<{width}}  {escaped(each.text)}")
        if each.advice:
            print(f"{'':<7}  {'':<{width}}  -> {each.advice}")
