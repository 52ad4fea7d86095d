"""The open state of a session is changed by its own methods alone, and each of them twice like once."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from timernn._core import session_state
from timernn._core.session_state import Position

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(timernn.__file__).parent
HOME = Path(session_state.__file__)
XS = np.ones((1, 2, 3))


def assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Give each attribute that a module assigns, changes in place or deletes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node


def is_own(attribute: ast.Attribute) -> bool:
    """Return whether it is assigned to the object whose method this is."""
    return isinstance(attribute.value, ast.Name) and attribute.value.id == "self"


def attributes() -> set[str]:
    """Return the attributes of a session's state that are its alone, not a message's."""
    own = {each.attr for each in assigned(ast.parse(HOME.read_text())) if is_own(each)}
    return own | Position.__annotations__.keys()


def test_no_other_module_writes_a_sessions_state() -> None:
    """Every assignment to one of its attributes, on whatever object, stands in its module."""
    names = attributes()
    found = [
        f"{file.name}:{each.lineno} {ast.unparse(each)}"
        for file in PACKAGE.rglob("*.py")
        if file != HOME and "v1" not in file.parts
        for each in assigned(ast.parse(file.read_text()))
        if each.attr in names and not is_own(each)
    ]
    assert found == []


@pytest.fixture
def trainer(client: timernn.Client) -> timernn.Session:
    """A session that has had a forward and a backward, and a forward that waits."""
    session = client.session("m", train=True)
    session.forward(XS)
    session.backward(session.forward(XS))
    return session


def test_what_it_hands_out_cannot_be_changed_in_place(trainer: timernn.Session) -> None:
    """Its tapes are a tuple, and what it contributed is a list made for whoever asks."""
    state = trainer._core.state
    assert isinstance(state.tapes, tuple)
    assert state.contributions() is not state.contributions()


def snapshot(session: timernn.Session) -> dict[str, Any]:
    """Return what a session's state holds, but the times."""
    held = dict(vars(session._core.state))
    del held["lifetime"]
    return {name: list(value) if isinstance(value, dict) else value for name, value in held.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.go_back(2),
        lambda state: state.come_back(state.position()),
        lambda state: state.drop_tape(state.tapes[-1]) if state.tapes else None,
        lambda state: state.consume(None),
        lambda state: state.adopt_contributions([(1, 7)]),
        lambda state: state.discard(),
        lambda state: state.vacate(),
    ],
    ids=["go_back", "come_back", "drop_tape", "consume", "adopt", "discard", "vacate"],
)
def test_a_change_that_is_made_again_changes_nothing_more(
    trainer: timernn.Session, change: Callable[[Any], None]
) -> None:
    """An interrupted change is repeated: made twice it leaves what it leaves made once."""
    change(trainer._core.state)
    once = snapshot(trainer)
    change(trainer._core.state)
    assert snapshot(trainer) == once


def test_an_answer_that_is_taken_again_leaves_one_tape(
    trainer: timernn.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training chunk's answer that is carried over twice moves the session on once."""
    state, answers = trainer._core.state, list[Any]()
    monkeypatch.setattr(type(state), "advance", lambda _, answer: answers.append(answer))
    trainer.forward(XS)
    monkeypatch.undo()
    before = len(state.tapes)
    state.advance(answers[0])
    state.advance(answers[0])
    assert len(state.tapes) == before + 1
    assert state.chunk_seq == 3
