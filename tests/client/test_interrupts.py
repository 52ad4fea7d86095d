"""An exception at every step of the core: the session is before the call or behind it, never between.

The core's generators are driven here, in place of a frontend, by calls of the stand-in: so a trace can
raise at the k-th instruction that the core executes, for every k, and an operation can be closed at
every one of its effects.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest

import timernn
from timernn._core import stream as streams
from timernn._core.ages import Ages, Lifetime
from timernn._core.client import ClientCore
from timernn._core.effects import END, InTurn, OpenStream, Pull, Read, RpcCall, Sleep, Write
from timernn._core.journal import LogBudget, forward_entry
from timernn._core.options import Options
from timernn._core.status import error_from_status
from timernn._core.stream import StreamCore
from timernn.v1 import time_rnn_service_pb2 as rnn_pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from timernn._core.effects import Effect, Op
    from timernn._core.session import SessionCore

R = TypeVar("R")
# Of the core's instructions every so manieth; a full run takes minutes: INTERRUPT_STRIDE=1.
STRIDE = int(os.environ.get("INTERRUPT_STRIDE", "23"))
CORE = str(streams.__file__).rpartition("/")[0]
# They change nothing that is kept: an interrupt inside is one at the instruction that called them.
PURE = ("arguments.py", "convert.py", "ids.py", "retry.py", "splitting.py", "status.py")
OPTIONS = Options(log_limit=8)
CHUNKS = [np.ones((1, count, 3), "f4") for count in range(1, 6)]
ENDS = [float(sum(range(k + 1))) for k in range(1, 6)]


class Interrupt(BaseException):
    """Raised by no code of the library, as an interrupt is."""


class Steps:
    """Raises an Interrupt before the k-th instruction of the core, or at its j-th effect.

    Attributes:
        has_hit: Whether it was raised; else the operation had ended before.
    """

    def __init__(self, kind: str, left: int) -> None:
        self._kind, self._left = kind, left
        self.has_hit = False

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """Count the core's instructions."""
        name = frame.f_code.co_filename
        if not name.startswith(CORE) or name.endswith(PURE):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and self._kind == "instruction":
            self.count("instruction")
        return self.trace

    def count(self, kind: str) -> None:
        """Raise when the last one has come."""
        if kind == self._kind:
            self._left -= 1
            if self._left == 0:
                self.has_hit = True
                sys.settrace(None)
                raise Interrupt

    def __enter__(self) -> None:
        """Begin to interrupt."""
        gc.disable()  # else other clients' ends would be interrupted, which Python ignores
        if self._kind == "instruction":
            sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        """Restore the state before, whatever was raised."""
        sys.settrace(None)
        gc.enable()


NEVER = Steps("never", 1)


class Local:
    """Carries out effects by calls of the stand-in."""

    def __init__(self, stand_in: Any) -> None:
        self._stand_in = stand_in
        self.steps = NEVER

    def run(self, op: Op[R]) -> R:
        """Drive a generator to its end, or close it where an interrupt came outside of it."""
        with self.steps:
            return self._drive(op)

    def _drive(self, op: Op[R]) -> R:
        try:
            effect = next(op)
            while True:
                try:
                    self.steps.count("effect not begun")
                    outcome = self._perform(effect)
                    self.steps.count("effect ended")
                except timernn.Error as error:
                    effect = op.throw(error)
                else:
                    effect = op.send(outcome)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        finally:
            op.close()

    def _perform(self, effect: Effect) -> Any:  # noqa: PLR0911  # one for each kind
        match effect:
            case RpcCall(rpc, request, _, _):
                result = self._answer(rpc.path.rpartition("/")[2], request)
                if isinstance(result, rnn_pb.OperationResult):
                    raise error_from_status(result.error)
                return result
            case OpenStream():
                return Handle()
            case Write(handle, message):
                for operation in message.operations:
                    handle.results.append(self._forward(operation))  # type: ignore[attr-defined]
                return None
            case Read(handle):
                results, handle.results = handle.results, []  # type: ignore[attr-defined]
                return rnn_pb.StreamResponse(results=results)
            case Pull(source, _):
                return next(source, END)
            case Sleep():
                return None
            case InTurn(lock, op):
                with lock:
                    return self._drive(op)
            case _:
                raise AssertionError(effect)

    def _forward(self, operation: Any) -> Any:
        answer = self._answer("Forward", operation.forward)
        if isinstance(answer, rnn_pb.OperationResult):
            answer.tag = operation.tag
            return answer
        return rnn_pb.OperationResult(tag=operation.tag, forward=answer)

    def _answer(self, method: str, request: Any) -> Any:
        sent = type(request).FromString(request.SerializeToString())
        try:
            return self._stand_in.answer(method, sent)
        except Exception as failure:
            if not hasattr(failure, "status"):
                raise
            return rnn_pb.OperationResult(error=failure.status)


