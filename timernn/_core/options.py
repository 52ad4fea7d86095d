"""The arguments of `connect`, as both frontends hand them to the core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from timernn._core import arguments
from timernn._core.credentials import require_metadata, require_token
from timernn._core.retry import RetryPolicy
from timernn._core.targets import require_proxy
from timernn._core.tls import tls_of

if TYPE_CHECKING:
    from typing import TypeAlias

    from opentelemetry.trace import TracerProvider

    from timernn._core.credentials import Metadata, TokenSource
    from timernn._core.tls import TLS

    Traces: TypeAlias = bool | TracerProvider


@dataclass(frozen=True, slots=True)
class Options:
    """How a client behaves; the arguments of `connect`.

    Attributes:
        timeout_s: For one call with all its attempts.
        connect_timeout_s: The same until something has answered for the first time.
        retry: How failed calls are tried again.
        log_limit: Entries of a journal for each session that writes it.
        log_bytes: Bytes of a journal.
        log_total_bytes: Bytes of all journals together; those written longest ago give way.
        max_message_bytes: Largest message either way.
        proxy: An HTTP proxy's URL, "environment", or None for direct connections.
        tls: How to speak TLS; None for plaintext.
        token: What the server knows the caller by, a callable that returns it, or None.
        token_over_plaintext: Whether it may be sent to another machine without TLS.
        metadata: Sent with every call.
        traces: Whether there are spans of its calls, or the TracerProvider that makes them.
    """

    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    log_limit: int = 64
    log_bytes: int = 16 << 20
    log_total_bytes: int = 256 << 20
    max_message_bytes: int = 16 << 20
    # It may hold a password, as the token and the metadata may.
    proxy: str | None = field(default=None, repr=False)
    tls: TLS | bool | None = None
    token: TokenSource = field(default=None, repr=False)
    token_over_plaintext: bool = False
    metadata: Metadata = field(default=None, repr=False)
    traces: Traces = False

    def __post_init__(self) -> None:
        """Refuse what no client can work with, by the names that `connect` gives the arguments.

        Raises:
            BadField: If an argument has the wrong type or lies outside its range.
        """
        for name, value in (
            ("timeout", self.timeout_s),
            ("connect_timeout", self.connect_timeout_s),
        ):
            arguments.positive_number(name, value)
        if not isinstance(self.retry, RetryPolicy):
            raise arguments.refusal("retry", "a timernn.RetryPolicy", self.retry)
        for name in ("log_limit", "log_bytes", "log_total_bytes"):
            arguments.integer(0)(name, getattr(self, name))
        arguments.integer(1, arguments.MOST_INT32)("max_message_bytes", self.max_message_bytes)
        require_proxy(self.proxy)
        object.__setattr__(self, "tls", tls_of(self.tls))
        require_token(self.token)
        arguments.flag("token_over_plaintext", self.token_over_plaintext)
        require_metadata(self.metadata)
        if not isinstance(self.traces, bool) and not hasattr(self.traces, "get_tracer"):
            raise arguments.refusal("traces", "True, False or a TracerProvider", self.traces)
        if self.traces is not False and "traceparent" in (self.metadata or {}):
            raise arguments.refusal("metadata", "no traceparent beside traces", "traceparent", str)
