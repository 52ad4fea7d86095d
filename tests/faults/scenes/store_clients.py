"""Clients of the library that stream or train, and know what every answer has to be."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import timernn
from rnn_engine import TimeRNN
from scenes.wire import is_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from instruments.report import Proof

    Array = NDArray[Any]

N, T, D, H = 1, 2, 3, 4
# A failover breaks many calls at once: the budget for retries is not what is tested here.
PATIENT = timernn.RetryPolicy(
    initial_backoff_s=0.02, max_backoff_s=0.2, budget=10_000, budget_per_s=1_000
)


def connect(addresses: Sequence[str], **options: Any) -> timernn.Client:
    """Connect with patience for a busy machine."""
    patient: dict[str, Any] = {"timeout": 60, "connect_timeout": 60, "retry": PATIENT}
    return timernn.connect(list(addresses), **(patient | options))


def create_model(client: timernn.Client, model_id: str, seed: int = 1) -> None:
    """Create a small model with Adam."""
    client.create_model(
        model_id, input_size=D, hidden_size=H, seed=seed, optimizer=timernn.Adam(lr=0.05)
    )


def draw(rng: np.random.Generator, count: int) -> list[Array]:
    """Draw chunks of inputs (N, T, D)."""
    return [rng.standard_normal((N, T, D)).astype(np.float32) for _ in range(count)]


class Streamer:
    """One session with the layer that it must equal; its client keeps a log, or next to none.

    Attributes:
        done: Chunks that were answered.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        model_id: str,
        session_id: str,
        ttl_s: float | None = None,
        **options: Any,
    ) -> None:
        """Connect and open the session."""
        self.client = connect(addresses, **options)
        self.session = self.client.session(model_id, session_id, batch_size=N, ttl=ttl_s)
        weights = self.client.get_weights(model_id)
        self.local = TimeRNN(weights.Wx, weights.Wh, weights.b, stateful=True)
        self.done = 0

    @property
    def h(self) -> Array:
        """A copy of the layer's state (N, H)."""
        assert self.local.h is not None, "nothing was applied yet"
        return self.local.h.copy()

    def forward(self, xs: Array, proof: Proof) -> None:
        """Apply one chunk and compare."""
        self.check(self.session.forward(xs), xs, proof)

    def check(self, hs: Array, xs: Array, proof: Proof) -> None:
        """Compare an answer with the layer's."""
        self.done += 1
        text = f"chunk {self.done} of {self.session.session_id} is wrong"
        proof.require(is_close(hs, self.local.forward(xs)), text)

    def finish(self, proof: Proof) -> None:
        """Compare where the session stands."""
        state = self.session.state
        proof.require(is_close(state, self.h), f"h of {self.session.session_id} is wrong")
        stands = self.session.get_info().chunk_seq
        proof.require(stands == self.done, f"{stands} chunks stand, not {self.done}")

    def close(self) -> None:
        """Disconnect."""
        self.client.close()

    def __enter__(self) -> Self:
        """Give the open session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect."""
        self.close()


def measure_steady(
    proof: Proof, addresses: Sequence[str], model_id: str, *, sessions: int = 6, chunks: int = 40
) -> None:
    """Stream some sessions side by side, check every answer, and note the rate."""
    rng = np.random.default_rng(proof.seed)
    data = [draw(rng, chunks) for _ in range(sessions)]
    with ExitStack() as stack:
        streamers = [
            stack.enter_context(
                Streamer(addresses, model_id, f"{model_id}-steady-{proof.seed}-{k}")
            )
            for k in range(sessions)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(sessions))

        def stream(number: int) -> None:
            streamer = streamers[number]
            outputs = streamer.session.stream(data[number])
            for hs, xs in zip(outputs, data[number], strict=True):
                streamer.check(hs, xs, proof)

        started = time.monotonic()
        list(pool.map(stream, range(sessions)))
        proof.steady(sessions * chunks, time.monotonic() - started)
        for streamer in streamers:
            streamer.session.close()


POINTS = ("backward", "update", "forward")
"""What comes next where a training run is hit: between Forward and Backward, and so on."""


