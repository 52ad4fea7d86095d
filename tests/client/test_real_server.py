"""Through real replicas on a real store: the outputs are those of a local TimeRNN."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from rnn_engine import TimeRNN

if TYPE_CHECKING:
    from pathlib import Path

D, H = 3, 5


@pytest.fixture
def local(live: timernn.Client, model_id: str) -> TimeRNN:
    """A model on the server, and the same as a local network."""
    live.create_model(model_id, input_size=D, hidden_size=H, seed=3, optimizer=timernn.Adam())
    weights = live.get_weights(model_id)
    return TimeRNN(weights.Wx, weights.Wh, weights.b, stateful=True)


def chunks(rng: np.random.Generator, count: int, rows: int = 1) -> list[Any]:
    """Draw chunks of 1 to 8 steps."""
    return [rng.normal(size=(rows, rng.integers(1, 9), D)).astype("f4") for _ in range(count)]


def test_forward_equals_a_local_network(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """Chunk by chunk, over both replicas in turn."""
    session = live.session(model_id)
    for position, xs in enumerate(chunks(rng, 10)):
        live._core.context.caller.address = position % 2
        np.testing.assert_allclose(session.forward(xs), local.forward(xs), atol=1e-6)
    assert np.array_equal(session.state, session.h)


def test_stream_equals_a_local_network(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """A pipelined stream returns the outputs of a local network in order."""
    given = chunks(rng, 30)
    session = live.session(model_id)
    for xs, hs in zip(given, session.stream(iter(given)), strict=True):
        np.testing.assert_allclose(hs, local.forward(xs), atol=1e-6)


def test_frames_equal_a_local_network(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """Many sessions, each with its own state."""
    sessions = [live.session(model_id) for _ in range(4)]
    given = [chunks(rng, 4) for _ in range(5)]
    got = [live.frame(zip(sessions, frame, strict=True)) for frame in given]
    for position in range(4):
        local.reset_state()
        for frame, outputs in zip(given, got, strict=True):
            hs = outputs[position]
            assert not isinstance(hs, timernn.Error)
            np.testing.assert_allclose(hs, local.forward(frame[position]), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_split_backward_is_exact(
    live: timernn.Client,
    model_id: str,
    local: TimeRNN,
    rng: np.random.Generator,
    steps: int,
) -> None:
    """Cut along T or not, the gradients are those of the one long chunk."""
    xs, dhs = rng.normal(size=(2, 10, D)), rng.normal(size=(2, 10, H))
    session = live.session(model_id, batch_size=2, train=True)
    object.__setattr__(session._core.state.bounds, "chunk_steps", steps * 2)
    try:
        session.forward(xs)
        dxs = session.backward(dhs, return_gradients=True)
    finally:
        object.__setattr__(session._core.state.bounds, "chunk_steps", 4096)
    local.forward(xs.astype("f4"))
    np.testing.assert_allclose(dxs, local.backward(dhs.astype("f4")), atol=1e-5)
    assert session.gradients is not None
    got = (session.gradients.dWx, session.gradients.dWh, session.gradients.db)
    for mine, theirs in zip(got, local.grads, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert session.gradient_norm == pytest.approx(session.gradients.norm, rel=1e-5)


def test_a_step_in_the_same_call_equals_one_apart(
    live: timernn.Client, model_id: str, rng: np.random.Generator
) -> None:
    """Backward with a step ends at the same weights, bit for bit, as backward and update."""
    xs, dhs = rng.normal(size=(1, 6, D)), rng.normal(size=(1, 6, H))
    versions = []
    for name in (f"{model_id}a", f"{model_id}b"):
        live.create_model(name, input_size=D, hidden_size=H, seed=5, optimizer=timernn.Adam())
        session = live.session(name, train=True)
        session.forward(xs)
        if name.endswith("a"):
            session.backward(dhs, update=timernn.Step(lr=0.1, clip_norm=0.5))
        else:
            session.backward(dhs)
            session.update(lr=0.1, clip_norm=0.5)
        versions.append(session.version)
    assert versions[0] == versions[1]


def test_what_a_refused_step_recorded_is_taken_by_the_next(
    live: timernn.Client,
    model_id: str,
    local: TimeRNN,
    replicas: list[str],
    rng: np.random.Generator,
) -> None:
    """Backward is done and says so, its step is refused: an update of its own takes the gradient."""
    session = live.session(model_id, train=True)
    hs = session.forward(rng.normal(size=(1, 3, D)))
    with timernn.connect(replicas) as rival:
        rival.put_weights(model_id, Wx=np.ones((D, H)), Wh=np.ones((H, H)), b=np.ones(H))
    with pytest.raises(timernn.VersionConflict, match="chunk 1 is recorded") as refused:
        session.backward(hs, update=timernn.Step())
    assert refused.value.metadata["recorded"] == "true"
    session.update(exclusive=False)
    assert session.last_update is not None
    assert session.last_update.contribution_count == 1
    with pytest.raises(timernn.TapeMissing, match="no forward in training mode"):
        session.backward(hs)


async def test_what_a_refused_step_recorded_is_taken_by_the_next_awaited(
    live: timernn.Client, model_id: str, local: TimeRNN, replicas: list[str]
) -> None:
    """The same of the other frontend, by an update over sessions."""
    async with timernn.aio.connect(replicas, timeout=20) as client:
        session = await client.session(model_id, train=True)
        hs = await session.forward(np.ones((1, 3, D)))
        live.put_weights(model_id, Wx=np.ones((D, H)), Wh=np.ones((H, H)), b=np.ones(H))
        with pytest.raises(timernn.VersionConflict, match="chunk 1 is recorded"):
            await session.backward(hs, update=timernn.Step())
        head = (await client.get_model(model_id)).head
        made = await client.update(model_id, sessions=[session], expected_version=head)
        assert made.contribution_count == 1


def test_weights_go_out_and_come_in(
    live: timernn.Client, model_id: str, local: TimeRNN, tmp_path: Path
) -> None:
    """By arrays, by a file, by an open file; the same content again."""
    before = live.get_weights(model_id)
    made = live.put_weights(model_id, Wx=before.Wx * 2, Wh=before.Wh.T, b=before.b + 1)
    after = live.get_weights(model_id, made)
    assert np.array_equal(after.Wx, before.Wx * 2)
    assert np.array_equal(after.Wh, before.Wh.T)
    assert np.array_equal(after.b, before.b + 1)
    live.export_weights(model_id, tmp_path / "w.safetensors", version=before.version)
    live.import_weights(model_id, tmp_path / "w.safetensors")
    buffer = io.BytesIO()
    live.export_weights(model_id, buffer)
    assert buffer.getvalue() == (tmp_path / "w.safetensors").read_bytes()
    assert np.array_equal(live.get_weights(model_id).Wx, before.Wx)


async def test_a_model_is_made_of_a_file(
    live: timernn.Client, model_id: str, local: TimeRNN, replicas: list[str], tmp_path: Path
) -> None:
    """Its first version has the content of the file, the optimizer's state included, from either frontend."""
    live.export_weights(model_id, tmp_path / "w", include_moments=True)
    old = live.get_model(model_id)
    spec: dict[str, Any] = {"dtype": old.dtype, "optimizer": old.optimizer}
    spec |= {"input_size": D, "hidden_size": H}
    made = live.import_model(f"{model_id}-copy", tmp_path / "w", **spec)
    assert (made.head.number, made.head.digest) == (1, old.head.digest)
    async with timernn.aio.connect(replicas, timeout=20) as client:
        with pytest.raises(timernn.ModelExists):
            await client.import_model(f"{model_id}-copy", tmp_path / "w", **spec)


