"""What replicas say of themselves between two beats, and how it adds up."""

from __future__ import annotations

import pytest

from service.domain.ports import StepAnswer
from service.domain.recent_steps import MOST_MODELS, RecentSteps
from service.domain.types import ModelKey, Version
from service.metrics.figures import joined, percentile, window
from service.metrics.heartbeat import Heartbeat
from service.metrics.recorder import Recorder


class Kept:
    """A ReplicaStore that keeps the last beat."""

    def __init__(self) -> None:
        self.figures: dict[str, object] = {}

    async def beat(self, _replica_id: str, figures: dict[str, object], _secret: bytes) -> bytes:
        """Keep it; the secret is another replica's."""
        self.figures = figures
        return b"shared"


def forwarded(recorder: Recorder, count: int, duration_s: float = 0.002) -> None:
    """Let a recorder see so many Forwards, each in a batch by itself."""
    for _ in range(count):
        recorder.operation_ended(
            "forward",
            outcome="OK",
            code="OK",
            duration_s=duration_s,
            request_bytes=1,
            answer_bytes=1,
        )
        recorder.chunk_applied(tape_bytes=0)
        recorder.batch_computed(chunks=1, rows=2, work=1, wait_s=0, duration_s=0.001)


def test_a_window_holds_what_happened_since_the_last() -> None:
    """Not what was counted before."""
    recorder = Recorder({})
    forwarded(recorder, 5)
    before = recorder.snapshot()
    forwarded(recorder, 4)
    found = joined([window(recorder.snapshot(), before, 2.0)])
    assert found["chunks_per_s"] == 2.0
    assert found["duration_ms"]["forward"]["per_s"] == 2.0
    assert found["batch_chunks"]["mean"] == 1.0
    assert found["batch_rows"]["p99"] == 2.0


def test_refusals_are_counted_by_reason_where_there_were_some() -> None:
    """One that did not happen again is left out."""
    recorder = Recorder({})
    refuse = {"code": "ABORTED", "duration_s": 0.001, "request_bytes": 1, "answer_bytes": 0}
    recorder.operation_ended("forward", outcome="OLD", **refuse)  # type: ignore[arg-type]
    before = recorder.snapshot()
    recorder.operation_ended("forward", outcome="SEQ_GAP", **refuse)  # type: ignore[arg-type]
    found = joined([window(recorder.snapshot(), before, 2.0)])
    assert found["refusals_per_s"] == {"SEQ_GAP": 0.5}


def test_percentiles_are_of_all_replicas_calls() -> None:
    """Nine fast calls here and one slow one there: the 50th is fast, the 99th slow."""
    fast, slow = Recorder({}), Recorder({})
    forwarded(fast, 9, 0.0002)
    forwarded(slow, 1, 0.9)
    found = joined([window(each.snapshot(), {}, 1.0) for each in (fast, slow)])
    assert found["duration_ms"]["forward"]["p50"] < 0.25
    assert found["duration_ms"]["forward"]["p99"] > 500


def test_of_nothing_there_is_no_percentile() -> None:
    """Nothing ran, or there is no replica."""
    assert joined([])["duration_ms"]["forward"]["p50"] is None
    assert joined([window(Recorder({}).snapshot(), {}, 1.0)])["batch_chunks"]["mean"] is None


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1.0), (0.75, 3.0), (1.0, 5.0)])
def test_a_percentile_is_interpolated_in_its_bucket(share: float, expected: float) -> None:
    """As Prometheus' histogram_quantile does."""
    assert percentile([2, 2, 0], [1.0, 5.0], share) == pytest.approx(expected)


def test_beyond_the_last_bound_a_percentile_is_that_bound() -> None:
    """There is nothing better to say."""
    assert percentile([0, 0, 3], [1.0, 5.0], 0.5) == 5.0


async def test_a_beat_says_how_often_each_model_was_stepped() -> None:
    """Since the beat before, with the norm of the last step; the store's secret is taken over."""
    steps, kept = RecentSteps(clock=lambda: 7.0), Kept()
    heart = Heartbeat(kept, Recorder({}), steps, replica_id="r", about={"version": "1"})  # type: ignore[arg-type]
    key, answer = (
        ModelKey("acme", "m"),
        StepAnswer(Version(2), 0.5, clipped=False, contribution_count=1),
    )
    steps.note(key, answer)
    steps.note(key, answer)
    await heart.beat()
    assert kept.figures["models"] == [["acme", "m", 2, 0.5, 7000]]
    await heart.beat()
    assert kept.figures["models"] == [["acme", "m", 0, 0.5, 7000]]
    assert kept.figures["version"] == "1"
    assert heart.secret == b"shared"


def test_only_so_many_models_are_remembered() -> None:
    """The one that was stepped longest ago goes first."""
    steps = RecentSteps()
    answer = StepAnswer(Version(2), 0.5, clipped=False, contribution_count=1)
    for number in range(MOST_MODELS + 1):
        steps.note(ModelKey("acme", f"m{number}"), answer)
        steps.note(ModelKey("acme", "kept"), answer)
    found = steps.all()
    assert len(found) == MOST_MODELS
    assert found[ModelKey("acme", "kept")].steps == MOST_MODELS + 1
    assert ModelKey("acme", "m1") not in found
