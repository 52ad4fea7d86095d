import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from instruments.history import Operation, Refused
from instruments.linearizability import Outcome, check
from instruments.session_model import (
    Applied,
    Close,
    Closed,
    Forward,
    ReadSession,
    Restart,
    Restarted,
    SessionAnswer,
    SessionAsk,
    SessionAt,
    SessionModel,
)
from instruments.training_model import (
    Contribute,
    Counted,
    Discard,
    Discarded,
    HeadAt,
    ModelModel,
    ReadHead,
    TrainingAnswer,
    TrainingAsk,
    Update,
    Updated,
    Version,
)

SessionOp = Operation[SessionAsk, SessionAnswer]
TrainingOp = Operation[TrainingAsk, TrainingAnswer]


def session(*rows: tuple[float, float | None, SessionAsk, SessionAnswer | None]) -> list[SessionOp]:
    """Write a session's history as rows of call, return, ask, answer."""
    return [Operation("c", "s", q, a, t, math.inf if e is None else e) for t, e, q, a in rows]


def training(
    *rows: tuple[float, float | None, TrainingAsk, TrainingAnswer | None],
) -> list[TrainingOp]:
    """Write a model's history as rows of call, return, ask, answer."""
    return [Operation("c", "m", q, a, t, math.inf if e is None else e) for t, e, q, a in rows]


def judge_session(history: Iterable[SessionOp]) -> Outcome:
    """Check a history of a session that starts in epoch 1."""
    return check(history, SessionModel(epoch=1)).outcome


V1, V2, V3 = Version(1, "w1"), Version(2, "w2"), Version(3, "w3")


def judge_training(history: Iterable[TrainingOp]) -> Outcome:
    """Check a history of a model that starts at V1."""
    return check(history, ModelModel(V1)).outcome


def forward(seq: int, digest: str = "", previous: str | None = None) -> Forward:
    """Ask for chunk `seq` in epoch 1."""
    return Forward(1, seq, digest or f"d{seq}", previous)


def applied(seq: int, *, replayed: bool = False) -> Applied:
    """Answer chunk `seq`."""
    return Applied(f"t{seq}", f"h{seq}", replayed)


def contribute(k: int, version: Version = V1) -> Contribute:
    """Send the Backward of chunk `k`."""
    return Contribute(f"c{k}", f"d{k}", version)


def names(*ks: int) -> frozenset[str]:
    """Return the names of contributions."""
    return frozenset(f"c{k}" for k in ks)


FIRST_TWO = (
    (0, 1, forward(1), applied(1)),
    (2, 3, forward(2, previous="t1"), applied(2)),
)

VALID_SESSIONS = {
    "in order": session(*FIRST_TWO, (4, 5, ReadSession(), SessionAt(1, 2, "t2", "h2"))),
    "concurrent duplicates": session(
        (0, 9, forward(1), applied(1, replayed=True)),
        (1, 8, forward(1), applied(1)),
        (2, 7, forward(1), applied(1, replayed=True)),
        (3, 12, forward(2, previous="t1"), applied(2)),
    ),
    "lost reply, then replay": session(
        (0, None, forward(1), None),
        (5, 6, forward(1), applied(1, replayed=True)),
    ),
    "lost request, then first": session(
        (0, None, forward(1), None),
        (5, 6, forward(1), applied(1)),
    ),
    "unknown takes effect late": session(
        (0, None, forward(1), None),
        (1, 2, ReadSession(), SessionAt(1, 0)),
        (3, 4, ReadSession(), SessionAt(1, 1)),
    ),
    "own resend replays": session(
        (0, 1, Forward(1, 1, "d1", resent=True), applied(1, replayed=True))
    ),
    "gap, reuse, fence": session(
        (0, 1, forward(3), Refused("SEQ_GAP", expected_seq=1)),
        (2, 3, forward(1), applied(1)),
        (4, 5, forward(1, "other"), Refused("SEQ_REUSED")),
        (6, 7, Restart(), Restarted(2)),
        (8, 9, forward(2), Refused("EPOCH_FENCED")),
        (10, 11, Forward(2, 1, "d1"), Applied("u1", "g1")),
    ),
    "another base is answered": session(
        *FIRST_TWO,
        (4, 5, forward(3, previous="t9"), Refused("HISTORY_FORKED")),
        (6, 7, forward(3, previous="t2"), applied(3)),
    ),
    "reset lost, epoch moved": session(
        (0, None, Restart(), None),
        (1, 2, forward(1), Refused("EPOCH_FENCED")),
        (3, 4, Restart(), Restarted(3)),
    ),
    "beyond the window": session(
        *((k, k + 0.5, forward(k), applied(k)) for k in range(1, 7)),
        (8, 9, forward(1), Refused("REPLAY_WINDOW_PASSED")),
        (10, 11, forward(3), applied(3, replayed=True)),
    ),
    "closed twice": session(
        (0, 1, Close(), Closed()),
        (2, 3, Close(), Closed()),
        (4, 5, forward(1), Refused("SESSION_CLOSED")),
    ),
}

