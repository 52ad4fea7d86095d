"""Finite numbers whose sums and squares are not: no NaN or infinity is ever kept."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from instruments.replicas import (
    HIDDEN,
    INPUTS,
    ROWS,
    Client,
    draw,
    head_of,
    open_on,
    refusal,
    step,
)
from rnn_engine import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Momentum,
    Nesterov,
    Params,
    RMSprop,
    TanhNetwork,
    init_moments,
    rnn_forward,
)
from service.domain import weights
from service.domain.digests import request_digest
from service.domain.errors import DomainError
from service.domain.ports import NewModel, NewVersion
from service.domain.types import (
    Forward,
    InitialWeights,
    ModelKey,
    ModelSpec,
    Selector,
    SessionKey,
    Version,
)

if TYPE_CHECKING:
    from instruments.replicas import Replica
    from rnn_engine import Array
    from rnn_engine.optimizers import Optimizer
    from tests.domain.conftest import ClientMaker, ModelMaker

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = ["float32", "float64"]


def huge(dtype: str, share: float = 0.9) -> float:
    """Return a number near the largest of a type."""
    return float(np.finfo(dtype).max) * share


def explosive(dtype: str) -> Params:
    """Return weights that turn huge inputs after a state of ones into infinity less infinity."""
    return Params(
        np.full((INPUTS, HIDDEN), 3, dtype),
        np.full((HIDDEN, HIDDEN), -huge(dtype), dtype),
        np.full(HIDDEN, 0.5, dtype),
    )


async def make_explosive(replica: Replica, tenant: str, dtype: str) -> Params:
    """Create model m with such weights."""
    params = explosive(dtype)
    spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), dtype, SGD())
    await replica.models.create(tenant, spec, InitialWeights(given=params), request_id="")
    return params


def fatal(dtype: str) -> Array:
    """Return a chunk whose second step makes NaN."""
    return np.full((ROWS, 2, INPUTS), huge(dtype), dtype)


@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
async def test_a_chunk_that_would_make_nan_is_refused_and_changes_nothing(
    replicas: tuple[Replica, Replica],
    tenant: str,
    open_session: ClientMaker,
    dtype: str,
    *,
    train: bool,
) -> None:
    """NON_FINITE_RESULT names the row; state, token and number stay, and the next chunk continues them."""
    params = await make_explosive(replicas[0], tenant, dtype)
    client = await open_session()
    calm = np.zeros((ROWS, 1, INPUTS), dtype)
    first = await client.forward(calm, train=train)
    xs = fatal(dtype)
    xs[0] = 0
    for _ in range(2):  # on either replica
        refused = await refusal(client.forward(xs, train=train))
        assert (refused.reason, refused.metadata["row"]) == ("NON_FINITE_RESULT", "1")
    kept = await replicas[0].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=False)
    assert (kept.session.chunk_seq, kept.session.token) == (1, first.token)
    np.testing.assert_array_equal(kept.state, first.state)
    second = await client.forward(calm, train=train)
    np.testing.assert_array_equal(second.outputs, rnn_forward(params, calm, first.state).hs)


@pytest.mark.parametrize("dtype", DTYPES)
async def test_a_stateless_chunk_that_would_make_nan_is_refused(
    replicas: tuple[Replica, Replica], tenant: str, dtype: str
) -> None:
    """Without a session the answer is NON_FINITE_RESULT as well, never NaN."""
    await make_explosive(replicas[0], tenant, dtype)
    op = Forward("", 0, 0, b"", fatal(dtype), model_id="m")
    refused = await refusal(replicas[0].recurrence.forward(tenant, op))
    assert refused.reason == "NON_FINITE_RESULT"


async def test_only_the_culprit_of_a_batch_fails(
    replicas: tuple[Replica, Replica], tenant: str, rng: np.random.Generator
) -> None:
    """Chunks that are computed together with one that makes NaN are answered as if alone."""
    params = await make_explosive(replicas[0], tenant, "float32")
    clients = []
    for i in range(8):
        opened = await open_on(replicas[0], tenant, f"s{i}")
        clients.append(Client(replicas[:1], tenant, f"s{i}", opened.session.epoch))
    chunks = [draw(rng, 2) for _ in clients]
    chunks[3] = fatal("float32")
    outcomes = await asyncio.gather(
        *(client.forward(xs) for client, xs in zip(clients, chunks, strict=True)),
        return_exceptions=True,
    )
    zeros = np.zeros((ROWS, HIDDEN), np.float32)
    for i, (xs, outcome) in enumerate(zip(chunks, outcomes, strict=True)):
        if i == 3:
            assert isinstance(outcome, DomainError)
            assert outcome.reason == "NON_FINITE_RESULT"
        else:
            assert not isinstance(outcome, BaseException)
            assert outcome.outputs is not None
            np.testing.assert_allclose(
                outcome.outputs, rnn_forward(params, xs, zeros).hs, rtol=1e-5
            )


async def test_a_replay_never_answers_nan(replicas: tuple[Replica, Replica], tenant: str) -> None:
    """What was finite in its batch and is not when computed again alone is REPLAY_WINDOW_PASSED."""
    wx = np.repeat(np.array([[3], [-3]], np.float32), 32, axis=0).repeat(HIDDEN, axis=1)
    given = Params(wx, np.eye(HIDDEN, dtype=np.float32), np.zeros(HIDDEN, np.float32))
    spec = ModelSpec("m", TanhNetwork(64, HIDDEN), "float32", SGD())
    await replicas[0].models.create(tenant, spec, InitialWeights(given=given), request_id="")
    xs = np.full((1, 3, 64), 3e38, np.float32)
    ops = []
    for i in range(4):
        opened = await open_on(replicas[0], tenant, f"s{i}", batch_size=1)
        ops.append(Forward(f"s{i}", opened.session.epoch, 1, b"", xs))
    for again in range(2):
        outcomes = await asyncio.gather(
            *(replicas[again].recurrence.forward(tenant, op) for op in ops), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, DomainError):  # which of the two, the machine's BLAS decides
                assert outcome.reason in {"NON_FINITE_RESULT", "REPLAY_WINDOW_PASSED"}
                continue
            assert not isinstance(outcome, BaseException)
            assert outcome.outputs is not None
            assert np.isfinite(outcome.outputs).all()
            assert np.isfinite(outcome.state).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_becomes_nan_stays_nan(rng: np.random.Generator, dtype: str, rows: int) -> None:
    """A check of the last state of a chunk finds every NaN of its outputs."""
    for _ in range(50):
        scale = rng.choice([1.0, huge(dtype)], size=(3, 1))
        params = Params(
            *(
                (rng.choice([-1.0, 0.0, 1.0], shape) * by).astype(dtype)
                for shape, by in zip([(8, 4), (4, 4), (4,)], scale, strict=True)
            )
        )
        xs = (rng.choice([-1.0, 0.0, 1.0], (rows, 5, 8)) * huge(dtype)).astype(dtype)
        hs = rnn_forward(params, xs, np.ones((rows, 4), dtype)).hs
        is_bad: Any = ~np.isfinite(hs).all(axis=2)
        np.testing.assert_array_equal(is_bad.any(axis=1), is_bad[:, -1])


SQUARING: list[Optimizer] = [AdaGrad(), RMSprop(), Adam(), AdamW()]
SUMMING: list[Optimizer] = [Momentum(lr=0.0), Nesterov(lr=0.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", SQUARING, ids=lambda one: type(one).__name__)
async def test_a_step_whose_moments_overflow_is_refused(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    optimizer: Optimizer,
    dtype: str,
) -> None:
    """Nothing changes, the contribution waits and can be clipped; the export can be imported."""
    await make_model(optimizer=optimizer, dtype=dtype)
    client = await open_session()
    head = await head_of(replicas[0], tenant)
    await client.forward(draw(rng, dtype=dtype), train=True)
    await client.backward(np.full((ROWS, 3, HIDDEN), huge(dtype) ** 0.6, dtype))
    refused = await refusal(client.update("m", "u1"))
    assert refused.reason == "NON_FINITE_RESULT"
    assert "discard them, or clip them" in refused.message
    assert await head_of(replicas[1], tenant) == head
    assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 1
    clipped = await client.update("m", "u2", clip_norm=1.0)
    assert clipped.clipped
    version, data = await replicas[0].models.read_weights(
        ModelKey(tenant, "m"), None, include_moments=True
    )
    assert version == clipped.version
    again, _ = await replicas[1].models.put_weights(
        ModelKey(tenant, "m"), data, expected=None, request_id="put"
    )
    assert again.digest == version.digest


@pytest.mark.parametrize("optimizer", SUMMING, ids=lambda one: type(one).__name__)
async def test_a_velocity_that_overflows_is_refused(
    replicas: tuple[Replica, Replica],
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    optimizer: Optimizer,
) -> None:
    """Huge gradients of one sign make steps until the velocity would be infinite; then none."""
    await make_model(optimizer=optimizer)
    client = await open_session()
    xs = np.zeros((ROWS, 1, INPUTS), np.float32)
    dhs = np.full((ROWS, 1, HIDDEN), huge("float32") / 4, np.float32)
    head = await head_of(replicas[0], tenant)
    for k in range(3):
        await client.forward(xs, train=True)
        await client.backward(dhs)
        try:
            head = (await client.update("m", f"u{k}")).version
        except DomainError as error:
            assert error.reason == "NON_FINITE_RESULT"  # noqa: PT017 - which step it is, differs
            break
    else:
        pytest.fail("the velocity never overflowed")
    assert await head_of(replicas[1], tenant) == head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_norm", [0.0, 1.0], ids=["plain", "clipped"])
async def test_contributions_whose_sum_overflows_make_no_step(
    replicas: tuple[Replica, Replica],
    tenant: str,
    make_model: ModelMaker,
    open_session: ClientMaker,
    clip_norm: float,
    dtype: str,
) -> None:
    """Clipping cannot mend an infinite sum, so nothing is changed; fewer of them can be taken."""
    await make_model(optimizer=SGD(lr=0.0), dtype=dtype)
    client = await open_session()
    dhs = np.zeros((ROWS, 1, HIDDEN), dtype)
    dhs[..., 0] = huge(dtype) / 3.5  # of one column, so that the norm of one is still a number
    for _ in range(2):
        await client.forward(np.zeros((ROWS, 1, INPUTS), dtype), train=True)
        await client.backward(dhs)
    op = step("m", "u1", Selector("s", client.epoch, (1, 2)), clip_norm=clip_norm)
    refused = await refusal(replicas[0].updates.update(tenant, op))
    assert refused.reason == "NON_FINITE_RESULT"
    assert "take fewer of them, or discard them" in refused.message
    assert (await replicas[0].models.get(ModelKey(tenant, "m"))).waiting_count == 2
    assert (await client.update("m", "u2", 1)).contribution_count == 1


async def test_moments_that_an_older_server_let_overflow_are_not_carried_on(
    replicas: tuple[Replica, Replica], tenant: str
) -> None:
    """A checkpoint with infinite moments is not restored; its weights stay readable."""
    spec = ModelSpec("m", TanhNetwork(INPUTS, HIDDEN), "float32", Adam())
    params = weights.draw_weights(spec, 1)
    moments = init_moments(spec.optimizer, params)
    moments.slots[1].arrays[2][...] = np.inf
    stored = weights.weights_to_blob(params), weights.moments_to_blob(moments)
    version = Version(1, weights.version_digest(*stored))
    first = NewVersion(version, *stored)
    new = NewModel(secrets.token_bytes(16), weights.spec_to_bytes(spec), first, request_digest(""))
    await replicas[0].store.models.create_model(ModelKey(tenant, "m"), new)
    await replicas[0].models.create_checkpoint(ModelKey(tenant, "m"), "c", None)
    refused = await refusal(
        replicas[0].models.restore_checkpoint(
            ModelKey(tenant, "m"), "c", expected=None, request_id="r"
        )
    )
    assert (refused.reason, refused.metadata["tensors"]) == ("NON_FINITE_RESULT", "v.b")
    _, data = await replicas[0].models.read_weights(
        ModelKey(tenant, "m"), None, include_moments=False
    )
    _, replayed = await replicas[1].models.put_weights(
        ModelKey(tenant, "m"), data, expected=None, request_id="put"
    )
    assert not replayed
