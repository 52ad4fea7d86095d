"""A store that lost acknowledged writes, in one slot or in both, is healed from the client's log."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn

if TYPE_CHECKING:
    from collections.abc import Callable

D, H = 3, 4


@pytest.fixture(autouse=True)
def _model(live: timernn.Client, model_id: str) -> None:
    live.create_model(model_id, input_size=D, hidden_size=H, seed=1, optimizer=timernn.Adam())


class Run:
    """A training run of fixed data over one or more sessions."""

    def __init__(
        self, client: timernn.Client, model_id: str, sessions: int = 1, name: str = ""
    ) -> None:
        rng = np.random.default_rng(4)
        self._data = rng.normal(size=(40, sessions, 1, 3, D))
        self._client, self._model_id = client, model_id
        # Named, because gradients are summed in the order of the sessions' names.
        names = [f"{name or model_id}-{position}" for position in range(sessions)]
        self.sessions = [client.session(model_id, each, train=True) for each in names]
        self.outputs: list[Any] = []
        self.steps = 0

    def step(self, between: Callable[[str], None] = lambda _: None) -> None:
        """Make one step; `between` is called between the calls, with the name of the next one."""
        for session, xs in zip(self.sessions, self._data[self.steps], strict=True):
            between("forward")
            hs = session.forward(xs)
            self.outputs.append(hs)
            between("backward")
            session.backward(hs - 0.1)
        between("update")
        self._client.update(self._model_id, sessions=self.sessions, lr=0.05, clip_norm=1.0)
        self.steps += 1

    def end(self) -> tuple[timernn.Version, list[Any]]:
        """Close the sessions; return the last version and every output."""
        for session in self.sessions:
            session.close()
        result = self.sessions[0].last_update
        assert result is not None
        return result.version, self.outputs


def undisturbed(live: timernn.Client, model_id: str, steps: int, sessions: int = 1) -> Any:
    """Return the end of the same run on a model of the same seed to which nothing happens."""
    name = f"{model_id}-undisturbed"
    live.create_model(name, input_size=D, hidden_size=H, seed=1, optimizer=timernn.Adam())
    run = Run(live, name, sessions, model_id)
    for _ in range(steps):
        run.step()
    return run.end()


def assert_same(got: Any, wanted: Any) -> None:
    """Compare versions by digest and outputs bit for bit."""
    assert got[0] == wanted[0]
    for mine, theirs in zip(got[1], wanted[1], strict=True):
        assert np.array_equal(mine, theirs)


def test_lost_chunks_are_applied_again(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """After the session's slot was set back by several chunks, the next output is right."""
    session, twin = live.session(model_id), live.session(model_id)
    given = [rng.normal(size=(1, 3, D)) for _ in range(9)]
    slot = slots.of_session(session.session_id)
    for position, xs in enumerate(given):
        if position == 2:
            slot.keep()
        if position in (3, 8):
            slot.lose()
        np.testing.assert_allclose(session.forward(xs), twin.forward(xs), atol=1e-6)
    assert session.get_info().chunk_seq == 9


