"""Every metric: its name, what it counts, its labels, and how the values of several workers make one.

The one place for this: the recorder may count nothing else, the text for Prometheus and the table in
docs/operations.md are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(Enum):
    """The kinds of Prometheus that are used."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Merge(Enum):
    """How one value is made of those of the workers; counters and histograms are added."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


# From 0.25 ms, because a chunk takes that; up to the default deadline of a call.
SECONDS: Final = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
)  # fmt: skip
COUNTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        name: As Prometheus shows it; a counter's ends in _total.
        kind: What it is.
        help: One sentence, with the unit.
        labels: Names of its labels. Their values come from small fixed sets, never from a client's text.
        buckets: Upper bounds of a histogram.
        merge: How a gauge of several workers becomes one.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = Merge.SUM


def _counter(name: str, explained: str, *labels: str) -> Family:
    return Family(name, Kind.COUNTER, explained, labels)


def _gauge(name: str, explained: str, *labels: str, merge: Merge = Merge.SUM) -> Family:
    return Family(name, Kind.GAUGE, explained, labels, merge=merge)


def _histogram(
    name: str, explained: str, *labels: str, buckets: tuple[float, ...] = SECONDS
) -> Family:
    return Family(name, Kind.HISTOGRAM, explained, labels, buckets)


_RPC: Final = ("grpc_type", "grpc_service", "grpc_method")

FAMILIES: Final = {
    family.name: family
    for family in (
        _counter("grpc_server_started_total", "RPCs that began; a Stream is one.", *_RPC),
        _counter("grpc_server_handled_total", "RPCs that ended, by status.", *_RPC, "grpc_code"),
        _histogram("grpc_server_handling_seconds", "Duration of RPCs, in seconds.", *_RPC),
        _counter(
            "timernn_operations_total",
            "Operations that ended: unary calls, and each operation of a Stream; the outcome is OK or the reason.",
            "operation",
            "outcome",
        ),
        _histogram("timernn_operation_seconds", "Duration of operations, in seconds.", "operation"),
        _counter("timernn_request_bytes_total", "Bytes of operations' requests.", "operation"),
        _counter("timernn_answer_bytes_total", "Bytes of operations' answers.", "operation"),
        _counter("timernn_refusals_total", "Operations that were refused or failed.", "reason"),
        _gauge("timernn_operations_in_flight", "Operations in work or waiting."),
        _gauge("timernn_request_bytes_in_flight", "Bytes of requests and answers in work or waiting."),
        _counter("timernn_chunks_applied_total", "Chunks that were committed."),
        _counter("timernn_chunks_replayed_total", "Chunks that were answered again, not applied again."),
        _counter("timernn_tape_bytes_total", "Bytes of tapes written for a later Backward."),
        _counter("timernn_contributions_total", "Gradients that were recorded for an Update."),
        _counter("timernn_contribution_bytes_total", "Bytes of those gradients."),
        _counter("timernn_steps_total", "Optimizer steps."),
        _counter("timernn_versions_published_total", "Versions of weights: steps, uploads, restores."),
        _counter("timernn_version_bytes_total", "Bytes of weights and moments written for them."),
        _histogram("timernn_batch_rows", "Rows of a joined forward pass.", buckets=COUNTS),
        _histogram("timernn_batch_chunks", "Chunks of a joined forward pass.", buckets=COUNTS),
        _histogram("timernn_batch_wait_seconds", "Time that a batch's first chunk waited, in seconds."),
        _histogram("timernn_batch_seconds", "Duration of joined forward passes, in seconds."),
        _counter("timernn_batch_work_total", "Multiply-adds of joined forward passes."),
        _histogram("timernn_store_round_trip_seconds", "Duration of round trips to the store, in seconds."),
        _counter("timernn_store_round_trips_total", "Round trips to the store, by their first command.", "command"),
        _counter("timernn_store_commands_total", "Commands sent to the store."),
        _counter("timernn_store_lost_round_trips_total", "Round trips without an answer."),
        _counter("timernn_store_sent_bytes_total", "Bytes sent to the store."),
        _counter("timernn_store_received_bytes_total", "Bytes of the store's answers."),
        _gauge("timernn_store_usable", "1 while the store can be used.", merge=Merge.MIN),
        _counter("timernn_cache_hits_total", "Lookups that found what they looked for.", "cache"),
        _counter("timernn_cache_misses_total", "Lookups that did not.", "cache"),
        _gauge("timernn_cache_bytes", "Bytes that a cache holds.", "cache"),
        _gauge("timernn_sessions", "Sessions listed in the store.", merge=Merge.MAX),
        _gauge("timernn_tenant_sessions", "Sessions listed in the store, by tenant.", "tenant", merge=Merge.MAX),
        _histogram("timernn_event_loop_lag_seconds", "How late the event loop wakes, in seconds."),
        _counter("timernn_logins_total", "Credentials that were presented: accepted, refused, missing, expired.", "result"),
        _gauge("timernn_certificate_days", "Days until the server's certificate expires.", merge=Merge.MIN),
        _gauge("timernn_file_errors", "1 while a file that is read again when it changes cannot be read.", "file", merge=Merge.MAX),
        _gauge("timernn_resident_memory_bytes", "Memory of the server's processes."),
        _counter("timernn_cpu_seconds_total", "Processor time of the server's processes, in seconds."),
        _gauge("timernn_workers", "Processes that serve."),
        _gauge("timernn_start_time_seconds", "When the server began to serve, seconds since 1970.", merge=Merge.MIN),
    )
}  # fmt: skip
