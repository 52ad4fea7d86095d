"""What every fault test shares: its seed, its proof, and the table at the end."""

import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from instruments.report import Proof, Report, run_seeds

RESULTS = Path(__file__).parent / "results"
_REPORT = pytest.StashKey[Report]()
_PROOF = pytest.StashKey[Proof]()
_HAS_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Open the report of the session."""
    config.stash[_REPORT] = Report()
    config.addinivalue_line(
        "markers",
        "promise(id, text, control=False): what the test proves; a control needs no fault.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for a seed once with each seed of the run."""
    if "run_seed" in metafunc.fixturenames:
        metafunc.parametrize("run_seed", run_seeds(), ids=lambda number: f"seed{number}")


@pytest.fixture
def seed(request: pytest.FixtureRequest, run_seed: int) -> int:
    """The seed of this test: that of the run, mixed with the test's name."""
    return zlib.crc32(f"{run_seed}:{request.node.name}".encode())


@pytest.fixture
def proof(request: pytest.FixtureRequest, run_seed: int) -> Iterator[Proof]:
    """The evidence that a test marked with `promise` gathers; too little of it is a failure."""
    marker = request.node.get_closest_marker("promise")
    assert marker is not None, "mark the test with the promise that it proves"
    promise, text = marker.args
    gathered = Proof(promise, run_seed, is_control=marker.kwargs.get("control", False))
    request.config.stash[_REPORT].add(gathered, text)
    request.node.stash[_PROOF] = gathered
    yield gathered
    # A test that failed on its own has said why.
    if not request.node.stash.get(_HAS_FAILED, False) and gathered.shortcomings():
        pytest.fail(f"{promise}, FAULTS_SEED={run_seed}: " + "; ".join(gathered.shortcomings()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a failed test as a violation of its promise, and show its seed."""
    report = yield
    gathered = item.stash.get(_PROOF, None)
    if gathered is not None and report.when == "call" and report.failed:
        item.stash[_HAS_FAILED] = True
        gathered.violated(f"{item.name}: {call.excinfo.exconly() if call.excinfo else 'failed'}")
        report.sections.append(("to run it again", f"FAULTS_SEED={gathered.seed}"))
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table of promises and write it to the results."""
    report = config.stash.get(_REPORT, None)
    if not report:
        return
    terminalreporter.section("promises under fire")
    for line in report.table():
        terminalreporter.line(line)
    report.write(RESULTS)
