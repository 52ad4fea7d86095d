"""A training program that kills itself with SIGKILL at a call that its command line names.

    python mortal_trainer.py ADDRESS MODEL STEPS PROGRAM METHOD COUNT MOMENT DELAY_S

The call is the COUNT-th of METHOD in this process. MOMENT is "before" it is sent, "sent": DELAY_S after it
was handed to gRPC, wherever it is by then, or "answered": its answer is here, and nothing has been made of it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from functools import wraps
from typing import Any, NoReturn

import timernn
from examples import restart
from timernn._core.retry import Caller


def die() -> NoReturn:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def die_at(method: str, count: int, moment: str, delay_s: float) -> None:
    """Let every call of the library pass a place where it may be the last."""
    calls: Counter[str] = Counter()
    original = Caller.call

    @wraps(original)
    def call(self: Caller, rpc: Any, *arguments: Any) -> Any:
        name = rpc.path.rpartition("/")[2]
        calls[name] += 1
        is_last = (name, calls[name]) == (method, count)
        if is_last and moment == "before":
            die()
        if is_last and moment == "sent":
            threading.Timer(delay_s, die).start()
        try:
            return (yield from original(self, rpc, *arguments))
        finally:  # a refusal is an answer too
            if is_last:
                die()

    Caller.call = call  # type: ignore[assignment, method-assign]  # the place to die at


def train_inline(client: timernn.Client, model: str, steps: int) -> None:
    """As the example, but each step is made in the call of its backward."""
    with client.session(model, f"{model}-trainer", batch_size=restart.N, train=True) as session:
        with suppress(timernn.NoGradients):
            session.update(clip_norm=1.0, take_waiting=True)
        for step in range(client.get_model(model).head.number - 1, steps):
            xs = restart.batch(step)
            hs = session.forward(xs, chunk_seq=step + 1)
            session.backward(restart.gradient(hs, xs), update=timernn.Step(clip_norm=1.0))


def train_through_time(client: timernn.Client, model: str, steps: int) -> None:
    """Two chunks a step, gone back through together: nothing can be taken before both are there."""
    with client.session(model, f"{model}-trainer", batch_size=restart.N, train=True) as session:
        for step in range(client.get_model(model).head.number - 1, steps):
            first, second = restart.batch(2 * step), restart.batch(2 * step + 1)
            hs = session.forward(first, chunk_seq=2 * step + 1)
            later = session.forward(second)
            session.backward(restart.gradient(later, second))
            session.backward(restart.gradient(hs, first), dh_next=session.dh)
            session.update(clip_norm=1.0)


PROGRAMS = {"example": restart.train, "inline": train_inline, "through_time": train_through_time}


def main() -> None:
    """Train until the end, or until the call that is named."""
    address, model, steps, program, method, count, moment, delay_s = sys.argv[1:]
    die_at(method, int(count), moment, float(delay_s))
    with timernn.connect(address) as client:
        PROGRAMS[program](client, model, int(steps))


if __name__ == "__main__":
    main()
