"""How good the forecasts were: a table of errors and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from examples.weather.data import NAMES, unscale

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from examples.weather.data import Floats, Station


@dataclass(frozen=True)
class Errors:
    """Root mean squared errors of one-day forecasts, one number a measurement, shape (4,).

    Attributes:
        model: Of the model's forecast.
        naive: Of "tomorrow as today".
        mean: Of "tomorrow as the mean of all days so far".
    """

    model: Floats
    naive: Floats
    mean: Floats


def errors(stations: Sequence[Station], forecasts: Floats) -> Errors:
    """Compare the forecasts with the truth and with two simple ones.

    Args:
        stations: N stations.
        forecasts: Scaled, of the days 1, 2, … of each, shape (N, days, 4).
    """
    count = forecasts.shape[1]
    days = unscale(np.stack([station.days for station in stations]))
    truth, today = days[:, 1 : count + 1], days[:, :count]
    counts = np.arange(1, count + 1, dtype=np.float32)[:, None]
    so_far = (np.cumsum(today, axis=1) / counts).astype(np.float32)
    return Errors(*(_rms(guess - truth) for guess in (unscale(forecasts), today, so_far)))


def table(found: Errors) -> str:
    """Return the errors as a table."""
    lines = [f"  {'error of a one-day forecast':<28}{'model':>8}{'naive':>8}{'mean':>8}{'gain':>8}"]
    for i, name in enumerate(NAMES):
        gain = 1 - found.model[i] / found.naive[i]
        lines.append(
            f"  {name:<28}{found.model[i]:>8.2f}{found.naive[i]:>8.2f}{found.mean[i]:>8.2f}{gain:>8.0%}"
        )
    return "\n".join(lines)


def draw(station: Station, forecasts: Floats, path: Path) -> None:
    """Write a picture of one station's forecasts against what came, as a PNG.

    Args:
        station: Which.
        forecasts: Scaled, of its days 1, 2, …, shape (days, 4).
        path: Where to; its folder exists.
    """
    guess = unscale(forecasts)
    truth = unscale(station.days)[1 : len(guess) + 1]
    days = np.arange(1, len(guess) + 1)
    figure, panels = plt.subplots(4, 1, figsize=(9, 8), dpi=100, sharex=True, layout="constrained")
    for i, axes in enumerate(panels):
        axes.plot(days, truth[:, i], color="#8a8a8a", linewidth=0.9, label="what came")
        axes.plot(
            days, guess[:, i], color="#c0392b", linewidth=0.9, label="forecast the day before"
        )
        axes.set_ylabel(NAMES[i])
        axes.grid(alpha=0.25)
    panels[0].set_ylim(top=1.3 * truth[:, 0].max())
    panels[0].legend(frameon=False, loc="upper right", ncols=2)
    panels[0].set_title(f"{station.name}: one-day forecasts, learned while they were made")
    panels[-1].set_xlabel("day of the year")
    figure.savefig(path)
    plt.close(figure)


def _rms(error: Floats) -> Floats:
    result: Floats = np.sqrt(np.square(error).mean(axis=(0, 1)))
    return result
