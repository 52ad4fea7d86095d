"""Forecasting and learning at once: the error of each forecast is the next lesson."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from examples.adam import Adam
from examples.weather.data import COLUMNS, DAYS

if TYPE_CHECKING:
    import timernn
    from examples.weather.data import Floats, Station

MODEL = "weather"
INPUT_SIZE = 6  # D: four measurements and the season as two numbers
HIDDEN_SIZE = 32  # H
STEPS = 2  # T: days of a chunk; the model learns every second day
LR = 3e-3
CLIP_NORM = 1.0


class ChangeHead:
    """Reads the change from today to tomorrow off the hidden state: an affine map, H to 4.

    It starts at zero, so the first forecast is the naive one, "tomorrow as today", and everything
    learned is an improvement on that.
    """

    def __init__(self) -> None:
        self.W = np.zeros((HIDDEN_SIZE, len(COLUMNS)), np.float32)
        self.b = np.zeros(len(COLUMNS), np.float32)
        self._optimizer = Adam([self.W, self.b])

    def forward(self, hs: Floats) -> Floats:
        """Map hidden states (T, H) to expected changes (T, 4)."""
        return hs @ self.W + self.b

    def learn(self, hs: Floats, errors: Floats) -> Floats:
        """Make a step for the mean squared error and return its gradient for hs.

        Args:
            hs: Hidden states of all sessions, shape (N, T, H).
            errors: Forecast minus truth, shape (N, T, 4).

        Returns:
            dhs of shape (N, T, H).
        """
        derrors = 2 * errors / (errors.shape[0] * errors.shape[1])
        dhs: Floats = derrors @ self.W.T
        self._optimizer.update(
            [np.einsum("nth,ntc->hc", hs, derrors), derrors.sum(axis=(0, 1))], LR
        )
        return dhs


def forecast_online(client: timernn.Client, stations: list[Station]) -> Floats:
    """Forecast each next day of each station, learning all the while.

    Every station is a session of its own, with its own hidden state on the server; all of them share
    one model. After each chunk every session's gradient waits on the server, and one update takes
    them together.

    Args:
        client: The connection.
        stations: N stations.

    Returns:
        Forecasts of the days 1, 2, … of each station, made before those days were seen, scaled,
        shape (N, days, 4).
    """
    head = ChangeHead()
    inputs = [station.inputs() for station in stations]
    forecasts = []
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(client.session(MODEL, session_id=station.name, train=True))
            for station in stations
        ]
        days = range(0, DAYS - STEPS, STEPS)
        for day in tqdm(days, desc="  learning", unit=" chunks", mininterval=0.2):
            span = slice(day, day + STEPS)
            hs = np.concatenate(
                [s.forward(x[None, span]) for s, x in zip(sessions, inputs, strict=True)]
            )
            today = np.stack([station.days[span] for station in stations])
            forecast = today + head.forward(hs)
            forecasts.append(forecast)

            tomorrow = np.stack([station.days[day + 1 : day + 1 + STEPS] for station in stations])
            dhs = head.learn(hs, forecast - tomorrow)
            for session, gradient in zip(sessions, dhs, strict=True):
                session.backward(gradient[None])
            client.update(MODEL, sessions=sessions, clip_norm=CLIP_NORM)
        for session in sessions:
            session.close()
    return np.concatenate(forecasts, axis=1)