def test_a_session_lost_whole_is_begun_again(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """From its epoch's first state, with the same epoch and numbers."""
    h = rng.normal(size=(1, H))
    session, twin = (live.session(model_id, initial_state=h) for _ in range(2))
    slot = slots.of_session(session.session_id)
    slot._kept = {}
    given = [rng.normal(size=(1, 3, D)) for _ in range(4)]
    for position, xs in enumerate(given):
        if position == 3:
            slot.lose()
        np.testing.assert_allclose(session.forward(xs), twin.forward(xs), atol=1e-6)


def test_a_lost_epoch_is_begun_again(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """A state that was set is set again, also when it is read or set anew first."""
    session = live.session(model_id)
    xs, h = rng.normal(size=(1, 3, D)), rng.normal(size=(1, H)).astype("f4")
    session.forward(xs)
    slot = slots.of_session(session.session_id)
    session.set_state(h)
    epoch = session.epoch
    slot.lose()
    assert np.array_equal(session.state, h)
    slot.lose()
    session.set_state(h + 1)
    assert session.epoch > epoch
    slot.lose()
    hs = session.forward(xs)
    np.testing.assert_allclose(hs, live.forward(model_id, xs, h0=h + 1), atol=1e-6)


def test_a_fork_copies_the_healed_state(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """What was lost is applied again before it is copied."""
    session = live.session(model_id)
    session.forward(rng.normal(size=(1, 3, D)))
    slot = slots.of_session(session.session_id)
    session.forward(rng.normal(size=(1, 3, D)))
    slot.lose()
    assert np.array_equal(session.fork().h, session.h)


def test_a_stream_heals_on_its_way(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """Lost under chunks in flight, the outputs are those of an undisturbed one."""
    given = [rng.normal(size=(1, 3, D)) for _ in range(20)]
    session, twin = live.session(model_id), live.session(model_id)
    slot = slots.of_session(session.session_id)
    outputs = []
    for hs in session.stream(given):
        outputs.append(hs)
        if len(outputs) in (5, 12):
            slot.lose()
        if len(outputs) == 8:
            slot.keep()
    for hs, expected in zip(outputs, twin.stream(given), strict=True):
        np.testing.assert_allclose(hs, expected, atol=1e-6)


def test_a_frame_heals_on_its_way(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """One session's loss is healed, the others never notice."""
    sessions = [live.session(model_id) for _ in range(3)]
    twin = live.session(model_id)
    slot = slots.of_session(sessions[1].session_id)
    for position in range(4):
        if position == 3:
            slot.lose()
        xs = rng.normal(size=(1, 3, D))
        expected = twin.forward(xs)
        for hs in live.frame([(session, xs) for session in sessions]):
            assert not isinstance(hs, timernn.Error), hs
            np.testing.assert_allclose(hs, expected, atol=1e-6)


@pytest.mark.parametrize("lost", ["session", "model", "both"])
@pytest.mark.parametrize("before", ["forward", "backward", "update"])
def test_training_ends_as_if_nothing_had_happened(
    live: timernn.Client, model_id: str, slots: Any, lost: str, before: str
) -> None:
    """Whatever slot is set back before whatever call: the same digest, the same outputs."""
    run = Run(live, model_id)
    run.step()
    session, model = slots.of_session(run.sessions[0].session_id), slots.of_model(model_id)

    def lose(comes: str) -> None:
        if comes == before and run.steps == 3:
            if lost != "model":
                session.lose()
            if lost != "session":
                model.lose()

    for _ in range(5):
        run.step(lose)
    assert_same(run.end(), undisturbed(live, model_id, 6))


@pytest.mark.parametrize("lost", ["sessions", "model", "both"])
def test_sessions_that_train_together_heal_together(
    live: timernn.Client, model_id: str, slots: Any, lost: str
) -> None:
    """Their updates depend on each other's chunks, and their chunks on the updates."""
    run = Run(live, model_id, sessions=3)
    run.step()
    sessions = [slots.of_session(session.session_id) for session in run.sessions]
    model = slots.of_model(model_id)

    def lose(comes: str) -> None:
        if comes == "update" and run.steps == 3:
            for slot in sessions[:2] if lost != "model" else []:
                slot.lose()
            if lost != "sessions":
                model.lose()

    for _ in range(4):
        run.step(lose)
    assert_same(run.end(), undisturbed(live, model_id, 5, sessions=3))


@pytest.mark.parametrize("seed", range(3))
def test_random_losses_change_nothing(
    live: timernn.Client, model_id: str, slots: Any, seed: int
) -> None:
    """Slots set back at random times, each on its own, between any two calls to any replica."""
    chance = random.Random(seed)
    wanted = undisturbed(live, model_id, 10, sessions=3)
    run = Run(live, model_id, sessions=3)
    kept = [slots.of_session(session.session_id) for session in run.sessions]
    kept.append(slots.of_model(model_id))
    losses = 0

    def disturb(_: str) -> None:
        nonlocal losses
        live._core.context.caller.address = chance.randrange(2)
        for slot in kept:
            if chance.random() < 0.15:
                slot.keep()
            if chance.random() < 0.06:
                slot.lose()
                losses += 1

    for _ in range(10):
        run.step(disturb)
    assert losses > 5
    assert_same(run.end(), wanted)


def test_contributions_of_an_ended_epoch_heal(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """A contribution whose epoch has ended meanwhile is made again for the update that takes it."""
    xs = rng.normal(size=(1, 3, D))
    versions = []
    for name in (model_id, f"{model_id}-undisturbed"):
        if name != model_id:
            live.create_model(name, input_size=D, hidden_size=H, seed=1, optimizer=timernn.Adam())
        session = live.session(name, train=True)
        slot = slots.of_model(name)
        session.backward(session.forward(xs))
        session.reset_state()
        session.backward(session.forward(xs))
        if name == model_id:
            slot.lose()
        versions.append(session.update(lr=0.1))
    assert versions[0] == versions[1]


def test_an_epoch_does_not_end_over_a_loss(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """A lost training chunk is healed before a new state fences it off from its update."""
    xs = rng.normal(size=(1, 3, D))
    versions = []
    for name in (model_id, f"{model_id}-undisturbed"):
        if name != model_id:
            live.create_model(name, input_size=D, hidden_size=H, seed=1, optimizer=timernn.Adam())
        session = live.session(name, train=True)
        lost = slots.of_session(session.session_id), slots.of_model(name)
        session.backward(session.forward(xs))
        if name == model_id:
            for slot in lost:
                slot.lose()
        session.set_state(np.ones((1, H)))
        versions.append(session.update(lr=0.1))
    assert versions[0] == versions[1]


def test_another_writer_in_the_gap_is_reported(
    live: timernn.Client, model_id: str, slots: Any, rng: np.random.Generator
) -> None:
    """Two histories under the same numbers are never mixed."""
    session = live.session(model_id)
    session.forward(rng.normal(size=(1, 3, D)))
    slot = slots.of_session(session.session_id)
    session.forward(rng.normal(size=(1, 3, D)))
    slot.lose()
    rival = live.session(model_id, session.session_id)
    rival.forward(rng.normal(size=(1, 3, D)))
    with pytest.raises((timernn.HistoryForked, timernn.SeqReused)):
        session.forward(rng.normal(size=(1, 3, D)))


def test_another_trainer_is_distinguished_from_a_loss(
    live: timernn.Client, model_id: str, rng: np.random.Generator
) -> None:
    """A head that went on without loss is a conflict, and the next update may go on from it."""
    one, two = (live.session(model_id, train=True) for _ in range(2))
    with timernn.connect(live._core.context.caller.addresses) as elsewhere:
        two = elsewhere.session(model_id, train=True)
        xs = rng.normal(size=(1, 3, D))
        one.backward(one.forward(xs))
        two.backward(two.forward(xs))
        two.update()
    with pytest.raises(timernn.VersionConflict):
        one.update()
    assert one.update(exclusive=False).number == 3


def test_a_loss_from_before_the_log_is_reported(
    live: timernn.Client, model_id: str, replicas: list[str], slots: Any, rng: np.random.Generator
) -> None:
    """What the log has let go cannot be healed; set_state goes on from the last answer."""
    with timernn.connect(replicas, log_limit=3) as forgetful:
        session = forgetful.session(model_id)
        slot = slots.of_session(session.session_id)
        for _ in range(6):
            session.forward(rng.normal(size=(1, 3, D)))
        slot.lose()
        with pytest.raises(timernn.HistoryLost):
            session.forward(rng.normal(size=(1, 3, D)))
        last = session.h
        session.set_state(last)
        assert np.array_equal(session.state, last)


@pytest.mark.parametrize("begun", ["opened", "trained", "forked", "resumed", "set"])
@pytest.mark.parametrize("mend", ["set_state", "reset_state"])
def test_a_new_state_recovers_a_session_whose_beginning_was_lost(
    live: timernn.Client,
    model_id: str,
    replicas: list[str],
    slots: Any,
    rng: np.random.Generator,
    begun: str,
    mend: str,
) -> None:
    """However its epoch began, a log that is too short for it does not end the session object."""
    with timernn.connect(replicas, log_limit=3) as forgetful:
        first = live.session(model_id)
        first.forward(rng.normal(size=(1, 3, D)))
        session = forgetful.session(
            model_id, first.session_id if begun == "resumed" else None, train=begun == "trained"
        )
        if begun == "forked":
            session = session.fork()
        slot = slots.of_session(session.session_id)
        if begun == "set":
            session.set_state(np.ones((1, H)))
        else:
            slot.forget()
        for _ in range(6):
            hs = session.forward(rng.normal(size=(1, 3, D)))
            if begun == "trained":
                session.backward(hs)
        last = session.h if mend == "set_state" else np.zeros((1, H))
        slot.lose()
        with pytest.raises(timernn.HistoryLost):
            session.forward(rng.normal(size=(1, 3, D)))
        session.set_state(last) if mend == "set_state" else session.reset_state()
        assert np.array_equal(session.state, last)
        twin, xs = live.session(model_id, initial_state=last), rng.normal(size=(1, 3, D))
        np.testing.assert_allclose(session.forward(xs), twin.forward(xs), atol=1e-6)


def test_a_version_that_is_gone_is_raised_once(
    live: timernn.Client, model_id: str, replicas: list[str], slots: Any, rng: np.random.Generator
) -> None:
    """A client that did not make it cannot bring it back: it gets an error, and then goes on."""
    xs = rng.normal(size=(1, 3, D))
    with timernn.connect(replicas) as reader:
        session = reader.session(model_id)
        slot = slots.of_model(model_id)
        trainer = live.session(model_id, train=True)
        trainer.backward(trainer.forward(xs))
        made = trainer.update()
        reader.get_model(model_id)
        session.forward(xs)
        assert session.version == made
        slot.lose()
        reader._core.context.caller.address = (
            1  # the other one may still serve the head it has read last
        )
        with pytest.raises((timernn.VersionGone, timernn.WeightsForked)):
            session.forward(xs)
        session.forward(xs)
