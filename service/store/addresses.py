"""Parses the URL of a store; its error messages hold no part of the URL that may be secret.

| URL | store |
| --- | --- |
| `redis://host:6379/0`, `rediss://…`, `unix:///path` | one Redis or Valkey server |
| `redis+sentinel://host:26379,host:26379/NAME/0` | the master that Sentinel knows by NAME |
| `redis+cluster://host:6379,host:6379` | a Redis Cluster |

`rediss`, `rediss+sentinel` and `rediss+cluster` use TLS. A user and a password before the hosts are the
store's. After `?` the options below are accepted, in all forms, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from redis import exceptions as redis_errors
from redis.asyncio.connection import URL_QUERY_ARGUMENT_PARSERS, SSLConnection

from service.security.files import SecretFileError

if TYPE_CHECKING:
    from urllib.parse import SplitResult

FORMS: Final = {
    "redis": "redis://host:6379/0",
    "rediss": "rediss://host:6379/0",
    "unix": "unix:///path/of/the.sock",
    "redis+sentinel": "redis+sentinel://host:26379,host:26379/NAME/0",
    "rediss+sentinel": "rediss+sentinel://host:26379,host:26379/NAME/0",
    "redis+cluster": "redis+cluster://host:6379,host:6379",
    "rediss+cluster": "rediss+cluster://host:6379,host:6379",
}
_SENTINEL_PORT: Final = 26379
_REDIS_PORT: Final = 6379
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS: Final = (
    *_FILES,
    "ssl_ca_path",
    "ssl_ca_data",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_exclude_verify_flags",
    "ssl_include_verify_flags",
    "ssl_min_version",
    "ssl_password",
)
_SENTINEL_OPTIONS: Final = ("sentinel_username", "sentinel_password")
_LINK_OPTIONS: Final = ("client_name", "socket_keepalive")
_UNQUOTED: Final = "a user or password with / ? # @ : or % in it has to be percent-encoded, as %2F %3F %23 %40 %3A %25"


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """The parsed URL of a store.

    Attributes:
        form: Its scheme, a key of FORMS.
        hosts: Host and port of each server or sentinel; empty for a Unix socket.
        path: The path of the Unix socket; empty for TCP.
        name: The name under which Sentinel knows the master; empty without Sentinel.
        database: The number of the database.
        username: The store's user.
        password: The store's password.
        link_options: Keyword arguments of redis-py for every connection, those for TLS among them.
        sentinel_credentials: Keyword arguments of redis-py for connections to sentinels.
    """

    form: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    name: str
    database: int
    username: str | None = field(repr=False)
    password: str | None = field(repr=False)
    link_options: dict[str, Any] = field(repr=False)
    sentinel_credentials: dict[str, str] = field(repr=False)

    @property
    def is_tls(self) -> bool:
        """Whether connections speak TLS."""
        return self.form.startswith("rediss")

    def __str__(self) -> str:
        """Return the URL without its secrets."""
        hosts = ",".join(join_host(*host) for host in self.hosts)
        parts = [self.name, str(self.database) if self.database else ""]
        path = self.path or "".join(f"/{part}" for part in parts if part)
        return f"{self.form}://{hosts}{path}"


def parse_store_url(url: str) -> StoreAddress:
    """Parse a store's URL.

    Raises:
        ValueError: If it is malformed; the message is one line that holds no part of a secret.
    """
    parts = _split(url)
    form = parts.scheme
    expected = f"expected {FORMS[form]}"
    if parts.fragment or (parts.netloc and "@" in parts.path + parts.query):
        raise ValueError(f"{expected}; {_UNQUOTED}")
    credentials, _, netloc = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    options = _options(parts.query, form)
    path = name = ""
    hosts: tuple[tuple[str, int], ...] = ()
    database = str(options.pop("db", ""))
    if form == "unix":
        path = unquote(parts.path)
        if netloc or not path:
            raise ValueError(expected)
    else:
        port = _SENTINEL_PORT if form.endswith("sentinel") else _REDIS_PORT
        hosts = tuple(_host(each, port, expected) for each in netloc.split(","))
        name, database = _name_and_database(parts.path, form, database, expected)
    if len(hosts) > 1 and "+" not in form:
        raise ValueError(f"{expected} with one host")
    if not (database or "0").isdecimal():
        raise ValueError(f"{expected} with the number of a database")
    sentinel_credentials = {
        key.removeprefix("sentinel_"): options.pop(key)
        for key in _SENTINEL_OPTIONS
        if key in options
    }
    return StoreAddress(
        form=form,
        hosts=hosts,
        path=path,
        name=name,
        database=int(database or 0),
        username=options.pop("username", None) or unquote(username) or None,
        password=options.pop("password", None) or unquote(password) or None,
        link_options=options,
        sentinel_credentials=sentinel_credentials,
    )


def join_host(host: str, port: int) -> str:
    """Return host and port in the form of a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:  # its text repeats the part before the hosts, which may be secret
        raise ValueError(f"expected a URL such as {FORMS['redis']}; {_UNQUOTED}") from None
    if parts.scheme not in FORMS:
        raise ValueError(
            "expected redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    return parts


def _name_and_database(path: str, form: str, database: str, expected: str) -> tuple[str, str]:
    """Return the master's name for Sentinel and the database, both from the URL's path."""
    words = [unquote(word) for word in path.strip("/").split("/")] if path.strip("/") else []
    name = ""
    if form.endswith("sentinel"):
        if not words:
            raise ValueError(f"{expected}, where NAME is what the sentinels call the master")
        name = words.pop(0)
    if len(words) > 1:
        raise ValueError(expected)
    database = database or "".join(words)
    if form.endswith("cluster") and database not in ("", "0"):
        raise ValueError(f"{expected}; a cluster has one database only")
    return name, database


def _host(text: str, default_port: int, expected: str) -> tuple[str, int]:
    """Parse `host`, `host:port`, `[ipv6]` or `[ipv6]:port`."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest.startswith(":") else rest and "no port"
    else:
        host, colon, port = text.partition(":")
        port = port if colon else ""
    number = int(port) if port.isdecimal() else 0
    if not host or (port and not 0 < number < 1 << 16):
        wrong = (
            f"the port is no number from 1 to 65535; {_UNQUOTED}" if port else "a host is missing"
        )
        raise ValueError(f"{expected}: {wrong}")
    return unquote(host), number or default_port


def _options(query: str, form: str) -> dict[str, Any]:
    """Parse the options after `?` as redis-py does, but refuse unknown ones."""
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(f"expected {FORMS[form]}?option=value&option=value") from None
    known = ["username", "password", *_LINK_OPTIONS]
    known += [] if form.endswith("cluster") else ["db"]
    known += _SENTINEL_OPTIONS if form.endswith("sentinel") else ()
    known += _TLS_OPTIONS if form.startswith("rediss") else ()
    for name, value in given.items():
        if name in _TLS_OPTIONS and name not in known:
            raise ValueError(f"the option {name} needs TLS: rediss://, not {form}://")
        if name not in known:
            raise ValueError(f"unknown option {name!r}; {form}:// knows {', '.join(sorted(known))}")
        if name in _FILES and not value:
            raise ValueError(f"the option {name}: expected a file, got nothing")
    options = {name: _value(name, text) for name, text in given.items()}
    if form.startswith("rediss"):
        options.setdefault("ssl_password", "")  # else OpenSSL would ask for it on the terminal
        _check_tls({name: value for name, value in options.items() if name in _TLS_OPTIONS})
    return options


def _value(name: str, text: str) -> Any:
    try:
        return URL_QUERY_ARGUMENT_PARSERS.get(name, str)(text)
    except ValueError:
        raise ValueError(f"the option {name} has a value that it cannot have") from None


def _check_tls(options: dict[str, Any]) -> None:
    """Load certificates and key once, so that a bad one fails the start and not each connection later."""
    # Not for stores without TLS: it takes a while.
    from service.security.certificates import check_files  # noqa: PLC0415

    ca, cert, key = (Path(options[name]) if name in options else None for name in _FILES)
    try:
        check_files(cert, key, ca, password=options.get("ssl_password", ""))
    except SecretFileError as error:
        raise ValueError(f"the TLS options: {error}") from None
    try:
        SSLConnection(**options).ssl_context.get()
    except redis_errors.RedisError:
        text = "the option ssl_cert_reqs has to be none, optional or required"
        raise ValueError(text) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "refused"
        raise ValueError(
            f"certificates or key of the TLS options cannot be used: {reason}"
        ) from None
