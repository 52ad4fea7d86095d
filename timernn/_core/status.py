"""From a failed gRPC call, or a status inside a stream, to a typed exception."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # has no stubs

from timernn import errors

if TYPE_CHECKING:
    from collections.abc import Iterable

_DOMAIN = "timernn"
_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# What a connection that breaks under a call leaves behind, beside UNAVAILABLE (seen of grpcio).
_BROKEN_CONNECTION = (
    "Stream removed",
    "RST_STREAM",
    "Connection reset",
    "Socket closed",
    "GOAWAY",
    "Internal error from Core",  # grpc.aio, when it writes to a stream that has just ended
)
# gRPC's own check of an answer; of a request it says "CLIENT: Sent" and "SERVER: Received".
_ANSWER_TOO_LARGE = ("CLIENT: Received", "SERVER: Sent")
# What it says where nothing accepts connections, beside UNAVAILABLE.
_NO_SERVER = (
    "Connection refused",
    "No such file or directory",  # a Unix socket's
)
# What it says where it finds no address for a name: with the name, and a port if it had one.
_UNRESOLVED = re.compile(r"(?:errors resolving|DNS resolution failed for) (\S+?)(?::\d+)?:? ")


# What it says of a handshake that failed, beside UNAVAILABLE; the first that fits counts: with what is wrong, and
# which part of `tls` it hangs on.
_NO_TLS = {
    "WRONG_VERSION_NUMBER": ("it speaks no TLS", "tls"),
    "certificate has expired": ("its certificate has expired", ""),
    "certificate is not yet valid": ("its certificate is not valid yet", ""),
    "CERTIFICATE_VERIFY_FAILED": (
        "its certificate is not signed by an authority that this client trusts",
        "tls.ca",
    ),
    "Hostname Verification Check failed": (
        "its certificate is for another name",
        "tls.server_name",
    ),
    "Failed to create security handshaker": (
        "the client's own certificate and key are no PEM, or do not belong together",
        "",
    ),
    "Tls handshake failed": ("the TLS handshake failed", ""),
}
_ADVICE = {
    "": "",
    "tls": "; connect without tls",
    "no tls": "; tls=True or a timernn.TLS speaks it",
    "tls.ca": "; tls=timernn.TLS(ca=…) names one",
    "tls.cert": "; tls=timernn.TLS(cert=…, key=…) has one",
    "tls.server_name": "; tls=timernn.TLS(server_name=…) names the one to expect",
}
_REFUSED = (
    "it closes the connection after the TLS handshake; it may demand a certificate of the client,"
    " or refuse this one"
)
_NOT_CONNECTED = "failed to connect to all addresses"
# Right after connecting: a server that wants TLS, or a certificate; or one that is about to stop. The second
# is how gRPC says it where OpenSSL or BoringSSL has sent the alert of TLS 1.3, as Envoy does.
_CLOSED = ("Socket closed", "Unwrap failed")


def error_from_rpc(failure: Any, target: str = "", *, is_tls: bool = False) -> errors.Error:
    """Turn a grpc.RpcError of either kind of channel into the tree's exception.

    Args:
        failure: How the call ended.
        target: Where it went, for the text.
        is_tls: Whether the channel speaks TLS.
    """
    code, text = failure.code(), failure.details() or ""
    details = _details(failure.trailing_metadata() or ())
    if details is not None:
        return _error(code, details.message or text, details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        # gRPC's own check, before any handler of ours: no ErrorInfo.
        hint = "; split the sequence along T, or ask for less in one answer"
        error = errors.MessageTooLarge(text + hint, code=code)
        error.is_outcome_unknown = text.startswith(_ANSWER_TOO_LARGE)
        return error
    if code in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL} and _is_broken(text):
        return errors.Unavailable(f"the connection broke: {text}", code=code)
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(text, target, is_tls=is_tls)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"no answer from {target} in time", code=code)
    return errors.BY_CODE.get(code, errors.Error)(text, code=code)


def _unavailable(text: str, target: str, *, is_tls: bool) -> errors.Unavailable:
    """Return why there is no connection, where gRPC's text says it."""
    if unresolved := _UNRESOLVED.match(text):
        host = unresolved[1]
        return errors.NoServer(f"the name {host} cannot be resolved", metadata={"host": host})
    if any(sign in text for sign in _NO_SERVER):
        return errors.NoServer(f"no server at {target}; is `timernn serve` running?")
    if found := _without_tls(text, is_tls=is_tls):
        why, part = found
        problem = f"{target}: {why}"
        metadata = {"problem": problem, "part": part}
        return errors.TlsFailed(problem + _ADVICE[part], metadata=metadata)
    return errors.Unavailable(text)


def _without_tls(text: str, *, is_tls: bool) -> tuple[str, str] | None:
    """Return why TLS keeps a connection from being made, and on which part of `tls` it hangs; None if it is not TLS."""
    if _NOT_CONNECTED not in text:
        return None
    if is_tls:
        for sign, found in _NO_TLS.items():
            if sign in text:
                return found
    if not any(sign in text for sign in _CLOSED):
        return None
    if is_tls:
        return _REFUSED, "tls.cert"
    return "it closes the connection before it answers; it may expect TLS", "no tls"


def error_from_status(status: status_pb2.Status) -> errors.Error:
    """Turn the status of one operation on a stream into the tree's exception."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _error(code, status.message, status)


def _is_broken(text: str) -> bool:
    return any(sign in text for sign in _BROKEN_CONNECTION)


def _details(trailing: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    for key, value in trailing:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None


def _error(code: grpc.StatusCode, text: str, status: status_pb2.Status) -> errors.Error:
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    reason = info.reason if info.domain == _DOMAIN else ""
    kind = errors.BY_REASON.get(reason) or errors.BY_CODE.get(code, errors.Error)
    return kind(text, reason=reason, metadata=info.metadata, code=code, retry_after_s=retry_after_s)
