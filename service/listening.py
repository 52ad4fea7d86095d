"""Checks that an address to listen on is free before gRPC binds it, and that it stays with one server.

gRPC gives no reason when it cannot bind, and takes over a Unix socket that another server still listens
on. Workers share their port with SO_REUSEPORT, which lets any process of the same user join in: a
second supervisor would get half of the connections of the first one.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIX = "unix:"


def try_to_bind(listen: str, *, is_shared: bool = False) -> None:
    """Check that an address can be listened on, and release it again.

    Args:
        listen: HOST:PORT or unix:PATH.
        is_shared: Whether the workers of one supervisor share it.

    Raises:
        OSError: If it cannot be listened on; EADDRINUSE if another process listens there.
    """
    if listen.startswith(UNIX):
        _try_path(listen.removeprefix(UNIX))
        return
    for family, kind, number, _, address in _addresses(listen):
        with socket.socket(family, kind, number) as probe:
            # With SO_REUSEADDR, a port whose last server has just ended is free.
            option = socket.SO_REUSEPORT if is_shared else socket.SO_REUSEADDR
            probe.setsockopt(socket.SOL_SOCKET, option, 1)
            probe.bind(address)


@contextlib.contextmanager
def shared_port(listen: str) -> Iterator[str]:
    """Hold a TCP port for workers without listening on it; yield the address with its number.

    Raises:
        OSError: If another process listens there, such as the workers of another supervisor.
    """
    host = listen.rpartition(":")[0]
    family, kind, number, _, address = _addresses(listen)[0]
    with _claimed(listen), socket.socket(family, kind, number) as held:
        try_to_bind(listen)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
        yield f"{host}:{held.getsockname()[1]}"


@contextlib.contextmanager
def _claimed(listen: str) -> Iterator[None]:
    """Keep other supervisors out, from before the first check of the port.

    The name of an abstract socket on Linux is released when its process ends, for whatever reason, and
    is unique within a network namespace, as the port is. On other systems, two supervisors that start in
    the same moment do not notice each other.
    """
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux" and not listen.endswith(":0"):
            name = stack.enter_context(socket.socket(socket.AF_UNIX))
            name.bind(f"\0timernn workers on {listen}")
        yield


def _addresses(listen: str) -> list[tuple[int, int, int, str, tuple[object, ...]]]:
    host, _, port = listen.rpartition(":")
    found = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return [*found]


def _try_path(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return  # nobody listens; what an ended server left there is gRPC's to remove
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def is_loopback(listen: str) -> bool:
    """Return whether only this machine can reach an address to listen on."""
    if listen.startswith(UNIX):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
