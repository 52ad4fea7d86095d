"""Traffic before the first fault, by the client library."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

import timernn

if TYPE_CHECKING:
    from instruments.report import Proof

CHUNKS = 200
INPUTS = 4


def note_steady_traffic(address: str, proof: Proof) -> None:
    """Stream a session and note the rate."""
    with timernn.connect(address) as client:
        client.create_model("calm", input_size=INPUTS, hidden_size=8)
        session = client.session("calm")
        started = time.monotonic()
        chunks = np.zeros((CHUNKS, 1, 1, INPUTS), np.float32)
        answered = sum(1 for _ in session.stream(chunks))
    proof.steady(answered, time.monotonic() - started)