BROKEN_SESSIONS = {
    "acknowledged chunk lost": session(*FIRST_TWO, (4, 5, ReadSession(), SessionAt(1, 1))),
    "chunk applied twice": session(
        (0, 1, forward(1), applied(1)), (2, 3, ReadSession(), SessionAt(1, 2))
    ),
    "duplicate not recognised": session(
        (0, 1, forward(1), applied(1)), (2, 3, forward(1), applied(1))
    ),
    "duplicate answered otherwise": session(
        (0, 1, forward(1), applied(1)),
        (2, 3, forward(1), Applied("t1", "other h", replayed=True)),
    ),
    "stale read after a newer acknowledgement": session(
        (0, 1, forward(1), applied(1)),
        (2, 9, forward(2), applied(2)),
        (3, 4, ReadSession(), SessionAt(1, 2)),
        (5, 6, ReadSession(), SessionAt(1, 1)),
    ),
    "fork accepted": session(
        (0, 1, forward(1), applied(1)),
        (2, 5, forward(2, "mine", "t1"), applied(2)),
        (3, 6, forward(2, "yours", "t1"), Applied("u2", "g2")),
    ),
    "chunk of another history continued": session(
        *FIRST_TWO, (4, 5, forward(3, previous="t9"), applied(3))
    ),
    "hole skipped": session((0, 1, forward(1), applied(1)), (2, 3, forward(3), applied(3))),
    "other content replayed": session(
        (0, 1, forward(1), applied(1)), (2, 3, forward(1, "other"), applied(1, replayed=True))
    ),
    "fenced writer got through": session(
        (0, 1, Restart(), Restarted(2)), (2, 3, forward(1), applied(1))
    ),
    "epoch came back": session((0, 1, Restart(), Restarted(2)), (2, 3, Restart(), Restarted(2))),
    "replay of what never was": session((0, 1, forward(1), applied(1, replayed=True))),
    "gap with a wrong number": session(
        *FIRST_TWO, (4, 5, forward(9), Refused("SEQ_GAP", expected_seq=2))
    ),
    "unknown seen, then gone": session(
        (0, None, forward(1), None),
        (1, 2, ReadSession(), SessionAt(1, 1)),
        (3, 4, ReadSession(), SessionAt(1, 0)),
    ),
    "replay refused inside the window": session(
        *FIRST_TWO, (4, 5, forward(2), Refused("REPLAY_WINDOW_PASSED"))
    ),
}

ONE = (0, 1, contribute(1), Counted(V1, "g1"))
STEP = Update("u1", names(1), V1)

VALID_TRAININGS = {
    "a step": training(ONE, (2, 3, STEP, Updated(V2, 1)), (4, 5, ReadHead(), HeadAt(V2))),
    "backward again after the update took it": training(
        ONE,
        (2, 3, STEP, Updated(V2, 1)),
        (4, 5, contribute(1), Counted(V1, "g1", replayed=True)),
    ),
    "update lost, then replayed": training(
        ONE,
        (2, None, STEP, None),
        (4, 5, STEP, Updated(V2, 1, replayed=True)),
        (6, 7, ReadHead(), HeadAt(V2)),
    ),
    "two trainers, one wins": training(
        ONE,
        (1, 2, contribute(2), Counted(V1, "g2")),
        (3, 9, Update("u1", names(1), V1), Updated(V2, 1)),
        (3, 9, Update("u2", names(2), V1), Refused("VERSION_CONFLICT")),
        (10, 11, Update("u2", names(2), V2), Updated(V3, 1)),
    ),
    "unseen version learned from the head expected": training(
        ONE,
        (2, None, STEP, None),
        (4, 5, contribute(2, V2), Counted(V2, "g2")),
        (6, 7, Update("u2", names(2), V2), Updated(V3, 1)),
    ),
    "taken before": training(
        ONE,
        (2, 3, STEP, Updated(V2, 1)),
        (4, 5, Update("u2", names(1)), Refused("NO_GRADIENTS")),
        (6, 7, Update("u1", names(2)), Refused("REQUEST_ID_REUSED")),
    ),
    "discarded": training(
        ONE, (2, 3, Discard(), Discarded()), (4, 5, Update("u1"), Refused("NO_GRADIENTS"))
    ),
    "concurrent updates of one request": training(
        ONE,
        (2, 8, STEP, Updated(V2, 1, replayed=True)),
        (3, 9, STEP, Updated(V2, 1)),
    ),
    "tape gone but counted": training(
        ONE, (2, 3, contribute(1), Refused("TAPE_MISSING", counted=True))
    ),
}

