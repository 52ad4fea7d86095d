"""The data: Seattle's daily weather of four years, as four stations that report side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from vega_datasets import local_data

Floats = npt.NDArray[np.float32]

COLUMNS = ("precipitation", "temp_max", "temp_min", "wind")
NAMES = ("rain, log(1 + mm)", "highest °C", "lowest °C", "wind, m/s")
DAYS = 365

# Round numbers for what is usual, and by how much days differ: enough to bring all four columns to
# the same size, and nothing that would have to be known from the future.
USUAL = np.array([0.6, 16.0, 8.0, 3.0], np.float32)
SPREAD = np.array([0.9, 7.0, 5.0, 1.5], np.float32)


@dataclass(frozen=True)
class Station:
    """One year of daily weather.

    Attributes:
        name: Such as "seattle-2012".
        days: Scaled measurements, shape (365, 4), columns as in NAMES.
    """

    name: str
    days: Floats

    def inputs(self) -> Floats:
        """Return what the model sees each day: the weather and the season, shape (365, 6)."""
        angle = 2 * np.pi * np.arange(DAYS, dtype=np.float32) / DAYS
        season = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        return np.concatenate([self.days, season], axis=1)


def load_stations() -> list[Station]:
    """Read the table that vega_datasets ships and cut it into its years."""
    table = local_data.seattle_weather()
    values = table[list(COLUMNS)].to_numpy(np.float32)
    values[:, 0] = np.log1p(values[:, 0])  # rain: many dry days, few very wet ones
    scaled = (values - USUAL) / SPREAD
    years = table["date"].dt.year.to_numpy()
    return [Station(f"seattle-{year}", scaled[years == year][:DAYS]) for year in np.unique(years)]


def unscale(days: Floats) -> Floats:
    """Return scaled days, shape (..., 4), in the units of NAMES."""
    return days * SPREAD + USUAL
