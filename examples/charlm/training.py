"""Training and judging: truncated BPTT over a session that lives on the server."""

from __future__ import annotations

import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Never, Self

import numpy as np
from tqdm import tqdm

from examples.charlm.layers import Embedding, SoftmaxHead
from examples.charlm.text import chunks, parallel_streams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    import timernn
    from examples.charlm.text import Corpus, Ids
    from examples.server_process import ServerProcess

MODEL = "charlm"
STREAMS = 32  # N
STEPS = 32  # T, the length of a chunk: how far back a gradient reaches
EMBEDDING_SIZE = 64  # D
HIDDEN_SIZE = 128  # H
CLIP_NORM = 5.0
CRASH_AT = 0.5  # of the budget
LAST_LR = 0.05  # of the first
EVALUATION_STEPS = 64  # T of a chunk when only the outputs are wanted


@dataclass
class Budget:
    """How long to train: until the time or the steps are used up, whichever comes first."""

    seconds: float
    steps: int | None = None
    _start: float = field(default_factory=time.monotonic)

    def spent(self, step: int) -> float:
        """Return the part that is used before this step, from 0 to 1."""
        by_time = (time.monotonic() - self._start) / self.seconds
        return min(1.0, max(by_time, step / self.steps if self.steps else 0.0))


@dataclass
class History:
    """What happened in a training.

    Attributes:
        losses: Cross-entropy in nats a character, one a step.
        seconds: How long the training took, the crash included.
        crash_step: Steps done when the server was killed.
        down_s: From the kill until the server was ready again.
        chunk_seq: The session's chunk number on the server: the chunks that were applied.
        versions: New versions of the weights on the server.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    crash_step: int = 0
    down_s: float = 0.0
    chunk_seq: int = 0
    versions: int = 0

    def around_crash(self, steps: int = 50) -> tuple[float, float]:
        """Return the mean loss of the last steps before the crash and of the first after it."""
        before = self.losses[max(0, self.crash_step - steps) : self.crash_step]
        after = self.losses[self.crash_step : self.crash_step + steps]
        return float(np.mean(before)), float(np.mean(after))


@dataclass
class ClientLayers:
    """The part of the language model that the server does not see."""

    embedding: Embedding
    head: SoftmaxHead

    @classmethod
    def draw(cls, alphabet_size: int, seed: int = 0) -> ClientLayers:
        """Draw both layers' first weights."""
        rng = np.random.default_rng(seed)
        embedding = Embedding(rng, alphabet_size, EMBEDDING_SIZE)
        return cls(embedding, SoftmaxHead(rng, HIDDEN_SIZE, alphabet_size))


class Crash:
    """Kills the server and starts it again, beside a training that goes on calling it.

    Leaving the `with` block waits until the server is back, and raises a ServerError if it is not.
    """

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._down_s: Future[float] | None = None

    @property
    def happened(self) -> bool:
        """Whether the server has been killed."""
        return self._down_s is not None

    def begin(self, step: int) -> None:
        """Kill the server now; return at once."""
        tqdm.write(f"  step {step}: kill -9 {self._server.pid}; the training goes on")
        self._down_s = self._thread.submit(self._kill_and_start)

    def down_s(self) -> float:
        """Return how many seconds the server was away."""
        return self._down_s.result() if self._down_s else 0.0

    def __enter__(self) -> Self:
        """Do nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the server is back."""
        self._thread.shutdown()
        self.down_s()

    def _kill_and_start(self) -> float:
        began = time.monotonic()
        self._server.kill_and_start()
        down_s = time.monotonic() - began
        tqdm.write(f"  the server is back after {down_s:.1f} s as process {self._server.pid}")
        return down_s


def train(
    client: timernn.Client,
    layers: ClientLayers,
    corpus: Corpus,
    budget: Budget,
    crash: Crash,
    lr: float,
) -> History:
    """Train the three layers together and crash the server half way.

    One step: the server runs the recurrent layer over the next T characters of N streams from the
    states where they were, the client computes the loss and its gradient, the server takes the
    gradient back through the layer and makes its optimizer's step. The gradient stops at the border
    of the chunk (truncated BPTT), the state does not.
    """
    history = History()
    first_version = client.get_model(MODEL).head.number
    began = time.monotonic()
    with client.session(MODEL, batch_size=STREAMS, train=True) as session, _bar() as bar:
        for step, (inputs, targets) in enumerate(_endless(corpus)):
            spent = budget.spent(step)
            if spent >= 1.0:
                break
            if spent >= CRASH_AT and not crash.happened:
                history.crash_step = step
                crash.begin(step)
            step_lr = lr * max(LAST_LR, 1.0 - spent)

            xs = layers.embedding.forward(inputs)  # (N, T) -> (N, T, D)
            hs = session.forward(xs)  # (N, T, D) -> (N, T, H), on the server
            loss, dhs = layers.head.learn(hs, targets, step_lr)
            dxs = session.backward(dhs)  # (N, T, H) -> (N, T, D), on the server
            session.update(lr=step_lr, clip_norm=CLIP_NORM)
            layers.embedding.learn(inputs, dxs, step_lr)

            history.losses.append(loss)
            _show(bar, spent, history.losses, time.monotonic() - began)
        history.seconds = time.monotonic() - began
        history.down_s = crash.down_s()
        # What the server knows, not what this client has counted.
        history.chunk_seq = session.get_info().chunk_seq
        history.versions = client.get_model(MODEL).head.number - first_version
    return history


def perplexity(client: timernn.Client, layers: ClientLayers, corpus: Corpus) -> float:
    """Return the perplexity on the held-out text: of how many characters is the next one drawn?

    The exponential of the mean cross-entropy. A model that knows nothing has that of the alphabet's
    size or worse, one that knows everything has 1.
    """
    inputs, targets = parallel_streams(corpus.held_out, STREAMS)
    pieces = list(chunks(inputs, targets, EVALUATION_STEPS))
    losses = []
    with client.session(MODEL, batch_size=STREAMS) as session:
        outputs = session.stream(layers.embedding.forward(piece) for piece, _ in pieces)
        for hs, (_, wanted) in zip(outputs, pieces, strict=True):
            losses.append(layers.head.loss(hs, wanted))
        session.close()
    return math.exp(np.mean(losses))


def _endless(corpus: Corpus) -> Iterator[tuple[Ids, Ids]]:
    """Yield the training text's chunks, over and over."""
    inputs, targets = parallel_streams(corpus.train, STREAMS)
    for _ in count():
        yield from chunks(inputs, targets, STEPS)


def _bar() -> tqdm[Never]:
    layout = "  {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {postfix}"
    seconds = 0.2 if sys.stderr.isatty() else 10.0  # a log needs no animation
    return tqdm(total=1.0, bar_format=layout, mininterval=seconds)


def _show(bar: tqdm[Never], spent: float, losses: list[float], seconds: float) -> None:
    recent = float(np.mean(losses[-50:]))
    bar.set_postfix_str(
        f"loss {recent:.3f}, perplexity {math.exp(recent):.2f}, {len(losses) / seconds:.1f} steps/s",
        refresh=False,
    )
    bar.update(spent - bar.n)