BROKEN_TRAININGS = {
    "update made twice": training(
        ONE,
        (2, 3, STEP, Updated(V2, 1)),
        (4, 5, STEP, Updated(V3, 1)),
    ),
    "contribution counted twice": training(
        ONE, (2, 3, contribute(1), Counted(V1, "g1")), (4, 5, Update("u1"), Updated(V2, 2))
    ),
    "consumed contribution taken again": training(
        ONE,
        (2, 3, STEP, Updated(V2, 1)),
        (4, 5, contribute(1), Counted(V1, "g1", replayed=True)),
        (6, 7, Update("u2", names(1)), Updated(V3, 1)),
    ),
    "gradient from another version": training(
        ONE,
        (2, 3, STEP, Updated(V2, 1)),
        (4, 5, contribute(2, V1), Counted(V2, "g2")),
    ),
    "gradient from a forked version": training(
        ONE,
        (2, 3, STEP, Updated(V2, 1)),
        (4, 5, contribute(2, Version(2, "x")), Counted(Version(2, "x"), "g2")),
    ),
    "replayed gradient differs": training(
        ONE, (2, 3, contribute(1), Counted(V1, "other", replayed=True))
    ),
    "step on a head that had moved": training(
        ONE,
        (1, 2, contribute(2), Counted(V1, "g2")),
        (3, 4, STEP, Updated(V2, 1)),
        (5, 6, Update("u2", names(2), V1), Updated(V3, 1)),
    ),
    "acknowledged contribution lost": training(ONE, (2, 3, STEP, Refused("NO_GRADIENTS"))),
    "stale head after a newer one": training(
        ONE, (2, 3, STEP, Updated(V2, 1)), (4, 5, ReadHead(), HeadAt(V1))
    ),
    "done request refused": training(
        ONE, (2, 3, STEP, Updated(V2, 1)), (4, 5, STEP, Refused("NO_GRADIENTS"))
    ),
    "version with two contents": training(
        ONE, (2, 3, STEP, Updated(V2, 1)), (4, 5, ReadHead(), HeadAt(Version(2, "x")))
    ),
}


@pytest.mark.parametrize("name", VALID_SESSIONS)
def test_valid_session_is_accepted(name: str) -> None:
    """What a right server may answer passes."""
    assert judge_session(VALID_SESSIONS[name]) is Outcome.OK


@pytest.mark.parametrize("name", BROKEN_SESSIONS)
def test_broken_session_is_rejected(name: str) -> None:
    """What no right server can answer is a violation."""
    assert judge_session(BROKEN_SESSIONS[name]) is Outcome.VIOLATION


@pytest.mark.parametrize("name", VALID_TRAININGS)
def test_valid_training_is_accepted(name: str) -> None:
    """What a right server may answer passes."""
    assert judge_training(VALID_TRAININGS[name]) is Outcome.OK


@pytest.mark.parametrize("name", BROKEN_TRAININGS)
def test_broken_training_is_rejected(name: str) -> None:
    """What no right server can answer is a violation."""
    assert judge_training(BROKEN_TRAININGS[name]) is Outcome.VIOLATION


def race(chunks: int, racers: int, seed: int) -> list[SessionOp]:
    """Let racers send every chunk at once; some answers are lost, exactly one commits."""
    rng, history = random.Random(seed), []
    for k in range(1, chunks + 1):
        winner = rng.randrange(racers)
        for racer in range(racers):
            call, end = k + rng.uniform(0, 0.4), k + rng.uniform(0.5, 0.9)
            is_lost = rng.random() < 0.2
            answer = None if is_lost else applied(k, replayed=racer != winner)
            ask = forward(k, previous=f"t{k - 1}" if k > 1 else None)
            history += session((call, None if is_lost else end, ask, answer))
    return history