class Trainer:
    """A training run of fixed data whose end has one right digest."""

    def __init__(self, client: timernn.Client, model_id: str) -> None:
        """Create the model and open the session."""
        create_model(client, model_id)
        self.client, self.model_id = client, model_id
        self.session = client.session(model_id, f"{model_id}-s", batch_size=N, train=True)
        self.outputs: list[Array] = []
        self.calls = 0

    def run(self, data: Iterable[Array], between: Callable[[int, str], None]) -> timernn.Version:
        """Make a step with each chunk; `between` gets the name of the next call."""
        for number, xs in enumerate(data):
            between(number, "forward")
            hs = self.session.forward(xs)
            self.outputs.append(hs)
            between(number, "backward")
            self.session.backward(hs - 0.1)
            between(number, "update")
            version = self.session.update(clip_norm=1.0)
            self.calls += 3
        return version

    def check(self, version: timernn.Version, wanted: Ending, proof: Proof) -> None:
        """Compare with the run that nothing happened to: weights, moments and every output."""
        name = self.model_id
        proof.require(version == wanted.version, f"{name}: {version}, not {wanted.version}")
        stored = self.client.get_weights(name, include_moments=True)
        # The digest is that of weights and moments; read back, they are what it names.
        proof.require(stored.version == wanted.version, f"{name}: head {stored.version}")
        for key, moment in wanted.moments.items():
            proof.require(np.array_equal(stored.moments[key], moment), f"{name}: {key} differs")
        for mine, theirs in zip(self.outputs, wanted.outputs, strict=True):
            proof.require(np.array_equal(mine, theirs), f"{name}: an output differs")
        proof.checked(self.calls - len(self.outputs))  # each is in the digest


class Ending:
    """How a run ends to which nothing happens."""

    def __init__(self, client: timernn.Client, model_id: str, data: Sequence[Array]) -> None:
        """Train on the data undisturbed, and keep version, outputs and moments."""
        trainer = Trainer(client, model_id)
        self.version = trainer.run(data, lambda _number, _comes: None)
        self.outputs = trainer.outputs
        self.moments: dict[str, Array] = dict(
            client.get_weights(model_id, include_moments=True).moments
        )


class Traffic:
    """Sessions that stream until they are stopped, and the longest time that one had no answer.

    Attributes:
        answers: When each answer came, in seconds of the monotonic clock, and to which session.
        failures: What ended a session's stream.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        model_id: str,
        proof: Proof,
        *,
        sessions: int = 8,
        pace_s: float = 0.02,
        **options: Any,
    ) -> None:
        """Open the sessions."""
        self.answers: list[tuple[float, int]] = []
        self.failures: list[str] = []
        self._proof, self._pace_s = proof, pace_s
        self._stop = threading.Event()
        self._streamers = [
            Streamer(
                [*addresses[k % len(addresses) :], *addresses[: k % len(addresses)]],
                model_id,
                f"{model_id}-{proof.seed}-{k}",
                **options,
            )
            for k in range(sessions)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(streamer, k), name=f"traffic-{k}")
            for k, streamer in enumerate(self._streamers)
        ]

    def __enter__(self) -> Self:
        """Start."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, compare where each session stands, disconnect."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for streamer in self._streamers:
            if not self.failures:
                streamer.finish(self._proof)
            streamer.close()
        for failure in self.failures:
            self._proof.violated(failure)

    def run_for(self, seconds: float) -> None:
        """Let it flow for a while."""
        self._stop.wait(seconds)

    def note_steady(self, seconds: float) -> None:
        """Let it flow for a while and note the rate."""
        started, before = time.monotonic(), len(self.answers)
        self.run_for(seconds)
        self._proof.steady(len(self.answers) - before, time.monotonic() - started)

    def wait_for_answers(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until so many more answers have come."""
        wanted, latest = len(self.answers) + count, time.monotonic() + timeout_s
        while len(self.answers) < wanted and not self.failures and time.monotonic() < latest:
            self._stop.wait(0.01)

    def longest_gap_s(self, since: float) -> float:
        """Return the longest time that a session had no answer after `since`, in seconds."""
        return max(self._gap_s(number, since) for number in range(len(self._streamers)))

    def _gap_s(self, number: int, since: float) -> float:
        times = [since, *(at for at, who in self.answers if who == number and at >= since)]
        times.append(time.monotonic())
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def _run(self, streamer: Streamer, number: int) -> None:
        rng = np.random.default_rng((self._proof.seed, number))
        try:
            while not self._stop.is_set():
                (xs,) = draw(rng, 1)
                streamer.forward(xs, self._proof)
                self.answers.append((time.monotonic(), number))
                self._stop.wait(self._pace_s)
        except timernn.Error as error:
            self.failures.append(f"{streamer.session.session_id}: {error!r}")


def note_wait(traffic: Traffic, since: float, proof: Proof) -> None:
    """Note how long a session waited at most, its healing included."""
    wait_s = traffic.longest_gap_s(since)
    proof.figures["longest wait s"] = max(wait_s, proof.figures.get("longest wait s", 0.0))
