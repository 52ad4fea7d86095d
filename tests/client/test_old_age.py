"""A client that comes back late: what has ended is not taken for lost, nor recorded again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis

import timernn
from service.domain.types import ModelKey, SessionKey
from service.store import keys
from timernn._core.ages import Ages, Lifetime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.store.embedded import EmbeddedStore

    Way = Callable[[timernn.Client, timernn.Session, Any], Any]

D, H = 3, 4
TTL_S = 3600.0
TAPE_TTL_S = 900.0


@pytest.fixture
def model(live: timernn.Client, model_id: str) -> str:
    """A model on the real replicas."""
    live.create_model(model_id, input_size=D, hidden_size=H, seed=1, optimizer=timernn.Adam())
    return model_id


@pytest.fixture
def raw(store: EmbeddedStore) -> Iterator[Any]:
    """A plain connection to the store, to let its records' times pass."""
    with redis.Redis.from_url(store.url) as client:
        yield client


def sleep(client: timernn.Client, seconds: float) -> None:
    """Let the clock of a client run on, as it does while the machine is suspended."""
    now = client._core.context.ages.read
    client._core.context.ages.read = lambda: tuple(each + seconds for each in now())


def forget_session(raw: Any, session: timernn.Session) -> None:
    """Let the times of a session and of its marker pass."""
    tag = keys.session_tag(SessionKey("default", session.session_id))
    for key in raw.scan_iter(tag.replace(b"[", b"\\[") + b"*"):
        raw.pexpire(key, 0)


def forget_recorded(raw: Any, model_id: str) -> None:
    """Let the time pass for which the names of recorded contributions are remembered."""
    tag = keys.model_tag(ModelKey("default", model_id))
    for name in raw.zrange(keys.expiry_key(tag), 0, -1):
        raw.hdel(keys.contributions_key(tag), name)
        raw.zrem(keys.expiry_key(tag), name)


def waiting(client: timernn.Client, model_id: str) -> int:
    """Return how many gradients wait for an update."""
    return client.get_model(model_id).waiting_contribution_count


def framed(client: timernn.Client, session: timernn.Session, xs: Any) -> Any:
    """Send a chunk in a frame."""
    (outcome,) = client.frame([(session, xs)])
    if isinstance(outcome, timernn.Error):
        raise outcome
    return outcome


