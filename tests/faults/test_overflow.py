"""Finite numbers whose sums overflow: no NaN or infinity is ever answered or kept."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from instruments.redis_servers import RedisServer
from scenes.figures import figure
from scenes.store_clients import connect, create_model, measure_steady
from scenes.store_pair import addresses_of, replicas_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from instruments.report import Proof

D, H = 64, 8
OPTIMIZERS = (timernn.Adam, timernn.AdamW, timernn.RMSprop, timernn.AdaGrad)


def signs(rng: np.random.Generator, pattern: str) -> Any:
    """Return weights (D, H) whose products with huge inputs overflow to both sides."""
    of = {
        "half": np.repeat([1, -1], D // 2),
        "alternating": np.tile([1, -1], D // 2),
        "random": rng.choice([1, -1], D),
    }
    return np.repeat(3 * of[pattern][:, None], H, axis=1).astype("f4")


def ways(client: timernn.Client, session: timernn.Session) -> list[Callable[[Any], Any]]:
    """Return the ways in which a chunk reaches a session."""

    def frame(xs: Any) -> Any:
        (hs,) = client.frame([(session, xs)])
        if isinstance(hs, timernn.Error):
            raise hs
        return hs

    return [session.forward, lambda xs: next(iter(session.stream([xs]))), frame]


@pytest.mark.timeout(240)
@pytest.mark.promise("R31", "overflow: no NaN state and no infinite moment is answered or kept")
@figure("rounds", 3, 30)
def test_huge_finite_numbers_never_make_nan(proof: Proof, seed: int, rounds: int) -> None:
    """By forward, stream and frame, INFER and TRAIN: refused and nothing changed, or finite."""
    rng = np.random.default_rng(seed)
    with RedisServer() as store, replicas_on(store.url) as replicas:
        addresses = addresses_of(replicas)
        with connect(addresses) as client:
            create_model(client, "steady")
            measure_steady(proof, addresses, "steady")
            for number in range(rounds):
                for pattern in ("half", "alternating", "random"):
                    model_id = f"{pattern}-{number}"
                    weights = {"Wx": signs(rng, pattern), "Wh": np.eye(H), "b": np.zeros(H)}
                    client.create_model(model_id, input_size=D, hidden_size=H, **weights)
                    for rows in (1, 2, 5):
                        for train in (False, True):
                            try_all(client, model_id, rows, proof, train=train)


def try_all(client: timernn.Client, model_id: str, rows: int, proof: Proof, *, train: bool) -> None:
    """Send a fatal chunk in every way; what the session holds stays finite and in order."""
    session = client.session(model_id, batch_size=rows, train=train)
    xs = np.full((rows, 3, D), 3e38, np.float32)
    for way in ways(client, session):
        before, seq = session.state, session.chunk_seq
        try:
            hs = way(xs)
        except timernn.NonFiniteResult:
            proof.hit("refused")
            proof.require(np.array_equal(session.state, before), "a refused chunk changed h")
            proof.require(session.get_info().chunk_seq == seq, "a refused chunk was applied")
        else:
            proof.hit("was finite")
            proof.require(np.isfinite(hs).all(), f"{model_id}, N={rows}: hs is not finite")
            proof.require(
                np.isfinite(session.state).all(), f"{model_id}, N={rows}: h is not finite"
            )
        session.forward(np.zeros((rows, 1, D), np.float32))  # it goes on
    session.close()


@pytest.mark.timeout(240)
@pytest.mark.promise("R31", "overflow: no NaN state and no infinite moment is answered or kept")
@figure("rounds", 2, 20)
def test_huge_gradients_never_make_moments_that_cannot_be_read_back(
    proof: Proof, seed: int, rounds: int
) -> None:
    """The step is refused, its contribution waits, clipping takes it, and the export is imported."""
    rng = np.random.default_rng(seed)
    with RedisServer() as store, replicas_on(store.url) as replicas:
        addresses = addresses_of(replicas)
        with connect(addresses) as client:
            create_model(client, "steady")
            measure_steady(proof, addresses, "steady")
            for number in range(rounds):
                for optimizer in OPTIMIZERS:
                    model_id = f"{optimizer.__name__}-{number}"
                    client.create_model(
                        model_id, input_size=3, hidden_size=4, optimizer=optimizer()
                    )
                    session = client.session(model_id, train=True)
                    hs = session.forward(rng.standard_normal((1, 4, 3)).astype("f4"))
                    session.backward(np.full_like(hs, 1e25))
                    with contextlib.suppress(timernn.NonFiniteResult):
                        session.update()
                        proof.violated(f"{model_id}: the step was made")
                    proof.hit("refused step")
                    version = session.update(clip_norm=1.0)
                    moments = client.get_weights(model_id, include_moments=True).moments
                    proof.require(version.number == 2, f"{model_id}: {version} was made")
                    proof.require(
                        all(np.isfinite(array).all() for array in moments.values()),
                        f"{model_id}: a moment is not finite",
                    )
