"""A server with TLS and tokens as a process, and what a client of the library needs for it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trustme

import timernn
from instruments.processes import ServiceProcess, wait_until
from service.security.roles import Role
from service.security.tokens import create_token, revoke_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NUMBERS = itertools.count()


@dataclass
class Secured:
    """A server with TLS and tokens.

    Attributes:
        process: The server.
        folder: Holds its files.
        authority: Signed its certificate.
        known: A token that is never revoked.
    """

    process: ServiceProcess
    folder: Path
    authority: trustme.CA
    known: str = ""

    @property
    def tls(self) -> timernn.TLS:
        """What a client needs to believe the server."""
        return timernn.TLS(ca=self.authority.cert_pem.bytes())

    def connect(self, token: str | Callable[[], str] | None) -> timernn.Client:
        """Connect as whom a token names."""
        return timernn.connect(self.process.address, tls=self.tls, token=token)

    def accepts(self, token: str) -> bool:
        """Ask the server whether a token is good now."""
        with self.connect(token) as client:
            try:
                client.server_info()
            except timernn.BadCredentials:
                return False
        return True

    def issue(self) -> tuple[str, str]:
        """Make a token; return its name and itself once the server accepts it."""
        name = f"n{next(_NUMBERS)}"
        file = self.folder / "tokens.toml"
        token, _ = create_token(file, Role.ADMIN, "acme", name=name, expires=None)
        wait_until("the token", lambda: self.accepts(token))
        return name, token

    def revoke(self, name: str, token: str) -> None:
        """Revoke a token; return when the server refuses it."""
        revoke_tokens(self.folder / "tokens.toml", name=name)
        wait_until("its end", lambda: not self.accepts(token))


def secured_process(store_url: str, folder: Path, *options: str) -> ServiceProcess:
    """Prepare a server with TLS and tokens whose files are in a folder."""
    return ServiceProcess(
        store_url,
        *("--tls-cert", str(folder / "tls.crt"), "--tls-key", str(folder / "tls.key")),
        *("--tokens", str(folder / "tokens.toml"), *options),
    )


def write_files(folder: Path) -> tuple[trustme.CA, str]:
    """Write a server's certificate and its tokens; return who signed it, and a token."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    issued.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.key").chmod(0o600)
    token, _ = create_token(folder / "tokens.toml", Role.ADMIN, "acme", name="known", expires=None)
    return authority, token
