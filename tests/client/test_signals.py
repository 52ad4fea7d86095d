"""Real signals whose handler raises, inside real calls: the next call works, and nothing stays behind."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import timernn

INTERRUPTS, LONGEST_S, GONE_S = 40, 0.02, 10.0
XS = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
# Its call waits for a server that takes the connection and never speaks.
ENDS_WITH_A_CALL_UNDER_WAY = """
import signal, sys, timernn
def stop(*_): raise SystemExit(7)
signal.signal(signal.SIGALRM, stop)
client = timernn.connect(sys.argv[1], timeout=600, connect_timeout=600)
signal.setitimer(signal.ITIMER_REAL, 0.5)
client.ping()
"""


class Interrupt(BaseException):
    """Raised by the handler."""


class Alarm:
    """Lets SIGALRM raise while a call is under way.

    Attributes:
        count: How often it has.
    """

    def __init__(self) -> None:
        self.count, self._is_armed = 0, False
        self._before = signal.signal(signal.SIGALRM, self._handle)

    def call(self, call: Callable[[], Any], after_s: float) -> Any:
        """Call; None where the signal came first."""
        try:
            self._is_armed = True
            signal.setitimer(signal.ITIMER_REAL, after_s)
            result = call()
            self._is_armed = False
        except Interrupt:
            return None
        finally:
            self._is_armed = False
        return result

    def restore(self) -> None:
        """Stop the timer and restore the signal handler."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _handle(self, *_: object) -> None:
        if self._is_armed:
            self._is_armed = False
            self.count += 1
            raise Interrupt


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    """SIGALRM, for one test."""
    alarm = Alarm()
    yield alarm
    alarm.restore()


@pytest.mark.parametrize("kind", ["forward", "stream", "frame"])
def test_after_signals_inside_calls_the_outputs_are_right_and_no_thread_is_left(
    live: timernn.Client, model_id: str, alarm: Alarm, kind: str
) -> None:
    """Each call is repeated as docs/client.md says; the threads of the interrupted ones end."""
    live.create_model(model_id, input_size=3, hidden_size=5, seed=1)
    calm, session = live.session(model_id), live.session(model_id)
    streams: list[Any] = []  # closed when no signal comes: Python drops what a finalizer raises

    def first_of_a_stream() -> Any:
        streams.append(session.stream([XS]))
        return next(streams[-1])

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: session.forward(XS),
        "stream": first_of_a_stream,
        "frame": lambda: live.frame([(session, XS)])[0],
    }
    calls[kind]()
    streams.clear()
    calm.forward(XS)
    chance, threads = random.Random(kind), threading.active_count()
    while alarm.count < INTERRUPTS:
        want, hs, before = calm.forward(XS), None, session.chunk_seq
        while session.in_doubt or session.chunk_seq == before:
            hs = alarm.call(calls[kind], LONGEST_S * chance.random() ** 2 + 1e-5)
            streams.clear()
        assert hs is None or np.allclose(hs, want, atol=1e-5)
        assert session.chunk_seq == calm.chunk_seq
    assert np.allclose(session.state, calm.state, atol=1e-5)
    until = time.monotonic() + GONE_S
    while (left := threading.active_count()) > threads and time.monotonic() < until:
        time.sleep(0.01)  # gRPC's threads end some time after their call
    assert left <= threads, [thread.name for thread in threading.enumerate()]


def test_a_program_ends_at_once_though_an_interrupted_call_is_under_way() -> None:
    """Its exit code is its own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", ENDS_WITH_A_CALL_UNDER_WAY, address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (7, "")
