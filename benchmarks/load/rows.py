"""From samples to verdicts: medians, ratio, noise, and whether the bar holds."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Bar:
    """What a ratio must reach.

    Attributes:
        limit: The value.
        at_most: Whether it is an upper bound, as for latencies.
    """

    limit: float
    at_most: bool = False

    def holds(self, ratio: float) -> bool:
        """Return whether a ratio reaches it."""
        return ratio <= self.limit if self.at_most else ratio >= self.limit

    def __str__(self) -> str:
        """Write it as the tables do."""
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: The bench and who is compared.
        unit: Of ours and peer.
        ours: Median of our samples.
        peer: Median of the peer's samples.
        ratio: ours / peer.
        bar: What the ratio must reach; None where there is no bar.
        holds: Whether it does; None where there is no bar.
        bound: "at least" or "at most", how the bar is meant.
        noise: Half the range of the repetitions' ratios, as a share of the ratio.
    """

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    bar: float | None
    holds: bool | None
    bound: str
    noise: float

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def compare(
    name: str, unit: str, ours: Sequence[float], peer: Sequence[float], bar: Bar | None = None
) -> Row:
    """Compare interleaved samples; the k-th of both were taken one right after the other."""
    ratio = statistics.median(ours) / statistics.median(peer)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Row(
        name=name,
        unit=unit,
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ratio=ratio,
        bar=bar.limit if bar else None,
        holds=bar.holds(ratio) if bar else None,
        bound="at most" if bar and bar.at_most else "at least",
        noise=(max(ratios) - min(ratios)) / (2 * ratio),
    )


@dataclass(frozen=True)
class Ratio:
    """One comparison by the ratios of its pairs, with how sure it is.

    Attributes:
        name: What is compared.
        pairs: How many; the two of a pair were measured one right after the other.
        ours: Median of our samples.
        peer: Median of the peer's samples.
        ratio: Median of the pairs' ratios.
        low: Lower end of the 95 % interval of that median, by a bootstrap.
        high: Its upper end. Where the interval holds 1, the two cannot be distinguished.
        bar: What the ratio must reach; None where there is no bar.
    """

    name: str
    pairs: int
    ours: float
    peer: float
    ratio: float
    low: float
    high: float
    bar: Bar | None = None

    @property
    def verdict(self) -> str:
        """Say whether the bar holds; where the interval reaches to both sides, that nobody knows."""
        if self.bar is None:
            return ""
        if self.bar.holds(self.ratio):
            return "yes"
        is_reached = self.bar.holds(self.low) or self.bar.holds(self.high)
        return "within the noise" if is_reached else "NO"

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def paired(
    name: str, ours: Sequence[float], peer: Sequence[float], bar: Bar | None = None
) -> Ratio:
    """Compare pairs; the k-th of both were measured one right after the other."""
    ratios = np.divide(ours, peer)
    random = np.random.default_rng(0)
    drawn = np.median(random.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Ratio(
        name=name,
        pairs=len(ratios),
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        ratio=float(np.median(ratios)),
        low=float(low),
        high=float(high),
        bar=bar,
    )


def ratio_table(rows: Sequence[Ratio], ours: str, peer: str) -> str:
    """Render comparisons of pairs as a table; `ours` and `peer` name what is compared."""
    header = ("", "pairs", ours, peer, "ratio", "95 % of the median", "bar", "holds")
    return table(
        header,
        [
            (
                row.name,
                str(row.pairs),
                f"{row.ours:,.0f}",
                f"{row.peer:,.0f}",
                f"{row.ratio:.3f}",
                f"{row.low:.3f}-{row.high:.3f}",
                str(row.bar or ""),
                row.verdict,
            )
            for row in rows
        ],
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def row(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(header), row(rule), *(row(line) for line in lines)])


def rows_table(rows: Sequence[Row]) -> str:
    """Render comparisons as a table."""
    header = ("bench", "unit", "ours", "peer", "ratio", "noise", "bar", "holds")
    return table(header, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    bar = "" if row.bar is None else str(Bar(row.bar, at_most=row.bound == "at most"))
    verdict = {None: "", True: "yes", False: "NO"}[row.holds]
    return (
        row.name,
        row.unit,
        f"{row.ours:,.4g}" if row.ours < 1000 else f"{row.ours:,.0f}",
        f"{row.peer:,.4g}" if row.peer < 1000 else f"{row.peer:,.0f}",
        f"{row.ratio:.2f}",
        f"± {row.noise:.0%}",
        bar,
        verdict,
    )
