"""A program that is interrupted: each operation repeated as docs/client.md says, each output checked.

`interrupt` runs it. It writes a line for each attempt that begins, and is sent SIGINT some time later;
the last line is a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import timernn
from timernn import aio

if TYPE_CHECKING:
    from collections.abc import Callable

INPUTS, HIDDEN = 4, 32
TIMEOUT_S = 15.0
SLOW_S = TIMEOUT_S + 5.0
TOLERANCE = 1e-4
LONGEST_S = 0.03
SHARE = 0.6  # of the attempts, so that a long operation comes to its end
ATTEMPT = "attempt"
RETURN_INTERRUPTED = "answered, return interrupted"


def report(line: str) -> None:
    """Write a line to whoever started the program."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def interrupt(address: str, seed: int, interrupts: int) -> Found:
    """Run the program and send it SIGINT at random moments until it ends; return what it found."""
    chance, found = random.Random(seed), ""
    program = subprocess.Popen(
        [sys.executable, "-m", "scenes.interrupted", address, str(seed), str(interrupts)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert program.stdout is not None
        for line in program.stdout:
            found = line
            if line.strip() == ATTEMPT and chance.random() < SHARE:
                # Mostly short: the moments at which an answer is taken over are among them.
                time.sleep(LONGEST_S * chance.random() ** 3)
                program.send_signal(signal.SIGINT)
        assert program.wait(60) == 0
    finally:
        program.kill()
        program.wait()
        if program.stdout is not None:
            program.stdout.close()
    return Found(**json.loads(found))


@dataclass(frozen=True)
class Found:
    """What the program found.

    Attributes:
        faults: What went wrong.
        counts: How often each thing happened.
        longest_s: The longest attempt, in seconds.
    """

    faults: list[str]
    counts: dict[str, int]
    longest_s: float


class Interrupts:
    """Lets SIGINT raise while an operation is under way, and never elsewhere."""

    def __init__(self) -> None:
        self.is_armed = False
        self.count = 0
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: object) -> None:
        if self.is_armed:
            self.is_armed = False
            self.count += 1
            raise KeyboardInterrupt


class Program:
    """Carries out operations under interrupts and compares what comes with a recurrence of its own."""

    def __init__(self, address: str, seed: int) -> None:
        self.client = timernn.connect(address, timeout=TIMEOUT_S)
        self.address, self.name = address, f"interrupted{seed}"
        self.rng, self.chance = np.random.default_rng(seed), random.Random(seed)
        self.interrupts = Interrupts()
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0
        # Trained for long, a model comes to amplify rounding: so what is compared is another's.
        self.trained = [f"{self.name}-trained", f"{self.name}-calm"]
        for model in (self.name, *self.trained):
            self.client.create_model(
                model, input_size=INPUTS, hidden_size=HIDDEN, seed=1, optimizer=timernn.SGD(lr=0.01)
            )
        self.weights = self.client.get_weights(self.name)

    # -- what must come ----------------------------------------------------------------------------

    def reference(self, xs: np.ndarray[Any, Any], h: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return hs (N, T, H) of one chunk from state h (N, H)."""
        Wx, Wh, b = (
            np.asarray(w, np.float64) for w in (self.weights.Wx, self.weights.Wh, self.weights.b)
        )
        hs = []
        for step in range(xs.shape[1]):
            h = np.tanh(xs[:, step] @ Wx + h @ Wh + b)
            hs.append(h)
        return np.stack(hs, axis=1)

    def require(self, is_right: object, text: str) -> None:
        """Note what is wrong."""
        self.counts["checked"] += 1
        if not is_right:
            self.faults.append(text)

    def draw(self, steps: int, rows: int = 1) -> np.ndarray[Any, Any]:
        """Draw a chunk (N, T, D)."""
        return self.rng.standard_normal((rows, steps, INPUTS)).astype(np.float32)

    # -- one operation, whatever strikes -----------------------------------------------------------

    def until_done(self, call: Callable[[], Any], has_happened: Callable[[], bool]) -> Any:
        """Repeat a call until it returns or has happened; None in the second case."""
        while True:
            started = time.monotonic()
            try:
                report(ATTEMPT)
                self.interrupts.is_armed = True
                result = call()
                self.interrupts.is_armed = False
            except KeyboardInterrupt:
                # The three lines of docs/client.md.
                if has_happened():
                    self.counts[RETURN_INTERRUPTED] += 1
                    return None
            else:
                return result
            finally:
                self.interrupts.is_armed = False
                took_s = time.monotonic() - started
                self.longest_s = max(self.longest_s, took_s)
                if took_s > SLOW_S:
                    self.faults.append(f"an attempt took {took_s:.0f} s")

    def forward(self, session: timernn.Session, xs: np.ndarray[Any, Any]) -> Any:
        """Apply a chunk as docs/client.md says."""
        before = session.chunk_seq
        return self.until_done(
            lambda: session.forward(xs),
            lambda: not session.in_doubt and session.chunk_seq > before,
        )

    def check_place(self, session: timernn.Session, h: np.ndarray[Any, Any], chunks: int) -> None:
        """Compare where the session stands here and on the server with what was done."""
        session.settle()
        stored = self.client.get_session(session.session_id)
        self.require(session.chunk_seq == stored.chunk_seq == chunks, f"chunk {session.chunk_seq}")
        self.require(np.abs(session.state - h).max() < TOLERANCE, "wrong state")

    # -- the operations ----------------------------------------------------------------------------

    def small_and_large(self) -> None:
        """Forwards of a session, small arrays and large."""
        session = self.client.session(self.name, batch_size=2)
        h, done = np.zeros((2, HIDDEN)), 0
        for steps in (3, 2000, 3, 2000):
            xs = self.draw(steps, 2)
            want = self.reference(xs, h)
            hs = self.forward(session, xs)
            if hs is not None:
                right = hs.shape == want.shape and np.abs(hs - want).max() < TOLERANCE
                self.require(right, f"wrong output {hs.shape} for {want.shape}")
            h, done = want[:, -1], done + 1
        self.check_place(session, h, done)

    def epochs(self) -> None:
        """Begin epochs by set_state and reset_state, interrupted and repeated."""
        session = self.client.session(self.name)
        half = np.full((1, HIDDEN), 0.5)
        self._new_epoch(session, lambda: session.set_state(half), half)
        self._new_epoch(session, session.reset_state, np.zeros((1, HIDDEN)))

    def _new_epoch(
        self, session: timernn.Session, call: Callable[[], None], h: np.ndarray[Any, Any]
    ) -> None:
        before = session.epoch
        self.until_done(call, lambda: session.epoch > before)
        self.check_place(session, h, 0)

    def stream(self) -> None:
        """A stream, left by the interrupt or closed from outside, then gone on with."""
        session = self.client.session(self.name)
        chunks = [self.draw(5) for _ in range(12)]
        wanted, h = [], np.zeros((1, HIDDEN))
        for xs in chunks:
            wanted.append(self.reference(xs, h))
            h = wanted[-1][:, -1]
        while session.chunk_seq < len(chunks):
            at = session.chunk_seq
            leave_after = self.chance.randint(1, len(chunks))
            outputs: Any = session.stream(chunks[at:])

            def some(outputs: Any = outputs, at: int = at, leave_after: int = leave_after) -> None:
                for count, hs in enumerate(outputs, 1):
                    want = wanted[at + count - 1]
                    right = hs.shape == want.shape and np.abs(hs - want).max() < TOLERANCE
                    self.require(right, f"stream: wrong output {count} after {at}")
                    if count == leave_after:
                        break

            self.until_done(some, lambda: True)
            outputs.close()
            self.until_done(session.settle, lambda: False)
        self.check_place(session, h, len(chunks))

    def frame(self) -> None:
        """A frame of several sessions; those that were answered are not sent again."""
        sessions = [self.client.session(self.name) for _ in range(4)]
        chunks = [self.draw(50) for _ in sessions]

        def call() -> list[Any]:
            left = [pair for pair in zip(sessions, chunks, strict=True) if not done(pair[0])]
            return list(zip(left, self.client.frame(left), strict=True))

        def done(session: timernn.Session) -> bool:
            return session.chunk_seq == 1 and not session.in_doubt

        answers = self.until_done(call, lambda: all(map(done, sessions))) or []
        for (_, xs), hs in answers:
            want = self.reference(xs, np.zeros((1, HIDDEN)))
            right = not isinstance(hs, timernn.Error) and np.abs(hs - want).max() < TOLERANCE
            self.require(right, f"frame: {hs!r:.80}")
        for session, xs in zip(sessions, chunks, strict=True):
            self.check_place(session, self.reference(xs, np.zeros((1, HIDDEN)))[:, -1], 1)

    def opening(self) -> None:
        """Open a session by name: whatever was interrupted, it is the same one."""
        name = f"s{self.chance.getrandbits(64):x}"
        opened = self.until_done(lambda: self.client.session(self.name, name), lambda: False)
        self.require(opened.session_id == name and opened.chunk_seq == 0, "opened another")

    def training(self, steps: int) -> None:
        """Forward, backward and update, or a step within the backward; equal to an undisturbed run."""
        data = [self.draw(20) for _ in range(steps)]
        session, calm = (self.client.session(model, train=True) for model in self.trained)
        for number, xs in enumerate(data):
            self.forward(session, xs)
            self._step(session, is_inline=bool(number % 2))
        for xs in data:
            calm.forward(xs)
            calm.backward(np.ones((1, 20, HIDDEN)))
            calm.update()
        heads = [self.client.get_model(model).head for model in self.trained]
        self.require(heads[0] == heads[1], f"trained to {heads[0]}, not {heads[1]}")

    def _step(self, session: timernn.Session, *, is_inline: bool) -> None:
        dhs, dh, made = np.ones((1, 20, HIDDEN)), session.dh, session.last_update
        step = timernn.Step() if is_inline else None
        try:
            self.until_done(
                lambda: session.backward(dhs, update=step),
                lambda: not session.in_doubt and session.dh is not dh,
            )
        except timernn.TapeMissing:  # it had been answered
            self.counts[RETURN_INTERRUPTED] += 1
        if not is_inline:
            self.until_done(session.update, lambda: session.last_update is not made)

    async def cancelled(self, cancels: int) -> None:
        """Forwards of the asyncio frontend, cancelled at random moments and repeated."""
        async with aio.connect(self.address, timeout=TIMEOUT_S) as client:
            session, h, chunks = await client.session(self.name), np.zeros((1, HIDDEN)), 0
            while self.counts["cancels"] < cancels:
                xs, hs = self.draw(50), None  # type: tuple[np.ndarray[Any, Any], Any]
                want, before = self.reference(xs, h), session.chunk_seq
                while session.in_doubt or session.chunk_seq == before:
                    task = asyncio.ensure_future(session.forward(xs))
                    if self.chance.random() < SHARE:
                        await asyncio.wait([task], timeout=self.chance.uniform(0, LONGEST_S))
                        self.counts["cancels"] += task.cancel()
                    (hs,) = await asyncio.gather(task, return_exceptions=True)
                if not isinstance(hs, BaseException):
                    right = hs.shape == want.shape and np.abs(hs - want).max() < TOLERANCE
                    self.require(right, "asyncio: wrong output")
                h, chunks = want[:, -1], chunks + 1
            self.require(session.chunk_seq == chunks, "asyncio: lost count")
            self.require(np.abs(await session.state - h).max() < TOLERANCE, "asyncio: wrong state")

    def run(self, interrupts: int) -> dict[str, Any]:
        """Go through all operations until so many interrupts have struck."""
        while self.interrupts.count < interrupts and not self.faults:
            for operation in (
                self.small_and_large,
                self.epochs,
                self.stream,
                self.frame,
                self.opening,
                lambda: self.training(4),
            ):
                try:
                    operation()
                except timernn.Error as error:
                    self.faults.append(f"{operation}: {error}")
        asyncio.run(self.cancelled(interrupts // 4))
        self.counts["interrupts"] = self.interrupts.count
        self.client.close()
        return {"faults": self.faults, "counts": self.counts, "longest_s": self.longest_s}


if __name__ == "__main__":
    report(json.dumps(Program(sys.argv[1], int(sys.argv[2])).run(int(sys.argv[3]))))
