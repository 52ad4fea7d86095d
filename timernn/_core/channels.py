"""How both faces set their gRPC channels."""

from __future__ import annotations

from collections.abc import Sequence

from timernn._core.arguments import refusal

_ADDRESS = "an address such as 'localhost:50051', or several"


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Return the channel arguments of a client."""
    return [
        # Exactly one layer retries, and it is ours: gRPC's own skips messages over 256 KiB and
        # knows nothing of chunk numbers.
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # A peer that vanished is noticed within 40 s, also on an idle stream.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Without these a channel waits up to two minutes before it tries a restarted server again.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Each address has its own connection, also beside other clients in this process.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def addresses_of(target: str | Sequence[str]) -> list[str]:
    """Return the targets as a list.

    Raises:
        BadField: If there is none, or one is no string.
    """
    addresses: object = [target] if isinstance(target, str) else target
    if not isinstance(addresses, Sequence) or not addresses:
        raise refusal("target", _ADDRESS, target)
    for address in addresses:
        if not isinstance(address, str) or not address:
            raise refusal("target", _ADDRESS, address)
    return list(addresses)
