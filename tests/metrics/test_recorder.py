"""The counts of a process, and what several processes make together, as Prometheus reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.metrics.exposition import as_text, merged
from service.metrics.families import FAMILIES, SECONDS, Kind
from service.metrics.recorder import Recorder
from service.telemetry import CacheCounts

if TYPE_CHECKING:
    from service.metrics.recorder import Snapshot

STREAM = "/timernn.v1.TimeRnnService/Stream"


@pytest.fixture
def recorder() -> Recorder:
    """Return one that knows one method."""
    return Recorder({STREAM: "bidi_stream"})


def samples(snapshot: Snapshot) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return what Prometheus reads: by name and labels the value."""
    text, _ = as_text(snapshot)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_an_operation_counts_by_kind_and_outcome(recorder: Recorder) -> None:
    """With its bytes and its duration; what was not OK is a refusal too."""
    for outcome in ("OK", "OK", "SEQ_GAP"):
        recorder.operation_ended(
            "forward",
            outcome=outcome,
            code="OK",
            duration_s=0.0004,
            request_bytes=100,
            answer_bytes=7,
        )
    found = samples(recorder.snapshot())
    forward = ("operation", "forward")
    assert found["timernn_operations_total", (forward, ("outcome", "OK"))] == 2
    assert found["timernn_operations_total", (forward, ("outcome", "SEQ_GAP"))] == 1
    assert found["timernn_refusals_total", (("reason", "SEQ_GAP"),)] == 1
    assert found["timernn_request_bytes_total", (forward,)] == 300
    assert found["timernn_answer_bytes_total", (forward,)] == 21
    assert found["timernn_operation_seconds_bucket", (("le", "0.00025"), forward)] == 0
    assert found["timernn_operation_seconds_bucket", (("le", "0.0005"), forward)] == 3
    assert found["timernn_operation_seconds_count", (forward,)] == 3
    assert found["timernn_operation_seconds_sum", (forward,)] == pytest.approx(0.0012)


def test_an_rpc_has_the_names_that_dashboards_know(recorder: Recorder) -> None:
    """Those of go-grpc-middleware, with codes in camel case."""
    recorder.rpc_started(STREAM, tuple)
    recorder.rpc_ended(STREAM, code="DEADLINE_EXCEEDED", duration_s=3.0)
    found = samples(recorder.snapshot())
    rpc = (
        ("grpc_method", "Stream"),
        ("grpc_service", "timernn.v1.TimeRnnService"),
        ("grpc_type", "bidi_stream"),
    )
    assert found["grpc_server_started_total", rpc] == 1
    assert found["grpc_server_handled_total", (("grpc_code", "DeadlineExceeded"), *rpc)] == 1
    assert found["grpc_server_handling_seconds_count", rpc] == 1


def test_training_is_counted_in_steps_and_bytes(recorder: Recorder) -> None:
    """A version that took no contribution is an upload, not a step."""
    recorder.contribution_recorded(gradient_bytes=50)
    recorder.version_published(contributions=1, version_bytes=200)
    recorder.version_published(contributions=0, version_bytes=100)
    found = samples(recorder.snapshot())
    assert found["timernn_steps_total", ()] == 1
    assert found["timernn_versions_published_total", ()] == 2
    assert found["timernn_version_bytes_total", ()] == 300
    assert found["timernn_contribution_bytes_total", ()] == 50


def test_a_cache_is_read_when_it_is_asked_for(recorder: Recorder) -> None:
    """Its own counts are shown, as they are then."""
    counts = CacheCounts()
    recorder.cache_added("tapes", counts)
    counts.hits, counts.misses, counts.size_bytes = 5, 2, 1000
    found = samples(recorder.snapshot())
    tapes = (("cache", "tapes"),)
    assert found["timernn_cache_hits_total", tapes] == 5
    assert found["timernn_cache_misses_total", tapes] == 2
    assert found["timernn_cache_bytes", tapes] == 1000


def test_batches_and_round_trips_are_measured(recorder: Recorder) -> None:
    """Rows and chunks, wait and duration; bytes each way, and what was lost."""
    recorder.batch_computed(chunks=3, rows=12, work=1000, wait_s=0.001, duration_s=0.002)
    recorder.round_trip_ended(
        "commit_chunks", commands=3, duration_s=0.001, sent_bytes=90, received_bytes=9, is_lost=True
    )
    found = samples(recorder.snapshot())
    assert found["timernn_batch_rows_bucket", (("le", "8.0"),)] == 0
    assert found["timernn_batch_rows_bucket", (("le", "16.0"),)] == 1
    assert found["timernn_batch_chunks_sum", ()] == 3
    assert found["timernn_batch_work_total", ()] == 1000
    trips = found["timernn_store_round_trips_total", (("command", "commit_chunks"),)]
    assert trips == found["timernn_store_lost_round_trips_total", ()] == 1
    assert found["timernn_store_commands_total", ()] == 3
    assert found["timernn_store_sent_bytes_total", ()] == 90


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 100), max_size=50))
def test_workers_add_up_as_one_process_would_have_counted(
    first: list[float], second: list[float]
) -> None:
    """Counters and histograms: the sum of the parts is the whole, bucket by bucket."""
    parts, whole = [Recorder({}), Recorder({})], Recorder({})
    for part, values in zip(parts, (first, second), strict=True):
        for value in values:
            for one in (part, whole):
                one.observe("timernn_event_loop_lag_seconds", value)
                one.add("timernn_logins_total", "accepted", by=2)
    joined = merged([part.snapshot() for part in parts])
    alone = whole.snapshot()
    for name in ("timernn_event_loop_lag_seconds", "timernn_logins_total"):
        assert [labels for labels, _ in joined.get(name, [])] == [
            labels for labels, _ in alone.get(name, [])
        ]
        for (_, got), (_, expected) in zip(joined.get(name, []), alone.get(name, []), strict=True):
            assert got == pytest.approx(expected)


def test_gauges_of_workers_join_as_they_mean(recorder: Recorder) -> None:
    """Memory is added; of certificates the first to end counts; sessions are the store's."""
    other = Recorder({})
    for one, days in ((recorder, 30), (other, 20)):
        one.set("timernn_certificate_days", days)
        one.set("timernn_sessions", 7)
    found = samples(merged([recorder.snapshot(), other.snapshot()]))
    assert found["timernn_certificate_days", ()] == 20
    assert found["timernn_sessions", ()] == 7
    assert found["timernn_workers", ()] == 2


def test_a_value_on_a_bound_is_in_its_bucket(recorder: Recorder) -> None:
    """Bounds are inclusive, as Prometheus has them."""
    for bound in SECONDS:
        recorder.observe("timernn_event_loop_lag_seconds", bound)
    found = samples(recorder.snapshot())
    in_first = found["timernn_event_loop_lag_seconds_bucket", (("le", repr(SECONDS[0])),)]
    assert in_first == 1


def test_every_family_is_explained_in_a_sentence() -> None:
    """Its help ends in a full stop, a counter's name in _total, a time in _seconds."""
    for family in FAMILIES.values():
        assert family.help.endswith("."), family.name
        assert family.name.endswith("_total") is (family.kind is Kind.COUNTER), family.name
        assert bool(family.buckets) is (family.kind is Kind.HISTOGRAM), family.name