class Handle:
    """An open stream."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def close(self) -> None:
        """Forget what was not read."""
        self.results = []


class Case:
    """A fresh client of the stand-in with a session that has had one chunk."""

    def __init__(self, stand_in: Any) -> None:
        self.stand_in, self.local = stand_in, Local(stand_in)
        self.client = ClientCore(["here"], OPTIONS, threading.Lock)
        self.session: SessionCore = self.run(self.client.open_session("m", train=True))
        self.run(self.session.forward(CHUNKS[0], train=False))

    def run(self, op: Op[R]) -> R:
        """Carry out an operation; nothing comes between."""
        return self.local.run(op)

    def interrupted(self, steps: Steps, op: Callable[[], Op[R]]) -> R | None:
        """Carry out an operation into which an interrupt comes."""
        self.local.steps = steps
        try:
            return self.run(op())
        except Interrupt:
            return None
        finally:
            self.local.steps = NEVER

    def ends_right(self, applied: int) -> None:
        """Demand that exactly these chunks are applied, and that the next one follows them."""
        hs = self.run(self.session.forward(CHUNKS[applied], train=False))
        assert hs[0, -1, 0] == ENDS[applied]
        assert self.stand_in.steps_of(self.session.state.session_id) == list(range(1, applied + 2))
        assert self.session.state.chunk_seq == len(
            self.stand_in.steps_of(self.session.state.session_id)
        )
        assert not self.session.doubts.is_any


def check_forward(case: Case, steps: Steps) -> None:
    """Go on as the documentation says; the output is right, or known to be lost."""
    session, before = case.session, case.session.state.chunk_seq
    hs = case.interrupted(steps, lambda: session.forward(CHUNKS[1]))
    if steps.has_hit and (session.doubts.is_any or session.state.chunk_seq == before):
        hs = case.run(session.forward(CHUNKS[1]))
    assert hs is not None or session.state.h[0, 0] == ENDS[1]
    assert hs is None or hs[0, :, 0].tolist() == [2, 3]
    assert len(session.state.tapes) == 1
    case.ends_right(2)


def check_cut_forward(case: Case, steps: Steps) -> None:
    """The same of a sequence in three pieces."""
    object.__setattr__(case.session.state.bounds, "chunk_steps", 1)
    session, before = case.session, case.session.state.chunk_seq
    hs = case.interrupted(steps, lambda: session.forward(CHUNKS[2]))
    if steps.has_hit and (session.doubts.is_any or session.state.chunk_seq == before):
        hs = case.run(session.forward(CHUNKS[2]))
    assert hs is None or hs[0, :, 0].tolist() == [2, 3, 4]
    assert (session.state.chunk_seq, session.state.h[0, 0]) == (4, 4)
    assert case.stand_in.steps_of(session.state.session_id) == [1, 1, 1, 1]
    assert [taped.steps for taped in session.state.tapes] == [3]


def check_other_data(case: Case, steps: Steps) -> None:
    """Whoever goes on with other data finds the interrupted chunk applied once, or not at all."""
    session, before = case.session, case.session.state.chunk_seq
    case.interrupted(steps, lambda: session.forward(CHUNKS[1]))
    counts = session.doubts.is_any or session.state.chunk_seq > before
    hs = case.run(session.forward(CHUNKS[2]))
    expected = [1, 2, 3] if counts else [1, 3]
    assert case.stand_in.steps_of(session.state.session_id) == expected
    assert hs[0, -1, 0] == sum(expected)


def check_backward(case: Case, steps: Steps, step: timernn.Step | None = None) -> None:
    """A gradient is contributed once, and comes back unless it is known to be lost."""
    session, dhs = case.session, np.full((1, 2, 2), 7.0)
    for position in (1, 2):
        case.run(session.forward(CHUNKS[position]))
    dhs = np.full((1, 3, 2), 7.0)
    before = session.state.dh
    dxs = case.interrupted(steps, lambda: session.backward(dhs, update=step))
    if steps.has_hit and (session.doubts.is_any or session.state.dh is before):
        dxs = case.run(session.backward(dhs, update=step))
    assert dxs is None or dxs.shape == (1, 3, 3)
    assert session.state.dh is not None
    assert session.state.dh[0, 0] == 7
    assert [taped.steps for taped in session.state.tapes] == [2]
    assert {r.chunk_seq for r in case.stand_in.requests["Backward"]} == {3}
    assert [list(named.chunk_seqs) for named in session.state.contributions()] == (
        [] if step else [[3]]
    )
    assert case.stand_in.version == (2 if step else 1)
    assert session.state.version == timernn.Version(
        case.stand_in.version, b"w%d" % case.stand_in.version
    )
    case.ends_right(3)


def check_backward_with_update(case: Case, steps: Steps) -> None:
    """The same with a step in the same call, which is made once."""
    check_backward(case, steps, timernn.Step(lr=0.5))


def check_update(case: Case, steps: Steps) -> None:
    """A step is made once."""
    session = case.session
    case.run(session.backward(case.run(session.forward(CHUNKS[1]))))
    before = session.state.version
    version = case.interrupted(steps, session.update)
    if steps.has_hit and session.state.version == before:
        version = case.run(session.update())
    assert case.stand_in.version == 2
    assert session.state.version == timernn.Version(2, b"w2")
    assert version in {None, session.state.version}
    assert session.state.contributions() == []
    case.ends_right(2)


def check_set_state(case: Case, steps: Steps) -> None:
    """One epoch ends, one begins, and its chunks are numbered from 1."""
    session, before, h = case.session, case.session.state.epoch, np.full((1, 2), 5.0)
    case.interrupted(steps, lambda: session.set_state(h))
    if steps.has_hit and (session.doubts.is_any or session.state.epoch == before):
        case.run(session.set_state(h))
    assert (session.state.epoch, session.state.chunk_seq, session.state.h[0, 0]) == (
        before + 1,
        0,
        5,
    )
    case.run(session.forward(CHUNKS[1]))
    last = case.stand_in.requests["Forward"][-1]
    assert (last.epoch, last.chunk_seq) == (before + 1, 1)


def check_frame(case: Case, steps: Steps) -> None:
    """Each session has its own answer, twice where it came twice."""
    other = case.run(case.client.open_session("m"))
    items = [(case.session, CHUNKS[1]), (other, CHUNKS[0]), (case.session, CHUNKS[2])]
    places = {case.session: 1, other: 0}

    def frame(chosen: list[Any]) -> Op[list[Any]]:
        return case.client.frames.forward(chosen, "all", train=False)

    outputs = case.interrupted(steps, lambda: frame(items))
    if steps.has_hit:
        again = []
        for session, xs in items:
            if session.doubts.is_any or session.state.chunk_seq <= places[session]:
                again.append((session, xs))
            places[session] += 1
        outputs = case.run(frame(again))
    assert outputs is not None
    assert not [each for each in outputs if isinstance(each, timernn.Error)]
    assert case.stand_in.steps_of(other.state.session_id) == [1]
    case.ends_right(3)


def check_frame_after_doubt(case: Case, steps: Steps) -> None:
    """A chunk that is in doubt since before stays so until the frame's caller has its output."""
    session, wanted = case.session, CHUNKS[1:3]

    def frame(chunks: list[Any]) -> Op[list[Any]]:
        return case.client.frames.forward(((session, xs) for xs in chunks), "all", train=False)

    case.interrupted(Steps("effect ended", 2), lambda: frame(wanted[:1]))  # it has been sent
    assert len(session.doubts) == 1
    outputs = case.interrupted(steps, lambda: frame(wanted))
    if steps.has_hit and (session.doubts.is_any or session.state.chunk_seq == 1):
        outputs = case.run(frame(wanted))
    assert outputs is None or [hs[0, -1, 0] for hs in outputs] == ENDS[1:3]
    case.ends_right(3)