@pytest.mark.parametrize("seed", range(5))
def test_long_races_are_decided_quickly(seed: int) -> None:
    """Forty chunks sent by five racers, a fifth of the answers lost: an order is found."""
    verdict = check(race(40, 5, seed), SessionModel(epoch=1))
    assert verdict.outcome is Outcome.OK
    assert verdict.states < 20_000


@pytest.mark.parametrize("seed", range(5))
def test_one_wrong_answer_in_a_long_race_is_found(seed: int) -> None:
    """One replay in the middle that shows another state spoils the history."""
    history = race(40, 5, seed)
    at = next(i for i, o in enumerate(history) if i > 100 and o.answer is not None)
    spoiled = Applied("t9", "wrong", replayed=True)
    old = history[at]
    history[at] = Operation("c", "s", old.ask, spoiled, old.call_time, old.return_time)
    assert judge_session(history) is Outcome.VIOLATION


def test_running_out_of_time_is_no_pass() -> None:
    """A search that was cut short says so."""
    verdict = check(race(40, 5, 0), SessionModel(epoch=1), time_limit_s=0.0)
    assert verdict.outcome is Outcome.UNKNOWN


def test_a_verdict_shows_what_does_not_fit() -> None:
    """The message ends with the operations that cannot come next."""
    history = BROKEN_SESSIONS["acknowledged chunk lost"]
    verdict = check(history, SessionModel(epoch=1))
    assert len(verdict.explained) == 2
    assert verdict.stuck == (history[2],)
    assert "SessionAt(epoch=1, seq=1" in str(verdict)


class Register:
    """The smallest model: ask None to read, else to write; a write answers itself."""

    def initial(self) -> int:
        """Start at 0."""
        return 0

    def step(self, state: int, ask: int | None, answer: int | None) -> Iterator[int]:
        """Read the state or replace it."""
        after = state if ask is None else ask
        if answer in (None, after):
            yield after


def has_order(history: list[Operation[int | None, int]]) -> bool:
    """Try every order of every choice of the unknown outcomes, the slow and plain way."""
    known = [o for o in history if o.answer is not None]
    unknown = [o for o in history if o.answer is None]
    choices = itertools.chain.from_iterable(
        itertools.combinations(unknown, n) for n in range(len(unknown) + 1)
    )
    return any(
        is_legal(order) for chosen in choices for order in itertools.permutations([*known, *chosen])
    )


def is_legal(order: tuple[Operation[int | None, int], ...]) -> bool:
    """Return whether a register answers so in this order, which keeps real time."""
    state = 0
    for at, operation in enumerate(order):
        if any(later.return_time < operation.call_time for later in order[at:]):
            return False
        state = state if operation.ask is None else operation.ask
        if operation.answer not in (None, state):
            return False
    return True


def test_the_search_agrees_with_trying_every_order() -> None:
    """On 400 small random histories of a register, some broken, both say the same."""
    rng, outcomes = random.Random(7), Counter[bool]()
    for _ in range(400):
        history = []
        for _ in range(5):
            ask, call = rng.choice([None, 1, 2]), rng.random()
            answer = rng.choice([0, 1, 2]) if ask is None else ask
            is_unknown = ask is not None and rng.random() < 0.3
            end = math.inf if is_unknown else call + rng.uniform(0, 0.4)
            history.append(Operation("c", "r", ask, None if is_unknown else answer, call, end))
        expected = has_order(history)
        outcomes[expected] += 1
        assert (check(history, Register()).outcome is Outcome.OK) == expected
    assert min(outcomes.values()) > 50


def test_a_long_training_is_decided_quickly() -> None:
    """Three hundred contributions of three workers and a hundred steps have an order."""
    history, version = [], V1
    for step in range(100):
        at, ks = float(step), range(3 * step, 3 * step + 3)
        for k in ks:
            history += training(
                (at, at + 0.3, contribute(k, version), Counted(version, f"g{k}")),
                (at + 0.1, at + 0.4, contribute(k, version), Counted(version, f"g{k}", True)),
            )
        ask, version = Update(f"u{step}", names(*ks), version), Version(step + 2, f"w{step}")
        history += training(
            (at + 0.5, None, ask, None),
            (at + 0.6, at + 0.9, ask, Updated(version, 3, replayed=True)),
        )
    verdict = check(history, ModelModel(V1))
    assert verdict.outcome is Outcome.OK
    assert verdict.states < 20_000


def test_an_empty_history_is_fine() -> None:
    """Nothing happened, nothing is wrong; unknown outcomes alone prove nothing either."""
    assert judge_session([]) is Outcome.OK
    assert judge_session(session((0, None, forward(1), None))) is Outcome.OK
