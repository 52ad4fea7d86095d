"""What is computed remotely is what a local TimeRNN computes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from instruments.replicas import (
    HIDDEN,
    ROWS,
    Client,
    draw,
    head_of,
    head_params,
    local_rnn,
    open_on,
    present,
    refusal,
    step,
)
from rnn_engine import (
    SGD,
    Adam,
    Params,
    apply_update,
    clip_by_global_norm,
    init_moments,
    rnn_backward,
    rnn_forward,
)
from service.domain.types import Forward, ModelKey, Reduction, ReturnHs, Selector, SessionKey

if TYPE_CHECKING:
    from instruments.replicas import Replica
    from rnn_engine import Array
    from tests.domain.conftest import ClientMaker, ModelMaker, ReplicaMaker

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def arrays_of(params: Params) -> tuple[Array, Array, Array]:
    """Return the weights' arrays in order."""
    return params.Wx, params.Wh, params.b


@pytest.mark.parametrize("dtype", ["float32", "float64"])
async def test_nine_chunks_equal_a_local_layer(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    dtype: str,
) -> None:
    """Every hs and the final h of a session that changes replica at each chunk are the layer's."""
    spec = await make_model(dtype=dtype)
    local = await local_rnn(replicas[0], tenant, spec)
    client = await open_session()
    for _ in range(9):
        xs = draw(rng, dtype=dtype)
        done = await client.forward(xs)
        np.testing.assert_allclose(
            present(done.outputs), local.forward(xs), rtol=TOLERANCE[dtype], atol=1e-7
        )
        assert done.state.dtype == dtype
    state = (await replicas[0].sessions.get_state(SessionKey(tenant, "s"), extend_ttl=False)).state
    np.testing.assert_allclose(state, present(local.h), rtol=TOLERANCE[dtype], atol=1e-7)
    np.testing.assert_array_equal(state, done.state)