def check_frame_before_others(case: Case, steps: Steps) -> None:
    """The same where something else, which is not asked for again, is in doubt behind it."""
    session, wanted = case.session, [CHUNKS[1], CHUNKS[3]]

    def frame(chunks: list[Any]) -> Op[list[Any]]:
        return case.client.frames.forward(((session, xs) for xs in chunks), "all", train=False)

    case.interrupted(Steps("effect ended", 4), lambda: frame(CHUNKS[1:3]))  # both have been sent
    assert (session.state.chunk_seq, len(session.doubts)) == (2, 2)
    outputs = case.interrupted(steps, lambda: frame(wanted))
    if steps.has_hit and (session.doubts.is_any or session.state.chunk_seq <= 3):
        outputs = case.run(frame(wanted))
    assert outputs is None or [hs[0, -1, 0] for hs in outputs] == [3, 10]
    assert case.stand_in.steps_of(session.state.session_id) == [1, 2, 3, 4]


def check_stream(case: Case, steps: Steps) -> None:
    """No output is lost and no chunk applied twice when the same data go on."""
    got: list[float] = []
    while len(got) < 3:
        data = iter(CHUNKS[1 + len(got) : 4])
        core = StreamCore(case.session, data, in_flight=2, return_hs="all", train=False)
        case.local.steps = steps
        try:
            case.run(core.open())
            while (hs := case.run(core.step())) is not END:
                got.append(float(hs[0, -1, 0]))  # type: ignore[index]  # all but END is an array
        except Interrupt:
            pass
        finally:
            case.local.steps = NEVER
            core.close()
    assert got == ENDS[1:4]
    case.ends_right(4)


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_forward,
        check_cut_forward,
        check_other_data,
        check_backward,
        check_backward_with_update,
        check_update,
        check_set_state,
        check_frame,
        check_frame_after_doubt,
        check_frame_before_others,
        check_stream,
    )
}


