"""The server's certificate and key, checked before they are used."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from service.security.files import SecretFileError

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """What a server shows to its clients, and whom it believes.

    Attributes:
        chain: The certificate and those that it was signed by, PEM.
        key: The private key, PEM.
        client_ca: Signs the certificates that clients have to show, PEM; None: they need none.
        expires: When the first of the chain ends, UTC.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime

    def __repr__(self) -> str:
        """Leave the key out of logs."""
        return f"ServerCertificate(expires={self.expires:%Y-%m-%dT%H:%M:%SZ})"


def read_certificate(
    cert_file: Path, key_file: Path, client_ca_file: Path | None = None
) -> ServerCertificate:
    """Read a certificate, its key and the authority of the clients' certificates.

    Raises:
        SecretFileError: If a file cannot be read, the key is not the certificate's, or anybody on the
            machine may read the key.
    """
    chain, key = _read("certificate", cert_file), _read("key", key_file)
    if key_file.stat().st_mode & stat.S_IRWXO:
        text = f"{key_file}: expected a key that not everybody may read: run `chmod o= {key_file}`"
        raise SecretFileError(text)
    client_ca = _read("client CA", client_ca_file) if client_ca_file else None
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise SecretFileError(f"{cert_file}: expected certificates in PEM") from error
    if client_ca is not None and client_ca_file is not None:
        try:
            x509.load_pem_x509_certificates(client_ca)
        except ValueError as error:
            raise SecretFileError(f"{client_ca_file}: expected certificates in PEM") from error
    _check_pair(cert_file, key_file, certificates[0], key)
    expires = min(one.not_valid_after_utc for one in certificates)
    return ServerCertificate(chain, key, client_ca, expires)


def _read(kind: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SecretFileError(f"{path}: {error.strerror}") from error
    if not data.strip():
        raise SecretFileError(f"{path}: expected a {kind} in PEM, got an empty file")
    return data


def _check_pair(cert_file: Path, key_file: Path, leaf: x509.Certificate, key: bytes) -> None:
    """Compare what was read, not the files: they may have been replaced in between."""
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SecretFileError(f"{key_file}: expected a private key in PEM") from error
    except TypeError as error:
        text = f"{key_file}: expected a key without a password"
        raise SecretFileError(text) from error
    if _public(private.public_key()) != _public(leaf.public_key()):
        raise SecretFileError(f"{key_file} is not the key of the certificate in {cert_file}")


def _public(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
