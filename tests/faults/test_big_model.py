"""The largest model that the default limits allow trains, within a stated bound of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import timernn
from instruments.processes import ServiceProcess
from scenes.figures import figure
from service.settings import Settings

if TYPE_CHECKING:
    from instruments.report import Proof

H = 4096
WEIGHTS_BYTES = (2 * H * H + H) * 4


@pytest.mark.timeout(900)
@pytest.mark.promise(
    "R30", "the largest model trains; memory is bounded by the cache and 10 x weights"
)
@figure("steps", 10, 40)
def test_the_largest_model_trains_within_its_memory(proof: Proof, seed: int, steps: int) -> None:
    """Ten steps of D = H = 4096 with Adam on the embedded store, by the library as it comes."""
    proof.is_control = True
    rng = np.random.default_rng(seed)
    with ServiceProcess("") as server, timernn.connect(server.address, timeout=300) as client:
        client.ping()
        made = client.create_model(
            "big", input_size=H, hidden_size=H, seed=seed, optimizer=timernn.Adam()
        )
        session = client.session("big", batch_size=8, train=True)
        for number in range(steps):
            hs = session.forward(rng.standard_normal((8, 4, H)).astype(np.float32))
            session.backward(np.ones_like(hs))
            version = session.update()
            proof.require(version.number == made.head.number + number + 1, f"{version} was made")
        peak = server.peak_rss_bytes()
        bound = Settings().weights_cache_bytes + 10 * WEIGHTS_BYTES
        proof.require(peak <= bound, f"{peak >> 20} MiB at the most, over {bound >> 20} MiB")
        proof.figures["peak MiB"] = peak / (1 << 20)
