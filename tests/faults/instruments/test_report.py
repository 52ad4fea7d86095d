import json
from pathlib import Path

import pytest

from instruments.report import Proof, Report, Run

pytest_plugins = ["pytester"]

RUN = Run("make faults", is_whole=True, seconds=60.0, passed=3, failed=0)
CONFTEST = Path(__file__).parents[1] / "conftest.py"


def proved(promise: str, seed: int = 1) -> Proof:
    """Make a proof with all that it takes."""
    proof = Proof(promise, seed)
    proof.hit({"reset": 3, "drop_reply": 2})
    proof.checked(100)
    proof.steady(200, 2.0)
    return proof


def test_a_proof_with_faults_traffic_and_checks_is_one() -> None:
    """A proof with faults, traffic and checks misses nothing."""
    assert proved("R1").shortcomings() == []


def test_a_run_without_faults_or_traffic_proves_nothing() -> None:
    """What is missing is reported."""
    proof = Proof("R1", 1)
    assert [text.split(" was ")[0] for text in proof.shortcomings()] == [
        "no operation",
        "no fault hit",
        "traffic before the fault",
    ]


def test_a_control_needs_neither() -> None:
    """Checked operations are enough for it."""
    proof = Proof("R18", 1, is_control=True)
    proof.require(is_kept=True, text="")
    assert proof.shortcomings() == []


def test_violations_are_counted_and_cut() -> None:
    """The first five are printed, the others counted."""
    proof = proved("R1")
    for number in range(7):
        proof.require(is_kept=False, text=f"chunk {number}")
    assert proof.shortcomings()[0] == "violated: chunk 0"
    assert proof.shortcomings()[-1] == "and 2 violations more"


def test_rows_sum_the_proofs_of_a_promise_in_natural_order() -> None:
    """R2 stands before R10, R8b after R8, and runs are added up."""
    report = Report()
    for promise, seed in (("R10", 1), ("R8b", 1), ("R2", 1), ("R2", 2), ("R8", 1)):
        report.add(proved(promise, seed), "text")
    rows = report.rows()
    assert [row.promise for row in rows] == ["R2", "R8", "R8b", "R10"]
    assert (rows[0].runs, rows[0].operations, rows[0].seeds) == (2, 200, [1, 2])
    assert rows[0].faults == {"reset": 6, "drop_reply": 4}


def test_the_report_is_written_where_git_ignores_it(tmp_path: Path) -> None:
    """A markdown table, a JSON document, and a .gitignore beside them."""
    report = Report()
    proof = proved("R1")
    proof.figures["replayed"] = 9.0
    report.add(proof, "applied once")
    report.write(tmp_path, RUN)
    text = (tmp_path / "faults.md").read_text()
    assert text.startswith("`make faults`, 60 s: 3 tests passed, 0 failed. On ")
    assert "| R1 applied once | 1 | 5 | 100 | 0 | 1 |" in text
    assert "| R1 | 100 | replayed 9 |" in text
    (row,) = json.loads((tmp_path / "faults.json").read_text())["promises"]
    assert (row["steady_rate"], row["figures"]) == (100.0, {"replayed": 9.0})
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_a_session_ends_in_the_table(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proofs are printed; a failed test, and one without faults, spoil the run."""
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    monkeypatch.setenv("FAULTS_SEED", "5")
    monkeypatch.setenv("FAULTS_SEEDS", "2")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.promise("R1", "applied once")
        @pytest.mark.parametrize("is_right", [True, False])
        def test_once(proof, is_right):
            proof.hit("reset", 4)
            proof.checked(10)
            proof.steady(100, 1.0)
            assert is_right

        @pytest.mark.promise("R2", "one commit")
        def test_idle(proof):
            proof.checked()
        """
    )
    result = pytester.runpytest("-p", "no:randomly")
    result.assert_outcomes(passed=4, failed=2, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*R2, FAULTS_SEED=5: no fault hit; traffic before*",
            "*promises under fire*",
            "R1 applied once *4 *16 *40 *2 *5, 6",
            "R2 one commit *2 *0 *2 *0 *5, 6",
        ]
    )
