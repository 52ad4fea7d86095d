"""The gRPC channels of a client: how they are set, and when one is left for a new one."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Protocol

from timernn import errors
from timernn._core.credentials import Credentials
from timernn._core.status import error_from_rpc
from timernn._core.targets import FROM_ENVIRONMENT, Target
from timernn._core.tls import TLS, Certificates

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from timernn._core.contract import Rpc
    from timernn._core.effects import Headers
    from timernn._core.options import Options

ChannelOptions = list[tuple[str, int | str]]

# A peer that vanished without a word is noticed within 17 s, also on an idle connection. The server
# allows a ping every 5 s and cuts off who pings more often.
_PING_EVERY_MS = 12_000
_PING_TIMEOUT_MS = 5_000
# TLS takes four round trips; a line around the globe has a third of a second for each.
_CONNECT_TIMEOUT_MS = 2_000
# A name server that says nothing is left for the next one after two seconds. Without a bound gRPC asks on for
# longer than the time to connect, and the error would not say that it is the name.
_RESOLVE_TIMEOUT_MS = 4_000
# A shorter attempt that ran out of time says nothing of its connection.
_SUSPECT_AFTER_S = 1.0

_forks = 0
# gRPC reads it when it is imported, which is now.
_CAN_FORK = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1").lower() in {
    "1",
    "on",
    "t",
    "true",
    "y",
    "yes",
}


def _note_fork() -> None:
    global _forks  # noqa: PLW0603  # one process has one count
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def channel_options(
    max_message_bytes: int,
    target: Target | None = None,
    proxy: str | None = None,
    *,
    is_renewed: bool = False,
) -> ChannelOptions:
    """Return the channel arguments of a client.

    Args:
        max_message_bytes: Largest message that may come.
        target: Where it goes; a proxy is never used for this machine.
        proxy: An HTTP proxy's URL, "environment", or None for a direct connection.
        is_renewed: Whether an earlier channel to this target failed.
    """
    options: ChannelOptions = [
        # Exactly one layer retries, and it is ours: gRPC's own skips messages over 256 KiB and
        # knows nothing of chunk numbers.
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        # Both: the first sets TCP_USER_TIMEOUT, the second decides on a ping without an answer.
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # No pings after cancelled calls: a burst of these would be too many for the server.
        ("grpc.http2.ping_on_rst_stream_percent", 0),
        # Without these a channel waits up to two minutes before it tries a restarted server again.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Its name in gRPC hides that a new connection has no longer than this for all of its handshakes.
        ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.dns_ares_query_timeout", _RESOLVE_TIMEOUT_MS),
        # Each address has its own connection, also beside other clients in this process.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    # gRPC would take http_proxy from the environment, for the loopback address too.
    if proxy is None or target is None or target.is_local:
        options.append(("grpc.enable_http_proxy", 0))
    elif proxy != FROM_ENVIRONMENT:
        options.append(("grpc.http_proxy", proxy))
    if is_renewed:
        # Of several addresses under one name, not always the first again.
        shuffled = '{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}'
        options.append(("grpc.service_config", shuffled))
    return options


class Link:
    """One channel and its methods. It is closed when nothing holds it any more: a call keeps it.

    Attributes:
        address: The number of its target.
        channel: Of either kind.
        target: Where it leads, as gRPC takes it.
        is_tls: Whether it speaks TLS.
        answered: When a call over it was last answered, on the monotonic clock, in seconds.
    """

    __slots__ = ("_credentials", "_methods", "address", "answered", "channel", "is_tls", "target")

    def __init__(
        self, address: int, channel: Any, target: str, credentials: Credentials, *, is_tls: bool
    ) -> None:
        self.address, self.channel = address, channel
        self.target, self.is_tls = target, is_tls
        self._credentials = credentials
        self.answered = 0.0
        self._methods: dict[str, Any] = {}

    def begin(
        self, rpc: Rpc[Any, Any], request: Any, timeout_s: float, headers: Headers = ()
    ) -> Any:
        """Begin a call: every one of the client, so what goes along with each is said here.

        Messages are bytes, written and read outside gRPC: what is raised inside a reader of its own it
        would log and drop.

        Args:
            rpc: The method.
            request: The request, or an iterator of several; None where they are written later.
            timeout_s: When gRPC is to end it.
            headers: Of this call alone.

        Returns:
            What gRPC returns: of a blocking unary call the answer, else the call.
        """
        method = self._methods.get(rpc.path)
        if method is None:
            method = self._methods[rpc.path] = getattr(self.channel, rpc.kind)(rpc.path)
        metadata = self._credentials.metadata
        if headers:
            metadata = (*(metadata or ()), *headers)
        return method(request, timeout=timeout_s, metadata=metadata)

    def error_of(self, failure: grpc.RpcError) -> errors.Error:
        """Return the exception of the library for a failed call."""
        return error_from_rpc(failure, self.target, is_tls=self.is_tls)


class ChannelMaker(Protocol):
    """`grpc` or `grpc.aio`."""

    def insecure_channel(self, target: str, options: Any) -> Any:
        """Make a channel without encryption."""

    def secure_channel(self, target: str, credentials: Any, options: Any) -> Any:
        """Make a channel with it."""


class Links:
    """The channels of one client: made at their first use, left for new ones when suspect.

    Args:
        addresses: Targets; callers name them by number.
        options: Of `connect`.
        maker: Makes channels.
        credentials: What each call carries.

    Raises:
        BadField: If certificates cannot be used, or a token would be sent so that others can read it.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        options: Options,
        maker: ChannelMaker,
        credentials: Credentials | None = None,
    ) -> None:
        self._targets = [Target.parse(address) for address in addresses]
        self._options, self._maker = options, maker
        self._credentials = Credentials() if credentials is None else credentials
        tls = options.tls
        self._certificates = Certificates(tls) if isinstance(tls, TLS) else None
        _require_secrecy(self._targets, options)
        self._links: dict[int, Link] = {}
        self._left: set[int] = set()
        self._forks, self._is_closed = _forks, False

    @property
    def is_inherited(self) -> bool:
        """Whether this is the copy that a fork made in the child."""
        return self._forks != _forks

    def check(self) -> None:
        """Refuse what cannot work any more.

        Raises:
            ClientClosed: After `close`.
            WrongProcess: In a forked process.
        """
        if self._forks != _forks:
            raise errors.WrongProcess(
                "the client was made before this process was forked; connect again in the child"
            )
        if self._forks and not _CAN_FORK:
            raise errors.WrongProcess(
                "this process was forked after gRPC was loaded, and GRPC_ENABLE_FORK_SUPPORT turns "
                "gRPC's support of that off: use multiprocessing's \"spawn\", or set it to 1"
            )
        if self._is_closed:
            raise errors.ClientClosed("the client is closed; connect again")

    def get(self, address: int) -> Link:
        """Return the channel to an address by its number; with new certificates it is a new one."""
        if self._certificates is not None and self._certificates.renew():
            self._links.clear()  # calls under way keep theirs
        link = self._links.get(address)
        if link is None:
            self.check()
            link = self._links.setdefault(address, self._open(address))
        return link

    def _open(self, address: int) -> Link:
        """Make a channel: every one of the client, of either frontend."""
        target = self._targets[address]
        arguments = channel_options(
            self._options.max_message_bytes,
            target,
            self._options.proxy,
            is_renewed=address in self._left,
        )
        certificates = self._certificates
        if certificates is None:
            channel = self._maker.insecure_channel(target.text, arguments)
        else:
            if (name := certificates.server_name) is not None:
                arguments.append(("grpc.ssl_target_name_override", name))
            channel = self._maker.secure_channel(target.text, certificates.credentials, arguments)
        is_tls = certificates is not None
        return Link(address, channel, target.text, self._credentials, is_tls=is_tls)

    def leave(self, link: Link) -> None:
        """Let the next call take a new channel; those under way keep this one."""
        if self._links.get(link.address) is link:
            self._left.add(link.address)
            self._links.pop(link.address, None)

    def leave_if_silent(self, link: Link, error: errors.Error, started: float) -> None:
        """Leave a channel where a call ran out of time and no other was answered meanwhile.

        Its connection may be cut without a word.

        Args:
            link: The channel.
            error: What the call ended with.
            started: When it began, on the monotonic clock, in seconds.
        """
        if not isinstance(error, errors.DeadlineExceeded) or error.reason:
            return
        if link.answered < started < time.monotonic() - _SUSPECT_AFTER_S:
            self.leave(link)

    def close(self) -> list[Link]:
        """Make no more; return those there are."""
        self._is_closed = True
        links = list(self._links.values())
        self._links.clear()
        return links


def _require_secrecy(targets: Sequence[Target], options: Options) -> None:
    """Refuse to send a token where others may read it.

    Raises:
        BadField: If a target is reached over a network without TLS, unless that was asked for.
    """
    if options.token is None or options.tls is not None or options.token_over_plaintext:
        return
    for target in targets:
        if not target.is_private:
            raise errors.BadField(
                f"token: expected TLS for {target.text}, since others can read what is sent there in plaintext; "
                "token_over_plaintext sends it all the same",
                metadata={"field": "token"},
            )
