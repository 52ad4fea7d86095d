"""Forecast tomorrow's weather, learned online: four sessions, one model, one update for all.

Run it with `python -m examples.weather`. It starts a server of its own, feeds it four years of
Seattle's daily weather as four stations that report side by side, and compares each day's forecast
with the next day and with the naive forecast "as today".
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import timernn
from examples.server_process import ServerError, ServerProcess
from examples.weather import forecast, report
from examples.weather.data import load_stations

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUT = Path(__file__).parents[1] / "output"


def run(output: Path) -> None:
    """Forecast and learn, then print how well."""
    stations = load_stations()
    with (
        tempfile.TemporaryDirectory(prefix="timernn-demo-", ignore_cleanup_errors=True) as folder,
        ServerProcess(Path(folder)) as server,
        timernn.connect(server.address) as client,
    ):
        print(f"A server with the embedded store serves on {server.address}, process {server.pid}.")
        client.create_model(
            forecast.MODEL,
            input_size=forecast.INPUT_SIZE,
            hidden_size=forecast.HIDDEN_SIZE,
            seed=0,
            optimizer=timernn.Adam(lr=forecast.LR),
        )
        print(f"Sessions: {', '.join(station.name for station in stations)}")
        forecasts = forecast.forecast_online(client, stations)
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "weather.png"
    report.draw(stations[-1], forecasts[-1], picture)
    print(report.table(report.errors(stations, forecasts)))
    print("  naive: tomorrow as today; mean: as all days so far; gain: against naive")
    print(f"\nForecast and truth: {picture}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code; whatever happens, the server is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.weather",
        description="Forecast a real weather series with several sessions of one model.",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the picture")
    options = parser.parse_args(arguments)
    # Asked to end, end as after Ctrl-C: with the server stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options.output)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except (ServerError, timernn.Error, OSError) as error:
        print(f"examples.weather: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
