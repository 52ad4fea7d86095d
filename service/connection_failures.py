"""Why a connection could not be made, in plain words instead of Python's or OpenSSL's."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Final

# By OpenSSL's number of what is wrong with a certificate.
_CERTIFICATE: Final = {
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    62: "its certificate is for another name",
    64: "its certificate is for another name",
}
NOT_TRUSTED: Final = "its certificate is not signed by an authority that is trusted here"
NO_TLS: Final = "it speaks no TLS"
_REASONS: Final = {
    "WRONG_VERSION_NUMBER": NO_TLS,
    "RECORD_LAYER_FAILURE": NO_TLS,
    "UNEXPECTED_EOF_WHILE_READING": "it closes the connection during the TLS handshake",
}


def in_words(error: OSError) -> str:
    """Return why a connection failed; nothing where the error does not say it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _CERTIFICATE.get(error.verify_code, NOT_TRUSTED)
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        words = reason.lower().replace("_", " ")
        return _REASONS.get(reason, f"the TLS handshake failed: {words}" if words else "")
    if isinstance(error, socket.gaierror):
        return "its name cannot be resolved"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return os.strerror(error.errno) if error.errno and error.errno > 0 else ""