async def test_a_state_is_read_without_opening_the_session(
    live: timernn.Client, model_id: str, local: TimeRNN, replicas: list[str]
) -> None:
    """Its time to live does not start again."""
    with live.session(model_id) as session:
        hs = session.forward(np.ones((1, 3, D)))
        expires = live.get_session(session.session_id).expire_time
        info, state = live.get_state(session.session_id)
        async with timernn.aio.connect(replicas, timeout=20) as client:
            again, same = await client.get_state(session.session_id)
    assert np.array_equal(state, hs[:, -1])
    assert np.array_equal(same, state)
    assert (info.expire_time, again.expire_time) == (expires, expires)


def test_weights_of_another_shape_are_refused(
    live: timernn.Client, model_id: str, local: TimeRNN
) -> None:
    """Each of the three has its shape."""
    with pytest.raises(timernn.BadTensor, match="Wh"):
        live.put_weights(model_id, Wx=np.ones((D, H)), Wh=np.ones((H, D)), b=np.ones(H))


def test_checkpoints_keep_a_version(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """Restored, a checkpoint is the next version with the old content."""
    before = live.get_weights(model_id)
    live.create_checkpoint(model_id, "best")
    live.put_weights(model_id, Wx=before.Wx * 2, Wh=before.Wh, b=before.b)
    assert [c.checkpoint_id for c in live.list_checkpoints(model_id)] == ["best"]
    live.restore_checkpoint(model_id, "best")
    assert np.array_equal(live.get_weights(model_id).Wx, before.Wx)
    assert live.delete_checkpoint(model_id, "best")
    with pytest.raises(timernn.CheckpointNotFound):
        live.delete_checkpoint(model_id, "best")
    assert not live.delete_checkpoint(model_id, "best", missing_ok=True)


def test_models_are_listed_shown_and_deleted(
    live: timernn.Client, model_id: str, local: TimeRNN
) -> None:
    """A deleted model is reported as deleted."""
    assert live.get_model(model_id).optimizer == timernn.Adam(0.001, 0.9, 0.999, 1e-8)
    assert model_id in [model.model_id for model in live.list_models(page_size=1)]
    assert live.delete_model(model_id)
    with pytest.raises(timernn.ModelNotFound):
        live.get_model(model_id)


def test_sessions_are_resumed_forked_and_closed(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """A name leads back to the state; a fork goes its own way."""
    xs, ys = rng.normal(size=(1, 4, D)), rng.normal(size=(1, 4, D))
    with live.session(model_id, f"{model_id}-7") as session:
        session.forward(xs)
    again = live.session(model_id, f"{model_id}-7")
    assert (again.chunk_seq, again.epoch) == (session.chunk_seq, session.epoch)
    fork = again.fork()
    assert np.array_equal(fork.forward(ys), again.forward(ys))
    fork.forward(xs)
    assert fork.session_id in [s.session_id for s in live.list_sessions(model_id, page_size=1)]
    assert fork.close()
    assert not fork.close()
    with pytest.raises(timernn.SessionClosed):
        fork.forward(xs)
    with pytest.raises(timernn.SessionExists):
        live.session(model_id, f"{model_id}-7", on_exists="fail")
    reset = live.session(model_id, f"{model_id}-7", on_exists="reset")
    assert reset.epoch > again.epoch
    with pytest.raises(timernn.EpochFenced):
        again.forward(xs)


def test_a_session_that_must_exist_is_not_begun_in_silence(
    live: timernn.Client, model_id: str, local: TimeRNN, slots: Any, rng: np.random.Generator
) -> None:
    """Live it goes on and says so; never opened, expired and closed have errors of their own."""
    name = f"{model_id}-7"
    with pytest.raises(timernn.SessionNotFound):
        live.session(model_id, name, must_exist=True)
    first = live.session(model_id, name)
    hs = first.forward(rng.normal(size=(1, 4, D)))
    again = live.session(model_id, name, must_exist=True)
    assert (first.resumed, again.resumed) == (False, True)
    np.testing.assert_array_equal(again.h, hs[:, -1])
    slots.expire(name)
    with pytest.raises(timernn.SessionExpired):
        live.session(model_id, name, on_exists="must_exist")
    assert not live.session(model_id, name).resumed
    live.close_session(name)
    with pytest.raises(timernn.SessionClosed):
        live.session(model_id, name, must_exist=True)


def test_a_session_that_must_exist_needs_a_name(live: timernn.Client, model_id: str) -> None:
    """And goes with no other wish for what to do."""
    with pytest.raises(timernn.BadField, match="session_id"):
        live.session(model_id, must_exist=True)
    with pytest.raises(timernn.BadField, match="on_exists"):
        live.session(model_id, "x", must_exist=True, on_exists="reset")


def test_a_model_that_is_there_may_be_created_again(live: timernn.Client, model_id: str) -> None:
    """With exist_ok the same one is returned as it stands; another is ModelExists with what differs."""
    made = live.create_model(model_id, input_size=D, hidden_size=H, seed=3)
    version = live.put_weights(model_id, Wx=np.zeros((D, H)), Wh=np.zeros((H, H)), b=np.zeros(H))
    again = live.create_model(model_id, input_size=D, hidden_size=H, seed=9, exist_ok=True)
    assert (again.incarnation, again.head) == (made.incarnation, version)
    with pytest.raises(timernn.ModelExists, match=f"hidden_size: it has {H}, asked for 9"):
        live.create_model(model_id, input_size=D, hidden_size=9, exist_ok=True)
    with pytest.raises(timernn.ModelExists):
        live.create_model(model_id, input_size=D, hidden_size=H)


def test_state_can_be_set_and_reset(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """As on a local network."""
    xs, h = rng.normal(size=(2, 3, D)).astype("f4"), rng.normal(size=(2, H)).astype("f4")
    session = live.session(model_id, batch_size=2)
    session.set_state(h)
    local.set_state(h)
    np.testing.assert_allclose(session.forward(xs), local.forward(xs), atol=1e-6)
    session.reset_state()
    local.reset_state()
    np.testing.assert_allclose(session.forward(xs), local.forward(xs), atol=1e-6)


def test_a_session_may_begin_with_a_state(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """Its first chunk continues it; without a session h0 does the same."""
    xs, h = rng.normal(size=(1, 3, D)), rng.normal(size=(1, H))
    hs = live.session(model_id, initial_state=h).forward(xs)
    np.testing.assert_allclose(live.forward(model_id, xs, h0=h), hs, atol=1e-6)


def test_float64_stays_float64(
    live: timernn.Client, model_id: str, rng: np.random.Generator
) -> None:
    """A model of doubles rounds nothing to float32."""
    live.create_model(model_id, input_size=D, hidden_size=H, dtype="float64")
    weights = live.get_weights(model_id)
    network = TimeRNN(weights.Wx, weights.Wh, weights.b, stateful=True)
    xs = rng.normal(size=(1, 9, D))
    hs = live.session(model_id).forward(xs)
    assert hs.dtype == np.float64
    np.testing.assert_allclose(hs, network.forward(xs), rtol=1e-13)


def test_gradients_can_be_discarded(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """What was dropped is not waited for, by the server or by the session."""
    session = live.session(model_id, train=True)
    for _ in range(2):
        hs = session.forward(rng.normal(size=(1, 3, D)))
        session.backward(hs)
    session.forward(rng.normal(size=(1, 3, D)))
    dropped = session.discard_gradients()
    assert (dropped.contribution_count, dropped.tape_count) == (2, 1)
    with pytest.raises(timernn.NoGradients):
        session.update()
    with pytest.raises(timernn.TapeMissing):
        session.backward(hs)


def test_a_program_started_again_takes_what_waits(
    live: timernn.Client,
    replicas: list[str],
    model_id: str,
    local: TimeRNN,
    rng: np.random.Generator,
) -> None:
    """Another client of the session lists its tapes and contributions, and its update takes them."""
    first = live.session(model_id, f"{model_id}-7", train=True)
    first.backward(first.forward(rng.normal(size=(1, 3, D))))
    xs = rng.normal(size=(1, 3, D))
    hs = first.forward(xs)
    with timernn.connect(replicas) as restarted:
        again = restarted.session(model_id, f"{model_id}-7", train=True, must_exist=True)
        kinds = [(one.epoch, one.chunk_seq, one.kind) for one in again.waiting]
        assert kinds == [(first.epoch, 1, "contribution"), (first.epoch, 2, "tape")]
        assert again.waiting[1].token == restarted.get_session(first.session_id).state_token
        with pytest.raises(timernn.NoGradients, match="take_waiting"):
            again.update()
        np.testing.assert_array_equal(again.forward(xs, chunk_seq=2), hs)
        again.backward(hs)
        again.update(take_waiting=True)
        assert again.last_update is not None
        assert again.last_update.contribution_count == 2
        assert again.waiting == []
        with pytest.raises(timernn.NoGradients):
            again.update(take_waiting=True)


def test_several_sessions_take_what_waits(
    live: timernn.Client,
    replicas: list[str],
    model_id: str,
    local: TimeRNN,
    rng: np.random.Generator,
) -> None:
    """One step over the sessions of a program that ended; nobody else's contribution is in it."""
    names = [f"{model_id}-{i}" for i in range(3)]
    for name in names:
        session = live.session(model_id, name, train=True)
        session.backward(session.forward(rng.normal(size=(1, 3, D))))
    with timernn.connect(replicas) as restarted:
        sessions = [restarted.session(model_id, name, train=True) for name in names[:2]]
        taken = restarted.update(model_id, sessions=sessions, take_waiting=True)
        assert taken.contribution_count == 2
        assert restarted.get_model(model_id).waiting_contribution_count == 1


def test_a_step_sent_again_by_a_program_started_again_is_made_once(
    live: timernn.Client,
    replicas: list[str],
    model_id: str,
    local: TimeRNN,
    rng: np.random.Generator,
) -> None:
    """All of it again, with the same data and numbers: the same answers, and no second step."""
    steps = [rng.normal(size=(1, 3, D)) for _ in range(3)]
    first = live.session(model_id, f"{model_id}-7", train=True)
    for xs in steps[:2]:
        hs = first.forward(xs)
        dxs = first.backward(hs)
        before, made = live.get_model(model_id).head, first.update()
    with timernn.connect(replicas) as restarted:
        again = restarted.session(model_id, f"{model_id}-7", train=True)
        # The program had read the head before the step of the killed one came through.
        restarted._core.context.known.set_version(model_id, before)
        np.testing.assert_array_equal(again.forward(steps[1], chunk_seq=2), hs)
        np.testing.assert_array_equal(again.backward(hs), dxs)
        assert again.update() == made
        assert restarted.get_model(model_id).head == made
        again.forward(steps[2])
        assert again.chunk_seq == 3


def test_a_chunk_is_gone_back_to_only_where_it_can_be(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """Beyond the next, other data, or too long ago: refused, and the session stands where it stood."""
    session = live.session(model_id, train=True)
    chunk = [rng.normal(size=(1, 3, D)) for _ in range(5)]
    for xs in chunk[:4]:
        session.backward(session.forward(xs))
    with pytest.raises(timernn.SeqGap, match="the next is 5, got 7"):
        session.forward(chunk[4], chunk_seq=7)
    with pytest.raises(timernn.SeqReused):
        session.forward(chunk[4], chunk_seq=4)
    with pytest.raises(timernn.ReplayWindowPassed):
        session.forward(chunk[0], chunk_seq=1)
    assert session.chunk_seq == 4
    session.forward(chunk[4], chunk_seq=5)
    assert session.chunk_seq == 5


def test_the_chunks_of_a_step_can_all_be_sent_again(
    live: timernn.Client,
    replicas: list[str],
    model_id: str,
    local: TimeRNN,
    rng: np.random.Generator,
) -> None:
    """While backwards are to come the states are kept that the outputs are computed from."""
    chunk = [rng.normal(size=(1, 3, D)) for _ in range(6)]
    first = live.session(model_id, f"{model_id}-7", train=True)
    for xs in chunk[:2]:
        first.backward(first.forward(xs))
    outputs = [first.forward(xs) for xs in chunk[2:]]
    with timernn.connect(replicas) as restarted:
        again = restarted.session(model_id, f"{model_id}-7", train=True)
        np.testing.assert_array_equal(again.forward(chunk[2], chunk_seq=3), outputs[0])
        for xs, hs in zip(chunk[3:], outputs[1:], strict=True):
            np.testing.assert_array_equal(again.forward(xs), hs)
        for hs in reversed(outputs):
            again.backward(hs, dh_next=again.dh)
        again.update(take_waiting=True)
        assert again.last_update is not None
        assert again.last_update.contribution_count == 6


def test_an_update_may_take_all_that_waits(
    live: timernn.Client, model_id: str, local: TimeRNN, rng: np.random.Generator
) -> None:
    """Whoever contributed; the sessions know that theirs are taken."""
    sessions = [live.session(model_id, train=True) for _ in range(3)]
    for session in sessions:
        session.backward(session.forward(rng.normal(size=(1, 3, D))))
    assert live.update(model_id).contribution_count == 3
    with pytest.raises(timernn.NoGradients):
        sessions[0].update()


def test_the_server_is_pinged(live: timernn.Client, replicas: list[str]) -> None:
    """Health and latency of the replica in use."""
    ping = live.ping()
    assert ping.serving
    assert ping.address == replicas[0]
    assert 0 < ping.latency_s < 5


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_killed_replica_is_not_noticed_by_a_stream(
    live: timernn.Client,
    model_id: str,
    local: TimeRNN,
    doomed: Any,
    replicas: list[str],
    rng: np.random.Generator,
    in_flight: int,
) -> None:
    """Killed without a word under chunks in flight, another one goes on with the same outputs."""
    given = chunks(rng, 60)
    with timernn.connect([doomed, replicas[0]], timeout=20) as client:
        stream = client.session(model_id).stream(given, in_flight=in_flight)
        for position, (xs, hs) in enumerate(zip(given, stream, strict=True)):
            if position == 20:
                doomed.process.kill()
            np.testing.assert_allclose(hs, local.forward(xs), atol=1e-6)


def test_a_killed_replica_is_not_noticed_by_training(
    live: timernn.Client, model_id: str, doomed: Any, replicas: list[str], rng: np.random.Generator
) -> None:
    """Tapes, gradients and steps are in the store: the weights are those of an undisturbed run."""
    given = chunks(rng, 20)
    made = []
    with timernn.connect([doomed, replicas[0]], timeout=20) as killed:
        for name, client in ((f"{model_id}a", live), (f"{model_id}b", killed)):
            live.create_model(name, input_size=D, hidden_size=H, seed=5, optimizer=timernn.Adam())
            session = client.session(name, train=True)
            for position, xs in enumerate(given):
                hs = session.forward(xs)
                if client is killed and position == 10:
                    doomed.process.kill()
                session.backward(hs)
                session.update(lr=0.01)
            made.append(session.version)
    assert made[0] == made[1]


def test_sessions_are_listed_of_one_model_or_of_all(live: timernn.Client, model_id: str) -> None:
    """Without a model's name those of every model come."""
    live.create_model(model_id, input_size=D, hidden_size=H)
    session = live.session(model_id)
    assert [info.session_id for info in live.list_sessions(model_id)] == [session.session_id]
    assert session.session_id in {info.session_id for info in live.list_sessions()}
