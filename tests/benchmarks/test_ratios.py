"""Tests of ratios of pairs."""

import pytest

from benchmarks.load.rows import Bar, paired


def test_slow_minutes_of_both_cancel() -> None:
    """A pair's ratio does not depend on how slow the machine was meanwhile."""
    slow = [1.0, 5.0, 2.0, 9.0, 3.0, 1.0, 4.0]
    row = paired("", [1.1 * value for value in slow], slow)
    assert (row.ratio, row.low, row.high) == pytest.approx((1.1, 1.1, 1.1))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.02] * 7, "yes"),
        ([1.01, 1.02, 1.02, 1.04, 1.05, 1.06, 1.06], "within the noise"),
        ([1.1] * 7, "NO"),
    ],
)
def test_a_bar_is_missed_only_beyond_the_noise(ours: list[float], verdict: str) -> None:
    """A median beyond its bar counts as missed if its whole interval is beyond."""
    assert paired("", ours, [1.0] * 7, Bar(1.03, at_most=True)).verdict == verdict
