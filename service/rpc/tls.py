"""The certificate on the clients' port: each new connection gets the one that was read last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from service.security.certificates import ServerCertificate


class TlsIdentity:
    """What the server shows to its clients, and whom of them it believes.

    gRPC asks for it once per connection, on a thread of its own. Nothing is read or computed there: what
    changed is prepared by `change` and handed over.
    """

    def __init__(self, certificate: ServerCertificate) -> None:
        """Begin with a certificate."""
        self._needs_client = certificate.client_ca is not None
        self._first = _configuration(certificate)
        self._changed: Any = None

    def change(self, certificate: ServerCertificate) -> None:
        """Show this one from the next connection on; open ones go on."""
        self._changed = _configuration(certificate)

    def credentials(self) -> grpc.ServerCredentials:
        """Return what gRPC listens with; TLS 1.2 is the least that it speaks."""
        return grpc.dynamic_ssl_server_credentials(
            self._first, self._fetch, require_client_authentication=self._needs_client
        )

    def _fetch(self) -> Any:
        """Return a certificate that gRPC does not have yet, or None."""
        changed, self._changed = self._changed, None
        return changed


def _configuration(certificate: ServerCertificate) -> Any:
    pair = (certificate.key, certificate.chain)
    return grpc.ssl_server_certificate_configuration([pair], certificate.client_ca)
