"""A training program that may be killed at any moment and started again.

Run it with `python -m examples.restart localhost:50051` beside `timernn serve`; kill it, run it again.
The weights that it ends with are those of a run to which nothing happens, digest for digest.

It keeps no file. A step makes one version of the weights, so the number of the head says how many
steps are made. The step in which it was killed is repeated with the same data and the same chunk number:
what had been applied is answered again, what had not is applied now.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

import timernn

if TYPE_CHECKING:
    import numpy.typing as npt

MODEL = "restart"
N, T, D, H = 8, 20, 3, 16


def batch(step: int) -> npt.NDArray[np.float64]:
    """Return the inputs of a step, shape (N, T, D): the same each time it is asked for."""
    return np.random.default_rng(step).normal(size=(N, T, D))


def gradient(hs: npt.NDArray[np.float32], xs: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the gradient of the loss, (N, T, H): D units are to say what came one step before."""
    dhs = np.zeros_like(hs)
    dhs[:, 1:, :D] = hs[:, 1:, :D] - np.tanh(xs[:, :-1])
    return dhs


def train(client: timernn.Client, model: str, steps: int) -> timernn.Version:
    """Make all steps, or those that are left, and return the version of the weights."""
    adam = timernn.Adam(lr=1e-2)
    client.create_model(model, input_size=D, hidden_size=H, optimizer=adam, exist_ok=True)
    with client.session(model, f"{model}-trainer", batch_size=N, train=True) as session:
        with suppress(timernn.NoGradients):  # unless killed right before an update, nothing waits
            session.update(clip_norm=1.0, take_waiting=True)
        for step in range(client.get_model(model).head.number - 1, steps):
            xs = batch(step)
            hs = session.forward(xs, chunk_seq=step + 1)
            session.backward(gradient(hs, xs))
            session.update(clip_norm=1.0)
    return client.get_model(model).head


def main() -> None:
    """Train against the server that is named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("address", help="of a server, such as localhost:50051")
    parser.add_argument("--model", default=MODEL, help="its name (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="in all (default: %(default)s)")
    arguments = parser.parse_args()
    with timernn.connect(arguments.address) as client:
        version = train(client, arguments.model, arguments.steps)
    print(f"version {version}")


if __name__ == "__main__":
    main()