WAYS: dict[str, Way] = {
    "forward": lambda _, session, xs: session.forward(xs),
    "stream": lambda _, session, xs: next(iter(session.stream([xs]))),
    "frame": framed,
    "state": lambda _, session, __: session.state,
    "set_state": lambda _, session, __: session.set_state(session.h),
    "reset_state": lambda _, session, __: session.reset_state(),
    "fork": lambda _, session, __: session.fork(),
    "get_state": lambda _, session, __: session.get_state(extend_ttl=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_session_that_expired_long_ago_is_not_brought_back(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator, way: str
) -> None:
    """Idle beyond its time to live and the marker's, it is SessionExpired, and stays away."""
    session = live.session(model, ttl=TTL_S)
    session.forward(rng.normal(size=(1, 3, D)))
    forget_session(raw, session)
    sleep(live, TTL_S + 1)
    with pytest.raises(timernn.SessionExpired):
        WAYS[way](live, session, rng.normal(size=(1, 3, D)))
    with pytest.raises(timernn.SessionNotFound):
        live.get_session(session.session_id)


@pytest.mark.parametrize("way", ["forward", "stream", "frame"])
def test_a_younger_session_was_lost_and_is_healed(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator, way: str
) -> None:
    """Within its time to live nothing ends by itself."""
    session, twin = live.session(model, ttl=TTL_S), live.session(model)
    first, second = rng.normal(size=(2, 1, 3, D))
    for each in (session, twin):
        each.forward(first)
    forget_session(raw, session)
    sleep(live, TTL_S - 1)
    hs = WAYS[way](live, session, second)
    np.testing.assert_allclose(hs, twin.forward(second), atol=1e-6)


def test_each_answer_renews_the_age(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator
) -> None:
    """The time to live counts from the last answer, also from one that only extended it."""
    session = live.session(model, ttl=TTL_S)
    xs = rng.normal(size=(1, 3, D))
    sleep(live, TTL_S - 1)
    session.forward(xs)
    sleep(live, TTL_S - 1)
    session.get_state(extend_ttl=True)
    sleep(live, TTL_S - 1)
    forget_session(raw, session)
    session.forward(xs)
    assert session.chunk_seq == 2


def test_healing_one_session_does_not_bring_back_another(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator
) -> None:
    """Sessions that share a log are judged each by its own age."""
    old, young = (live.session(model, train=True, ttl=ttl) for ttl in (60, TTL_S))
    for session in (old, young):
        session.backward(session.forward(rng.normal(size=(1, 3, D))))
        forget_session(raw, session)
    sleep(live, 61)
    young.forward(rng.normal(size=(1, 3, D)))
    with pytest.raises(timernn.SessionNotFound):
        live.get_session(old.session_id)


@pytest.mark.parametrize("inline", [False, True])
def test_a_recorded_gradient_is_not_recorded_again(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator, *, inline: bool
) -> None:
    """A lost session healed after the names were forgotten: its step stands, nothing waits."""
    session = live.session(model, train=True, ttl=TTL_S)
    hs = session.forward(rng.normal(size=(1, 3, D)))
    session.backward(hs, update=timernn.Step(lr=0.1) if inline else None)
    made = session.version if inline else session.update(lr=0.1)
    forget_session(raw, session)
    forget_recorded(raw, model)
    session.forward(rng.normal(size=(1, 3, D)))
    assert (waiting(live, model), live.get_model(model).head) == (0, made)


def test_a_gradient_that_another_took_is_not_recorded_again(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator
) -> None:
    """Its step is not in this client's log: once its tape's time is over it is not sent."""
    session = live.session(model, train=True, ttl=TTL_S)
    session.backward(session.forward(rng.normal(size=(1, 3, D))))
    with timernn.connect(live._core.context.caller.addresses) as other:
        other.update(model)
    sleep(live, TAPE_TTL_S + 1)
    forget_session(raw, session)
    forget_recorded(raw, model)
    session.forward(rng.normal(size=(1, 3, D)))
    assert waiting(live, model) == 0


def test_a_gradient_that_no_step_took_is_sent_however_old(
    live: timernn.Client, model: str, slots: Any, rng: np.random.Generator
) -> None:
    """While the head is the one that was known when it was recorded, no step can have consumed it."""
    session = live.session(model, train=True, ttl=TTL_S)
    slot = slots.of_model(model)
    session.backward(session.forward(rng.normal(size=(1, 3, D))))
    sleep(live, TAPE_TTL_S + 1)
    slot.lose()
    assert session.update(lr=0.1).number == 2


def test_steps_that_cannot_be_made_again_leave_no_gradients_waiting(
    live: timernn.Client, model: str, replicas: list[str], slots: Any, rng: np.random.Generator
) -> None:
    """More steps lost than the log holds: the gradients of the others are not sent."""
    with timernn.connect(replicas, log_limit=7) as forgetful:
        session = forgetful.session(model, train=True)
        slot = slots.of_model(model)
        for _ in range(6):
            session.backward(session.forward(rng.normal(size=(1, 3, D))))
            session.update(lr=0.1)
        slot.lose()
        session.backward(session.forward(rng.normal(size=(1, 3, D)), train=True))
        with pytest.raises(timernn.VersionConflict):
            session.update(lr=0.1)
        assert waiting(live, model) == 1


def test_a_steps_gradients_come_back_with_it(
    live: timernn.Client, model: str, slots: Any, rng: np.random.Generator
) -> None:
    """Lost with its step, a gradient is sent again however old it is, and consumed."""
    session = live.session(model, train=True, ttl=TTL_S)
    session.forward(rng.normal(size=(1, 3, D)), train=False)
    slot = slots.of_model(model)
    session.backward(session.forward(rng.normal(size=(1, 3, D))))
    session.update(lr=0.1)
    sleep(live, TAPE_TTL_S + 1)
    slot.lose()
    session.backward(session.forward(rng.normal(size=(1, 3, D))))
    assert session.update(lr=0.1).number == 3
    assert waiting(live, model) == 0


def test_a_backward_is_not_finished_on_a_tape_made_again(
    live: timernn.Client, model: str, raw: Any, rng: np.random.Generator
) -> None:
    """Beyond the first tape's time the server may have forgotten that the gradient was recorded."""
    session = live.session(model, train=True, ttl=TTL_S)
    hs = session.forward(rng.normal(size=(1, 3, D)))
    (taped,) = session._core.state.tapes
    session.backward(hs)
    with timernn.connect(live._core.context.caller.addresses) as other:
        other.update(model)
    vars(session._core.state)["tapes"] = (taped,)  # as if the answer had been lost
    forget_session(raw, session)
    forget_recorded(raw, model)
    sleep(live, TAPE_TTL_S + 1)
    with pytest.raises(timernn.TapeMissing):
        session.backward(hs)
    assert waiting(live, model) == 0


def test_age_is_the_largest_progress_of_any_clock() -> None:
    """A clock that stood still, or was set back, does not make anything younger."""
    now = [(100.0, 5000.0)]
    ages = Ages(lambda: now[0])
    lifetime = Lifetime(ages, 60.0)
    now[0] = (101.0, 5061.0)
    assert lifetime.is_over
    lifetime.renew()
    now[0] = (161.5, 4000.0)
    assert lifetime.age_s == 60.5
    assert lifetime.is_over