def cases(make: Callable[[], Any], kind: str) -> Iterator[tuple[Case, Steps]]:
    """Give a fresh case for each place where an interrupt can come, until there is none left."""
    left = 1
    while True:
        steps = Steps(kind, left)
        yield Case(make()), steps
        if not steps.has_hit:
            assert left > 1
            return
        left += STRIDE if kind == "instruction" else 1


@pytest.fixture
def fresh(stand_in: Any) -> Callable[[], Any]:
    """Makes the stand-in forget everything."""

    def make() -> Any:
        stand_in.forget()
        return stand_in

    return make


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", ["instruction", "effect not begun", "effect ended"])
def test_an_interrupt_anywhere_loses_and_doubles_nothing(
    fresh: Callable[[], Any], name: str, kind: str
) -> None:
    """At every instruction of the core, and at every effect before and after it took place."""
    for case, steps in cases(fresh, kind):
        CHECKS[name](case, steps)


def test_a_journal_agrees_with_its_size_after_an_interrupt_anywhere() -> None:
    """What it holds and what it counts stay the same thing, of one log and of all together."""
    for left in range(1, 10_000):
        budget, steps = LogBudget(1 << 20), Steps("instruction", left)
        one, two = budget.new_journal(3, 1 << 20), budget.new_journal(3, 1 << 20)
        for journal in (one, two, two, one):
            journal.append(entry())
        try:
            with steps:
                one.append(entry())
        except Interrupt:
            pass
        for journal in (one, two, one, two):
            journal.append(entry())
        assert [journal.bytes for journal in (one, two)] == [
            sum(each.size for each in journal.entries()) for journal in (one, two)
        ]
        assert budget._bytes == one.bytes + two.bytes
        if not steps.has_hit:
            return


def entry() -> Any:
    """Make an entry of a log."""
    request = rnn_pb.ForwardRequest(session_id="s", chunk_seq=1)
    return forward_entry(request, rnn_pb.ForwardResponse(), Lifetime(Ages()))
