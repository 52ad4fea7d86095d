import json
import math
import threading
from pathlib import Path

import pytest

from instruments.history import Operation, Recorder, by_key, write_history
from instruments.session_model import Applied, Forward

ASK, ANSWER = Forward(1, 1, "d"), Applied("t", "h")


def test_an_answer_is_recorded_with_its_times() -> None:
    """Call and return times are taken around the body."""
    ticks = iter([1.0, 2.0])
    recorder: Recorder[str, int] = Recorder(clock=lambda: next(ticks))
    with recorder.calling("a", "k", "ask") as pending:
        pending.returned(7)
    assert recorder.histories() == {"k": [Operation("a", "k", "ask", 7, 1.0, 2.0)]}


def test_an_exception_leaves_the_outcome_unknown_and_passes() -> None:
    """What raised may have happened: it returns at infinity."""
    recorder: Recorder[str, int] = Recorder()
    with pytest.raises(ConnectionError), recorder.calling("a", "k", "ask"):
        raise ConnectionError
    (operation,) = recorder.histories()["k"]
    assert (operation.answer, operation.return_time) == (None, math.inf)


def test_what_was_never_sent_is_left_out() -> None:
    """A forgotten operation is not in the history."""
    recorder: Recorder[str, int] = Recorder()
    with recorder.calling("a", "k", "ask") as pending:
        pending.forget()
    assert len(recorder) == 0


def test_threads_record_at_once() -> None:
    """No operation gets lost between threads, and keys are kept apart."""
    recorder: Recorder[int, int] = Recorder()

    def work(name: str) -> None:
        for number in range(200):
            with recorder.calling(name, name, number) as pending:
                pending.returned(number)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: len(ops) for key, ops in recorder.histories().items()} == {
        f"t{n}": 200 for n in range(4)
    }


def test_operations_are_sorted_by_call() -> None:
    """A merged history is in the order of the calls."""
    late, early = Operation("a", "k", "x", 1, 2.0, 3.0), Operation("b", "k", "y", 1, 1.0, 9.0)
    assert by_key([late, early])["k"] == [early, late]


def test_impossible_operations_are_refused() -> None:
    """Nothing returns before its call, and only the unknown never returns."""
    with pytest.raises(ValueError, match="before"):
        Operation("a", "k", ASK, ANSWER, 2.0, 1.0)
    with pytest.raises(ValueError, match="infinity"):
        Operation("a", "k", ASK, None, 1.0, 2.0)


def test_a_history_is_written_to_be_read(tmp_path: Path) -> None:
    """Each line names the operation, its outcome and its times."""
    write_history(tmp_path / "h", [Operation("a", "k", ASK, ANSWER, 1.0, 2.0)])
    line = json.loads((tmp_path / "h").read_text())
    assert (line["op"], line["outcome"], line["ask"]["digest"]) == ("Forward", "Applied", "d")
