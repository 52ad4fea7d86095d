"""Whether strangers could reach the server in plaintext or without a login, and what is missing then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.listening import is_loopback

if TYPE_CHECKING:
    from service.settings import Settings


class ExposedError(Exception):
    """The server would serve strangers; one line that names what is missing."""


def check_options(settings: Settings) -> None:
    """Refuse to serve strangers in plaintext or without a login, unless it was asked for.

    Raises:
        ExposedError: If an address can be reached from other machines and something is missing.
    """
    if bool(settings.tls_cert) != bool(settings.tls_key):
        missing = "--tls-key" if settings.tls_cert else "--tls-cert"
        raise ExposedError(f"{missing} is missing: --tls-cert and --tls-key belong together")
    if settings.tls_client_ca and not settings.tls_cert:
        raise ExposedError("--tls-client-ca needs --tls-cert and --tls-key")
    if settings.insecure:
        return
    for option, address in (
        ("--listen", settings.listen),
        ("--metrics-listen", settings.metrics_listen),
    ):
        if not address or is_loopback(address):
            continue
        needed = [] if settings.tls_cert else ["--tls-cert and --tls-key"]
        if option == "--metrics-listen":
            needed += [] if settings.tokens else ["--tokens"]
        elif not (settings.tokens or settings.tls_client_ca):
            needed.append("--tokens or --tls-client-ca")
        if needed:
            raise ExposedError(
                f"{option} {address} can be reached from other machines: add {' and '.join(needed)};"
                " or --insecure, where only those whom you trust can reach it"
            )


def lacks(settings: Settings) -> str:
    """Return what a server that strangers can reach does without, in words for its warning."""
    encryption = "" if settings.tls_cert else "encryption"
    login = "" if settings.tokens or settings.tls_client_ca else "login"
    return " or ".join(filter(None, (encryption, login)))