@pytest.mark.parametrize("trial", range(5))
async def test_any_split_equals_one_shot(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    trial: int,
) -> None:
    """However a sequence is cut, its float64 outputs are those of one chunk, unrounded."""
    await make_model(dtype="float64")
    xs = draw(rng, 24, dtype="float64")
    whole = await (await open_session("whole")).forward(xs)
    client = await open_session(f"cut{trial}")
    cuts = np.sort(rng.choice(np.arange(1, 24), rng.integers(1, 8), replace=False))
    parts = [await client.forward(part) for part in np.split(xs, cuts, axis=1)]
    joined = np.concatenate([present(part.outputs) for part in parts], axis=1)
    np.testing.assert_allclose(joined, present(whole.outputs), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(parts[-1].state, whole.state, rtol=1e-12, atol=1e-14)


async def test_a_hop_at_every_boundary_changes_no_bit(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """A session that changes replica at each chunk gets the bits and tokens of one that stays."""
    await make_model()
    hopping, staying = await open_session("hops"), await open_session("stays")
    staying.replicas = replicas[:1]
    for _ in range(6):
        xs = draw(rng)
        there, here = await hopping.forward(xs), await staying.forward(xs)
        np.testing.assert_array_equal(there.outputs, here.outputs)
        assert there.token == here.token


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [(Adam(lr=2e-2), "float32"), (SGD(lr=2.0), "float64")]
)
async def test_a_hundred_remote_steps_equal_local_ones(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    dtype: str,
    optimizer: SGD | Adam,
) -> None:
    """Forward, Backward, Update a hundred times on two replicas give the local loop's weights."""
    spec = await make_model(optimizer=optimizer, dtype=dtype)
    local = await local_rnn(replicas[0], tenant, spec)
    params = Params(*(array.copy() for array in local.params))
    moments = init_moments(optimizer, params)
    client = await open_session()
    target = np.sin(np.arange(ROWS * 3 * HIDDEN)).reshape(ROWS, 3, HIDDEN).astype(dtype) / 2
    inputs = draw(rng, dtype=dtype)
    version, losses = await head_of(replicas[0], tenant), []
    for k in range(1, 101):
        xs = inputs + draw(rng, dtype=dtype) / 10
        done = await client.forward(xs, train=True, minimum=version)
        off = present(done.outputs) - target
        losses.append(float(np.square(off).mean()))
        dhs = off / target.size
        made = await client.backward(dhs, return_d_inputs=True)
        version = (await client.update("m", f"u{k}", expected=version, clip_norm=1.0)).version
        local.forward(xs)
        np.testing.assert_allclose(
            present(made.d_inputs), local.backward(dhs), rtol=1e-3, atol=1e-6
        )
        clipped, _, _ = clip_by_global_norm(Params(*local.params).spec.pack(local.grads), 1.0)
        params, moments = apply_update(optimizer, params, clipped, moments)
        for old, new in zip(local.params, arrays_of(params), strict=True):
            old[...] = new
    there = await head_params(replicas[1], tenant, spec)
    for remote, here in zip(arrays_of(there), arrays_of(params), strict=True):
        np.testing.assert_allclose(remote, here, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 2


async def test_gradients_equal_the_engine_and_finite_differences(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """Backward's dxs, dh0 and gradients are the engine's, bit for bit, and the numeric ones."""
    spec = await make_model(dtype="float64")
    params = await head_params(replicas[0], tenant, spec)
    h0 = rng.standard_normal((ROWS, HIDDEN))
    client = await open_session(initial_state=h0)
    xs, dhs = draw(rng, dtype="float64"), draw(rng, size=HIDDEN, dtype="float64")
    dh_next = rng.standard_normal((ROWS, HIDDEN))
    await client.forward(xs, train=True)
    made = await client.backward(dhs, d_state=dh_next, return_d_inputs=True, return_gradients=True)
    engine = rnn_backward(params, rnn_forward(params, xs, h0), dhs, dh_next)
    np.testing.assert_array_equal(present(made.d_inputs), engine.dxs)
    np.testing.assert_array_equal(made.d_state, engine.dh0)
    for remote, here in zip(present(made.grads), engine.grads, strict=True):
        np.testing.assert_array_equal(remote, here)
    moved = xs.copy()
    moved[1, 0, 2] += 1e-6
    before, after = (rnn_forward(params, x, h0).hs for x in (xs, moved))
    difference = ((after - before) * dhs).sum() + ((after - before)[:, -1] * dh_next).sum()
    np.testing.assert_allclose(present(made.d_inputs)[1, 0, 2], difference / 1e-6, rtol=1e-4)


async def test_chained_dh0_gives_full_backpropagation(
    rng: np.random.Generator, make_model: ModelMaker, open_session: ClientMaker
) -> None:
    """One chunk's dh0 as the chunk before's dh_next gives the gradients of one long chunk."""
    await make_model(dtype="float64")
    xs = draw(rng, 8, dtype="float64")
    dhs = draw(rng, 8, size=HIDDEN, dtype="float64")
    whole = await open_session("whole")
    await whole.forward(xs, train=True)
    one = await whole.backward(dhs, return_d_inputs=True, return_gradients=True)
    parts = await open_session("parts")
    await parts.forward(xs[:, :5], train=True)
    await parts.forward(xs[:, 5:], train=True)
    late = await parts.backward(dhs[:, 5:], 2, return_d_inputs=True, return_gradients=True)
    early = await parts.backward(
        dhs[:, :5], 1, d_state=late.d_state, return_d_inputs=True, return_gradients=True
    )
    dxs = np.concatenate([present(early.d_inputs), present(late.d_inputs)], axis=1)
    np.testing.assert_allclose(dxs, present(one.d_inputs), rtol=1e-10)
    np.testing.assert_allclose(early.d_state, one.d_state, rtol=1e-10)
    dWh = present(early.grads)[1] + present(late.grads)[1]
    np.testing.assert_allclose(dWh, present(one.grads)[1], rtol=1e-10)


@pytest.mark.parametrize("reduction", list(Reduction))
async def test_several_contributions_make_one_step_of_their_sum_or_mean(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    reduction: Reduction,
) -> None:
    """Three sessions' gradients become one step, whatever order they arrived in."""
    spec = await make_model(dtype="float64")
    params = await head_params(replicas[0], tenant, spec)
    sent = []
    for name in "cab":
        client = await open_session(name)
        await client.forward(draw(rng, dtype="float64"), train=True)
        made = await client.backward(draw(rng, size=HIDDEN, dtype="float64"), return_gradients=True)
        sent.append(present(made.grads))
    op = step("m", "u", reduction=reduction)
    done = await replicas[1].updates.update(tenant, op)
    scale = 1 if reduction is Reduction.SUM else 1 / 3
    joined = np.sum([one[1] for one in sent], axis=0) * scale
    after = await head_params(replicas[0], tenant, spec)
    np.testing.assert_allclose(after.Wh, params.Wh - 0.1 * joined, rtol=1e-12, atol=1e-14)
    assert done.contribution_count == 3


@pytest.mark.parametrize(("limit", "is_clipped"), [(0.0, False), (1e-3, True), (1e6, False)])
async def test_clipping_scales_to_the_limit_and_reports_the_norm_before(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
    limit: float,
    *,
    is_clipped: bool,
) -> None:
    """A norm above the limit comes down to it, one below stays, and 0 is off."""
    spec = await make_model(dtype="float64")
    before = await head_params(replicas[0], tenant, spec)
    client = await open_session()
    await client.forward(draw(rng, dtype="float64"), train=True)
    made = await client.backward(draw(rng, size=HIDDEN, dtype="float64"))
    done = await client.update("m", "u", clip_norm=limit)
    after = await head_params(replicas[0], tenant, spec)
    pairs = zip(arrays_of(after), arrays_of(before), strict=True)
    moved = np.sqrt(sum(np.square(new - old).sum() for new, old in pairs))
    np.testing.assert_allclose(done.gradient_norm, made.gradient_norm, rtol=1e-12)
    expected = limit if is_clipped else made.gradient_norm
    np.testing.assert_allclose(moved, 0.1 * expected, rtol=2e-3)
    assert done.clipped == is_clipped


async def test_a_zero_gradient_moves_nothing(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """A step of zero gradients leaves the weights as they were."""
    spec = await make_model(optimizer=Adam(lr=0.1))
    before = await head_params(replicas[0], tenant, spec)
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(np.zeros((ROWS, 3, HIDDEN), np.float32))
    await client.update("m", "u")
    after = await head_params(replicas[1], tenant, spec)
    np.testing.assert_array_equal(after.Wx, before.Wx)
    np.testing.assert_array_equal(after.Wh, before.Wh)


async def test_a_learning_rate_given_counts_for_its_step_alone(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """An Update with learning rate 0 makes a version of the same weights."""
    spec = await make_model()
    before = await head_params(replicas[0], tenant, spec)
    client = await open_session()
    await client.forward(draw(rng), train=True)
    await client.backward(draw(rng, size=HIDDEN))
    await replicas[0].updates.update(tenant, step("m", "u", learning_rate=0.0))
    after = await head_params(replicas[1], tenant, spec)
    np.testing.assert_array_equal(after.Wh, before.Wh)


async def test_sessions_of_different_lengths_are_computed_as_if_alone(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """Chunks of different N and T that run as one batch get what each gets by itself."""
    spec = await make_model()
    params = await head_params(replicas[0], tenant, spec)
    clients = [await open_session(f"s{i}", batch_size=1 + i % 3) for i in range(12)]
    chunks = [draw(rng, 1 + i, rows=1 + i % 3) for i in range(12)]
    done = await asyncio.gather(
        *(
            replicas[0].recurrence.forward(tenant, client.chunk(xs))
            for client, xs in zip(clients, chunks, strict=True)
        )
    )
    for answer, xs in zip(done, chunks, strict=True):
        alone = rnn_forward(params, xs, np.zeros((len(xs), HIDDEN), np.float32)).hs
        np.testing.assert_allclose(present(answer.outputs), alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(present(answer.outputs)[:, -1], answer.state)


async def test_a_batch_of_the_most_rows_works(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """A session of N=1024 streams, replays and trains."""
    await make_model()
    client = await open_session(batch_size=1024)
    xs = draw(rng, rows=1024)
    done = await client.forward(xs, train=True)
    again = await replicas[0].recurrence.forward(
        tenant, client.chunk(xs, 1, previous_token=b"", train=True)
    )
    np.testing.assert_array_equal(again.outputs, done.outputs)
    assert again.replayed
    made = await client.backward(draw(rng, rows=1024, size=HIDDEN))
    assert made.d_state.shape == (1024, HIDDEN)


@pytest.mark.parametrize("wanted", list(ReturnHs))
async def test_returns_the_states_asked_for(
    rng: np.random.Generator, make_model: ModelMaker, open_session: ClientMaker, wanted: ReturnHs
) -> None:
    """ALL, LAST and NONE differ in hs alone, also when answered again."""
    await make_model()
    client = await open_session()
    xs = draw(rng)
    shapes = {
        ReturnHs.ALL: (ROWS, 3, HIDDEN),
        ReturnHs.LAST: (ROWS, 1, HIDDEN),
        ReturnHs.NONE: None,
    }
    first = await client.forward(xs, return_hs=wanted)
    again = await client.forward(xs, chunk_seq=1, previous_token=b"", return_hs=wanted)
    for answer in (first, again):
        shape = None if answer.outputs is None else answer.outputs.shape
        assert shape == shapes[wanted]
        assert answer.state.shape == (ROWS, HIDDEN)
    np.testing.assert_array_equal(first.state, again.state)


@pytest.mark.parametrize("with_state", [True, False])
async def test_without_a_session_runs_from_h0_or_zero_and_leaves_nothing(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    *,
    with_state: bool,
) -> None:
    """A stateless Forward computes from what it is given; the tenant has no session after it."""
    spec = await make_model()
    params = await head_params(replicas[0], tenant, spec)
    xs = draw(rng)
    h0 = rng.standard_normal((ROWS, HIDDEN)).astype(np.float32) if with_state else None
    op = Forward("", 0, 0, b"", xs, model_id="m", state=h0)
    done = await replicas[0].recurrence.forward(tenant, op)
    start = np.zeros((ROWS, HIDDEN), np.float32) if h0 is None else h0
    np.testing.assert_array_equal(done.outputs, rnn_forward(params, xs, start).hs)
    assert await replicas[0].sessions.list_page(tenant, 10, "", model_id="") == ([], "")


async def test_huge_gradients_are_refused_before_they_count(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """Gradients that overflow are NON_FINITE_RESULT, and nothing waits for an Update."""
    await make_model()
    client = await open_session()
    await client.forward(draw(rng), train=True)
    dhs = np.full((ROWS, 3, HIDDEN), 3e38, np.float32)
    with np.errstate(all="ignore"):
        refused = await refusal(client.backward(dhs))
    assert refused.reason == "NON_FINITE_RESULT"
    empty = await refusal(client.update("m", "u"))
    assert empty.reason == "NO_GRADIENTS"


async def test_an_update_that_overflows_changes_nothing(
    replicas: tuple[Replica, Replica],
    tenant: str,
    rng: np.random.Generator,
    make_model: ModelMaker,
    open_session: ClientMaker,
) -> None:
    """Weights that would become infinite are NON_FINITE_RESULT; the head and what waits stay."""
    await make_model(optimizer=SGD(lr=1e3))
    client = await open_session()
    head = await head_of(replicas[0], tenant)
    await client.forward(np.zeros((ROWS, 3, 3), np.float32), train=True)
    await client.backward(np.full((ROWS, 3, HIDDEN), 1e36, np.float32))
    op = step("m", "u", Selector("s", client.epoch, (1,)))
    with np.errstate(all="ignore"):
        refused = await refusal(replicas[0].updates.update(tenant, op))
    assert refused.reason == "NON_FINITE_RESULT"
    assert await head_of(replicas[1], tenant) == head
    view = await replicas[0].models.get(ModelKey(tenant, "m"))
    assert view.waiting_count == 1


async def test_training_a_default_replica_pair_uses_fresh_heads(
    make_replica: ReplicaMaker, tenant: str, rng: np.random.Generator, make_model: ModelMaker
) -> None:
    """A Forward with the version that an Update returned as its minimum runs with it anywhere."""
    await make_model()
    slow = [await make_replica(head_max_age_ms=60_000) for _ in range(2)]
    opened = await open_on(slow[0], tenant)
    client = Client(slow, tenant, "s", opened.session.epoch)
    version = await head_of(slow[0], tenant)
    for k in range(1, 6):
        done = await client.forward(draw(rng), train=True, minimum=version)
        assert done.version == version
        await client.backward(draw(rng, size=HIDDEN))
        version = (await client.update("m", f"u{k}", expected=version)).version
