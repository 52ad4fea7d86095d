"""Training steps: the service over one stream, the engine in process, torch in process.

One step is forward, backward with the gradient of the inputs, and one step of plain gradient descent;
the hidden state goes from step to step (truncated back-propagation). The gradient of the outputs is fixed.
Run as ``python -m benchmarks.load.training --trainer engine``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from benchmarks.load.loops import Tally
from benchmarks.load.orders import obey
from benchmarks.load.workload import Sizes, make_weights

if TYPE_CHECKING:
    from benchmarks.load.workload import Array

ROWS = 32
SIZES = Sizes(steps=35, inputs=100, hidden=100)
# Small: the same gradient thousands of times over must not saturate the network.
LEARNING_RATE = 1e-7


class Trainer(ABC):
    """Makes training steps.

    Attributes:
        xs: Inputs of each step, shape (N, T, D), float32.
        dhs: Gradient of the loss with respect to hs, shape (N, T, H), float32.
    """

    def __init__(self) -> None:
        """Draw inputs and gradient."""
        rng = np.random.default_rng(1)
        self.xs: Array = rng.standard_normal((ROWS, SIZES.steps, SIZES.inputs)).astype(np.float32)
        self.dhs: Array = rng.standard_normal((ROWS, SIZES.steps, SIZES.hidden)).astype(np.float32)

    async def start(self) -> None:  # noqa: B027 - most have nothing to await
        """Make ready what has to be awaited."""

    @abstractmethod
    async def step(self, *, with_dxs: bool) -> None:
        """Make one step.

        Args:
            with_dxs: Whether the gradient of the inputs is wanted, as below another layer.
        """

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make steps for a while.

        Args:
            order: seconds, warmup_s, with_dxs.

        Returns:
            rate in steps/s, p50_us, p99_us, messages.
        """
        tally = Tally.begin(order["warmup_s"], order["seconds"])
        going = True
        while going:
            sent = time.perf_counter()
            await self.step(with_dxs=order["with_dxs"])
            going = tally.count(sent)
        return dict(tally.summary())


class EngineTrainer(Trainer):
    """This project's engine in process."""

    def __init__(self) -> None:
        """Load the weights."""
        import rnn_engine  # noqa: PLC0415 - only this process needs it

        super().__init__()
        self._engine = rnn_engine
        self._optimizer = rnn_engine.SGD(lr=LEARNING_RATE)
        self._params = rnn_engine.Params(**make_weights(SIZES))
        self._moments = rnn_engine.init_moments(self._optimizer, self._params)
        self._h: Array = np.zeros((ROWS, SIZES.hidden), np.float32)

    @override
    async def step(self, *, with_dxs: bool) -> None:
        # The engine always computes dxs.
        tape = self._engine.rnn_forward(self._params, self.xs, self._h)
        back = self._engine.rnn_backward(self._params, tape, self.dhs)
        self._params, self._moments = self._engine.apply_update(
            self._optimizer, self._params, back.grads, self._moments
        )
        self._h = np.ascontiguousarray(tape.hs[:, -1], np.float32)


class TorchTrainer(Trainer):
    """torch.nn.RNN and torch.optim.SGD in process, one thread."""

    def __init__(self) -> None:
        """Load the weights."""
        import torch  # noqa: PLC0415 - only this process needs it

        super().__init__()
        torch.set_num_threads(1)
        self._network = torch.nn.RNN(SIZES.inputs, SIZES.hidden, batch_first=True)
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=LEARNING_RATE)
        self._xs = torch.from_numpy(self.xs)
        self._dhs = torch.from_numpy(self.dhs)
        self._h = torch.zeros(1, ROWS, SIZES.hidden)

    @override
    async def step(self, *, with_dxs: bool) -> None:
        self._xs.requires_grad_(with_dxs)
        self._xs.grad = None
        self._optimizer.zero_grad()
        hs, h = self._network(self._xs, self._h)
        hs.backward(self._dhs)
        self._optimizer.step()
        self._h = h.detach()


class ServiceTrainer(Trainer):
    """The service: Forward, then Backward with an inline update, over one stream."""

    def __init__(self, target: str) -> None:
        """Open the channel.

        Args:
            target: Address of the server.
        """
        from benchmarks.load.remote_training import RemoteSession  # noqa: PLC0415

        super().__init__()
        self._session = RemoteSession(target, SIZES, ROWS, LEARNING_RATE)

    @override
    async def start(self) -> None:
        await self._session.open(f"train-{os.getpid()}")

    @override
    async def step(self, *, with_dxs: bool) -> None:
        await self._session.forward(self.xs)
        await self._session.backward_and_update(self.dhs, with_dxs=with_dxs)


async def _run(trainer: Trainer) -> None:
    await trainer.start()
    await obey(type(trainer).__name__, trainer.measure)


def main() -> None:
    """Obey orders until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainer", required=True, choices=("engine", "torch", "timernn"))
    parser.add_argument("--target", help="address of the server, for timernn")
    options = parser.parse_args()
    if options.trainer == "timernn":
        asyncio.run(_train_remotely(options.target))
    else:
        asyncio.run(_run({"engine": EngineTrainer, "torch": TorchTrainer}[options.trainer]()))


async def _train_remotely(target: str) -> None:
    # Here, because a channel belongs to the event loop in which it is made.
    await _run(ServiceTrainer(target))


if __name__ == "__main__":
    main()
