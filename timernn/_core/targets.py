"""What `connect` is given to reach: addresses, gRPC targets, Unix sockets."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from timernn import errors
from timernn._core.arguments import refusal

DEFAULT_PORT = 50051
FROM_ENVIRONMENT = "environment"

_LOCAL_SCHEMES = frozenset({"unix", "unix-abstract", "vsock"})
_LIST_SCHEMES = frozenset({"ipv4", "ipv6"})
_ADDRESS = "an address such as 'localhost:50051', or several"
_EXPECTED = "HOST:PORT, unix:PATH or a gRPC target such as dns:///HOST:PORT"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a channel goes.

    Attributes:
        text: As gRPC takes it, each host with its port.
        hosts: The hosts in it; none in a Unix socket's.
    """

    text: str
    hosts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a target; a host without a port gets 50051.

        Raises:
            BadField: If it is none.
        """
        scheme, colon, rest = text.partition(":")
        if colon and scheme in _LOCAL_SCHEMES and rest:
            return cls(text)
        if colon and scheme in _LIST_SCHEMES:
            endpoints = [_endpoint(each, text) for each in rest.removeprefix("///").split(",")]
            written = ",".join(_joined(*endpoint) for endpoint in endpoints)
            return cls(f"{scheme}:{written}", tuple(host for host, _ in endpoints))
        head = ""
        if colon and scheme == "dns":  # dns:HOST, dns:///HOST, dns://RESOLVER/HOST
            head, slash, rest = rest.rpartition("/")
            head = f"dns:{head}{slash}"
        host, port = _endpoint(rest if head else text, text)
        return cls(head + _joined(host, port), (host,))

    @property
    def is_local(self) -> bool:
        """Whether it stays on this machine: a loopback address or a Unix socket."""
        return all(map(_is_loopback, self.hosts))

    @property
    def is_private(self) -> bool:
        """Whether nobody on a network can read along: a Unix socket, or loopback addresses by number or name.

        No name is looked up that another machine may answer for, and a vsock leads out of this machine.
        """
        scheme = self.text.partition(":")[0]
        if not self.hosts:
            return scheme.startswith("unix")
        asks_resolver = self.text.startswith("dns://") and not self.text.startswith("dns:///")
        return not asks_resolver and all(
            host.lower() == "localhost" or (_is_address(host) and _is_loopback(host))
            for host in self.hosts
        )


def addresses_of(target: str | Sequence[str]) -> list[str]:
    """Return the targets as a list, each host with its port.

    Raises:
        BadField: If there is none, or one that cannot be read.
    """
    addresses: object = [target] if isinstance(target, str) else target
    if not isinstance(addresses, Sequence) or not addresses:
        raise refusal("target", _ADDRESS, target, str)
    for address in addresses:
        if not isinstance(address, str) or not address:
            raise refusal("target", _ADDRESS, address, str)
    return [Target.parse(address).text for address in addresses]


def require_proxy(proxy: str | None) -> None:
    """Refuse what is no proxy.

    Raises:
        BadField: If it is neither http://HOST:PORT nor "environment"; it may hold a password, so
            the message does not show it.
    """
    if proxy is None or proxy == FROM_ENVIRONMENT:
        return
    try:
        url = urlsplit(proxy)
        is_one = url.scheme == "http" and bool(url.hostname) and url.port is not None
    except (AttributeError, TypeError, ValueError):
        is_one = False
    if not is_one:
        raise errors.BadField(
            f"proxy: expected http://HOST:PORT, {FROM_ENVIRONMENT!r} or None, got something else",
            metadata={"field": "proxy"},
        )


def _endpoint(text: str, target: str) -> tuple[str, int]:
    """Split HOST, HOST:PORT, [IPV6]:PORT or a bare IPV6 into host and port."""
    if (bare := _ipv6(text)) is not None:
        return bare, DEFAULT_PORT
    found = re.fullmatch(r"(\[[^\[\]]*\]|[^\s:/,\[\]]+)(?::(\d{1,5}))?", text)
    if found is None:
        raise refusal("target", _EXPECTED, target, str)
    host, port = found[1].strip("[]"), int(found[2] or DEFAULT_PORT)
    if not 0 < port <= 65535:
        raise refusal("target", "a port from 1 to 65535", target, str)
    if found[1] != host and _ipv6(host) is None:
        raise refusal("target", "an IPv6 address in the brackets", target, str)
    return host, port


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ipv6(text: str) -> str | None:
    """Return the text if it is an IPv6 address without brackets, with or without a zone."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return None
    return text


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    inner = getattr(address, "ipv4_mapped", None) or address
    # Connecting to the unspecified address reaches this machine.
    return inner.is_loopback or inner.is_unspecified
