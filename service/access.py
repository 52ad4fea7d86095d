"""Who gets in, and what each tenant may have: certificate, tokens and tenants, read again when they change."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from service.exposure import check_options
from service.security.certificates import read_certificate
from service.security.files import SecretFileError
from service.security.reload import Reloaded
from service.security.tokens import TokenSet, read_tokens
from service.tenants import Tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.security.certificates import ServerCertificate
    from service.settings import Settings


class Access:
    """The files that decide who gets in.

    Attributes:
        certificate: What the server shows; None: it speaks plaintext.
        tokens: Who may call; None: everybody who can connect.
        tenants: What each tenant may have; None: all the same.
    """

    def __init__(self, settings: Settings) -> None:
        """Read the files.

        Raises:
            ExposedError: If options are missing that belong together.
            SecretFileError: If a file cannot be used.
        """
        check_options(settings)
        cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
        self.certificate: Reloaded[ServerCertificate] | None = None
        self.tokens: Reloaded[TokenSet] | None = None
        if cert:
            paths = [Path(path) for path in (cert, key, client_ca) if path]
            self.certificate = Reloaded("certificate", paths, lambda: read_certificate(*paths))
        if settings.tokens:
            path = Path(settings.tokens)
            try:
                self.tokens = Reloaded(
                    "tokens", [path], lambda: read_tokens(path), when_gone=TokenSet
                )
            except SecretFileError as error:
                raise SecretFileError(f"--tokens: {error}") from error
        self.tenants: Tenants | None = None
        if settings.tenants:
            self.tenants = Tenants(Path(settings.tenants), settings.limits)

    @contextlib.contextmanager
    def watched(
        self,
        *changes: Callable[[ServerCertificate], None],
        on_tenants: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Read the files again while they change.

        Args:
            changes: Called with each new certificate.
            on_tenants: Called when tenants may have something else.
        """

        def on_certificate(certificate: ServerCertificate) -> None:
            for change in changes:
                change(certificate)

        tasks = []
        if self.certificate is not None:
            tasks.append(asyncio.ensure_future(self.certificate.watch(on_certificate)))
        if self.tokens is not None:
            tasks.append(asyncio.ensure_future(self.tokens.watch()))
        if self.tenants is not None:
            watching = self.tenants.file.watch(lambda _table: on_tenants())
            tasks.append(asyncio.ensure_future(watching))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    def gauges(self, now_s: float) -> dict[str, float]:
        """Return what metrics show of the certificate, without labels.

        Args:
            now_s: Seconds since 1970.
        """
        if self.certificate is None:
            return {}
        ends_s = self.certificate.value.expires.timestamp()
        return {"timernn_certificate_days": (ends_s - now_s) / 86400}

    def errors(self) -> dict[str, float]:
        """Return by file 1 if it cannot be read as it is now, else 0."""
        tenants = self.tenants.file if self.tenants else None
        found = {"certificate": self.certificate, "tokens": self.tokens, "tenants": tenants}
        return {
            name: float(file.error is not None) for name, file in found.items() if file is not None
        }
