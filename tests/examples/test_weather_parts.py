"""The client's side of the forecast, without a server."""

from pathlib import Path

import numpy as np
import pytest

from examples.weather.data import Station, load_stations, unscale
from examples.weather.forecast import ChangeHead
from examples.weather.report import draw, errors, table


@pytest.fixture(scope="module")
def stations() -> list[Station]:
    """One station for each of the four years."""
    return load_stations()


def test_there_is_a_station_for_each_year(stations: list[Station]) -> None:
    """Four whole years of four measurements."""
    assert [station.name for station in stations] == [f"seattle-{y}" for y in range(2012, 2016)]
    assert {station.days.shape for station in stations} == {(365, 4)}


def test_unscale_gives_the_measured_values(stations: list[Station]) -> None:
    """The first day of 2012 was dry, between 5.0 and 12.8 °C, with 4.7 m/s of wind."""
    np.testing.assert_allclose(unscale(stations[0].days[0]), [0.0, 12.8, 5.0, 4.7], atol=1e-5)


def test_the_first_forecast_is_the_naive_one() -> None:
    """An untaught head expects no change."""
    assert not ChangeHead().forward(np.ones((3, 32), np.float32)).any()


def test_the_head_learns_a_constant_change() -> None:
    """A change that always comes is expected after some steps."""
    head = ChangeHead()
    hs = np.ones((2, 2, 32), np.float32)
    truth = np.full((2, 2, 4), 0.5, np.float32)
    for _ in range(100):
        head.learn(hs, head.forward(hs) - truth)
    np.testing.assert_allclose(head.forward(hs), truth, atol=0.05)


def test_today_as_the_forecast_has_the_naive_error(stations: list[Station]) -> None:
    """The table compares like with like."""
    today = np.stack([station.days[:-1] for station in stations])
    found = errors(stations, today)
    np.testing.assert_allclose(found.model, found.naive)
    assert "0%" in table(found)


def test_forecasts_are_drawn_against_the_truth(stations: list[Station], tmp_path: Path) -> None:
    """A picture is written."""
    picture = tmp_path / "weather.png"
    draw(stations[0], stations[0].days[:-1], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
