"""`python -m service.probe`: is the server of this machine or container ready?

Exit code 0 if it is, else 1 and a line on stderr. It is meant for health checks that run every few
seconds, so it imports nothing but parts of the standard library and speaks the little HTTP/2 that one
call of `grpc.health.v1.Health/Check` takes (docs/adr/0028-a-probe-without-grpc.md).

    python -m service.probe [ADDRESS [SERVICE]]

ADDRESS is HOST:PORT or unix:PATH. Without it the variables of the server say where: that of
TIMERNN_HEALTH_LISTEN, else that of TIMERNN_LISTEN, with TLS if TIMERNN_TLS_CERT is set; what is not set may
stand in the file of TIMERNN_CONFIG. SERVICE is a name of the health service, such as `liveness`.
"""

from __future__ import annotations

import os
import socket
import sys

TIMEOUT_S = 4.0
DEFAULT_ADDRESS = "127.0.0.1:50051"
UNIX = "unix:"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_STREAM = 1
_LARGEST_FRAME = 1 << 14
# A message of gRPC (not compressed, two bytes) with field 1 of HealthCheckResponse, status: SERVING.
_SERVING = b"\0\0\0\0\2\x08\x01"


class ProbeError(Exception):
    """The server is not ready; the message is one line that says why."""


def main(arguments: list[str]) -> int:
    """Ask, and return the exit code."""
    address, is_tls = arguments[0] if arguments else "the server", False
    try:
        if not arguments:
            address, is_tls = own_address(os.environ)
        check(address, *arguments[1:2], is_tls=is_tls)
    except (ProbeError, OSError) as error:
        why = getattr(error, "strerror", None) or error  # without its number
        sys.stderr.write(f"timernn: {address}: {why}\n")
        return 1
    return 0


def own_address(variables: os._Environ[str] | dict[str, str]) -> tuple[str, bool]:
    """Return where a server with these variables says how it is, and whether it speaks TLS there.

    Raises:
        ProbeError: If the file of TIMERNN_CONFIG is no TOML.
        OSError: If it cannot be read.
    """
    config = variables.get("TIMERNN_CONFIG")
    in_file = _read_toml(config) if config else {}

    def setting(name: str) -> str:
        return variables.get(f"TIMERNN_{name.upper()}") or str(in_file.get(name, ""))

    if listen := setting("health_listen"):
        return listen, False
    return setting("listen") or DEFAULT_ADDRESS, bool(setting("tls_cert"))


def _read_toml(path: str) -> dict[str, object]:
    from service.files import TomlError, parse_toml, read_file  # noqa: PLC0415 - only where there is a file

    try:
        document = parse_toml(read_file(path))
    except TomlError as error:
        raise ProbeError(f"{path}: {error}") from error
    return {key.replace("-", "_"): value for key, value in document.items()}


def check(
    address: str, service: str = "", *, is_tls: bool = False, timeout_s: float = TIMEOUT_S
) -> None:
    """Return if a server is SERVING.

    Args:
        address: HOST:PORT or unix:PATH; a wildcard host, as in an address to listen on, is this machine.
        service: A name of the health service; empty: the server.
        is_tls: Whether to speak TLS. Nothing secret is sent, so the certificate is not verified: it names
            the server as clients know it, which is not as the probe does.
        timeout_s: For each step: connect, send, read.

    Raises:
        ProbeError: If it is not.
        OSError: If it cannot be reached.
    """
    with _connect(address, timeout_s) as plain:
        if not is_tls:
            _ask(plain, service)
            return
        import ssl  # noqa: PLC0415 - half of the time that the probe takes

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(plain) as encrypted:
            _ask(encrypted, service)


def _connect(address: str, timeout_s: float) -> socket.socket:
    if address.startswith(UNIX):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        connection.connect(address.removeprefix(UNIX))
        return connection
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ProbeError("expected HOST:PORT or unix:PATH")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))  # noqa: S104
    return socket.create_connection((host, int(port)), timeout_s)


def _ask(connection: socket.socket, service: str) -> None:
    """Send the call and read frames until the answer or the end of the call."""
    name = service.encode()
    message = b"\x0a" + bytes([len(name)]) + name if name else b""
    headers = b"".join(
        _header(*pair)
        for pair in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
    )
    connection.sendall(
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, _STREAM, headers)
        + _frame(_DATA, _END_STREAM, _STREAM, b"\0" + len(message).to_bytes(4, "big") + message)
    )
    answer = b""
    with connection.makefile("rb") as reading:
        while True:
            head = reading.read(9)
            length, kind, flags = int.from_bytes(head[:3], "big"), head[3:4], head[4:5]
            if len(head) < 9 or length > _LARGEST_FRAME:
                raise ProbeError("what answers there does not speak gRPC, or wants TLS")
            payload = reading.read(length)
            if kind[0] == _SETTINGS and not flags[0] & _ACK:
                connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind[0] == _DATA:
                answer += payload
            elif kind[0] in {_RST_STREAM, _GOAWAY}:
                raise ProbeError("the server ends its connections")
            if kind[0] in {_DATA, _HEADERS} and flags[0] & _END_STREAM:
                break
    if answer != _SERVING:
        raise ProbeError("not serving" if answer else "the server knows no such service")


def _header(name: str, value: str) -> bytes:
    """Encode a header for HPACK: literal, not indexed, not compressed (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Encode a frame of HTTP/2 (RFC 9113, 4.1)."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
