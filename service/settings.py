"""Everything an operator can set, with its default and unit.

`Limits` bounds everything that requests can make grow; GetServerInfo returns it to clients.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests and on what they leave behind."""

    batch_size: int = 1024
    chunk_steps: int = 4096
    input_size: int = 4096
    hidden_size: int = 4096
    message_bytes: int = 16 * MIB
    operations_per_message: int = 256
    stream_operations_in_flight: int = 1024
    operations_in_flight: int = 4096
    request_bytes_in_flight: int = 512 * MIB
    sessions_per_tenant: int = 100_000
    models_per_tenant: int = 1_000
    weights_bytes: int = 256 * MIB
    tapes_per_session: int = 8
    counted_tapes_per_session: int = 32
    counted_tape_bytes_per_session: int = 16 * MIB
    contributions_per_model: int = 10_000
    contribution_bytes_per_model: int = 256 * MIB
    superseded_bytes_per_model: int = 256 * MIB
    checkpoints_per_model: int = 100
    remembered_requests_per_model: int = 100_000
    remembered_contributions_per_model: int = 500_000
    replay_window: int = 4
    min_ttl_ms: int = 1_000
    max_ttl_ms: int = 7 * DAY_MS
    default_ttl_ms: int = HOUR_MS
    tape_ttl_ms: int = 15 * MINUTE_MS
    contribution_ttl_ms: int = DAY_MS
    head_max_age_ms: int = 50
    default_deadline_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How one server process runs."""

    listen: str = "127.0.0.1:50051"
    tls_cert: str = ""  # files of the server's certificate, PEM; empty: plaintext
    tls_key: str = ""
    tls_client_ca: str = (
        ""  # signs the certificates that clients have to show; empty: they need none
    )
    tokens: str = ""  # file of tokens; empty: every caller is let in
    health_listen: str = ""  # a second address, plaintext, for health alone; empty: none
    tenants: str = ""  # file of what each tenant may have; empty: all the same
    insecure: bool = False  # serve strangers without encryption or login
    metrics_listen: str = ""  # where Prometheus reads; empty: nowhere
    metrics_tenants: bool = False  # let tenants' names stand in metrics
    redis_url: str = ""  # empty: the embedded store in data_dir
    redis_password_file: str = ""  # holds the password of the URL's user; empty: the URL has it
    data_dir: Path = Path("timernn-data")
    drain_s: float = 20.0  # how long calls in flight may take after SIGTERM
    drain_notice_s: float = 0.0  # how long health is NOT_SERVING before calls are refused
    connection_age_ms: int = 5 * MINUTE_MS  # after it a client is asked to reconnect
    session_cache_bytes: int = 256 * MIB
    weights_cache_bytes: int = 1024 * MIB
    max_batch_rows: int = 1024  # rows of one batched forward
    compute_threads: int = 0  # big batches of one model computed at once; 0: see `threads`
    store_connections: int = 32
    store_timeout_ms: int = 500
    durability: str = "primary"  # or "replica": an answer waits until a replica has its writes
    durability_timeout_ms: int = 200  # how long it waits; must be less than store_timeout_ms
    log_level: str = "info"
    traces: bool = False  # send spans by OTLP, as the variables OTEL_… say
    log_format: str = "console"  # or "json": an object a line
    failpoints: str = ""  # see service.failpoints; only with `testing`
    testing: bool = False
    workers: int = 1  # server processes on the one port
    supervised: bool = False  # one of several workers: shares the port, ends when stdin closes
    worker: int = 0  # which one, from 1
    worker_count: int = 1  # of how many; they divide what a tenant may have of a replica
    limits: Limits = field(default_factory=Limits)

    @property
    def threads(self) -> int:
        """How many big batches of one model a process computes at once: two, if it has the cores.

        More would contend for the GIL between the steps of the recurrence; further cores are for further
        workers.
        """
        return self.compute_threads or max(1, min(2, _usable_cores() // self.workers))

    def contradiction(self) -> tuple[str, str] | None:
        """Return the option that does not go with another one, and what was expected; None if all do."""
        low, high = self.limits.min_ttl_ms, self.limits.max_ttl_ms
        if low > high:
            return "--limit-min-ttl-ms", f"expected at most --limit-max-ttl-ms, {high}, got {low}"
        default = self.limits.default_ttl_ms
        if not low <= default <= high:
            bounds = f"--limit-min-ttl-ms to --limit-max-ttl-ms, {low} to {high}"
            return "--limit-default-ttl-ms", f"expected {bounds}, got {default}"
        waits, bound = self.durability_timeout_ms, self.store_timeout_ms
        if self.durability == "replica" and waits >= bound:
            expected = f"expected less than --store-timeout-ms, {bound}, got {waits}"
            return "--durability-timeout-ms", expected
        return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
