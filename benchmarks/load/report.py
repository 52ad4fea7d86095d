"""The output of a run: the tables, the JSON file, the charts."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import write_document
from benchmarks.load.lab import Samples
from benchmarks.load.rows import Row, table


def samples_table(samples: Sequence[Samples]) -> str:
    """Lay out what each server did, as medians of its repetitions."""
    header = ("scenario", "server", "chunks/s", "p50 µs", "p99 µs", "noise")
    return table(header, [_sample_cells(one) for one in samples])


def _sample_cells(samples: Samples) -> tuple[str, ...]:
    rates = samples.values("rate")
    rate = statistics.median(rates)
    percentiles = ("", "")
    if "p50_us" in samples.results[0]:
        p50, p99 = (statistics.median(samples.values(key)) for key in ("p50_us", "p99_us"))
        percentiles = (f"{p50:,.0f}", f"{p99:,.0f}")
    noise = (max(rates) - min(rates)) / (2 * rate)
    return (samples.scenario, samples.server, f"{rate:,.0f}", *percentiles, f"± {noise:.0%}")


def write_json(
    path: Path,
    rows: Sequence[Row],
    samples: Sequence[Samples],
    *,
    machine: dict[str, Any],
    command: str,
    skipped: Sequence[str],
) -> None:
    """Write the results beside the machine and versions they hold for."""
    write_document(
        path,
        machine=machine,
        command=command,
        results=[row.as_json() for row in rows],
        measurements=[
            {"scenario": one.scenario, "server": one.server, "repetitions": one.results}
            for one in samples
        ],
        skipped=list(skipped),
    )


def draw_charts(rows: Sequence[Row], samples: Sequence[Samples], folder: Path) -> list[Path]:
    """Draw the rates of all servers, and the ratios with their bars.

    Returns:
        The PNG files.
    """
    import matplotlib as mpl  # noqa: PLC0415 - a second of import that only charts need

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _draw_rates(samples, folder / "service-rates.png"),
        _draw_ratios(rows, folder / "service-ratios.png"),
    ]


def _draw_rates(samples: Sequence[Samples], path: Path) -> Path:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    # Where a peer that serves chunks took part: other benches have other units.
    shared = {one.scenario for one in samples if one.server in {"echo", "afternoon"}}
    shown = [one for one in samples if one.scenario in shared and one.server != "redis"]
    if not shown:
        shown = list(samples)
    scenarios = list(dict.fromkeys(one.scenario for one in shown))
    servers = list(dict.fromkeys(one.server for one in shown))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.62 * len(scenarios)), layout="constrained")
    height = 0.8 / len(servers)
    for number, server in enumerate(servers):
        own = [one for one in shown if one.server == server]
        places = [scenarios.index(one.scenario) + number * height - 0.4 for one in own]
        rates = [statistics.median(one.values("rate")) for one in own]
        bars = axes.barh(places, rates, height, align="edge", label=server)
        axes.bar_label(bars, [f" {rate:,.0f}" for rate in rates], fontsize=7)
    axes.set_yticks(range(len(scenarios)), scenarios)
    axes.invert_yaxis()
    axes.set_xlabel("chunks/s, more is better")
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_ratios(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.34 * max(1, len(rows))), layout="constrained")
    colours = {True: "tab:green", False: "tab:red", None: "tab:gray"}
    places = range(len(rows))
    axes.barh(places, [row.ratio for row in rows], color=[colours[row.holds] for row in rows])
    for place, row in enumerate(rows):
        axes.text(max(row.ratio, row.bar or 0), place, f" {row.ratio:.2f}", va="center", fontsize=7)
        if row.bar is not None:
            axes.plot([row.bar, row.bar], [place - 0.45, place + 0.45], color="black")
    axes.set_yticks(places, [row.name for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ours / peer; the black line is the bar")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
