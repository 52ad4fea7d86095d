"""What every fault test shares: its seed, its proof, and the table at the end."""

import shlex
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from instruments.report import Proof, Report, Run, run_seeds

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHORT, LONG = "not long and not soak", "not soak"  # what the Makefile's targets choose
_REPORT = pytest.StashKey[Report]()
_STARTED = pytest.StashKey[float]()
_PROOF = pytest.StashKey[Proof]()
_HAS_FAILED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    """Open the report of the session; take the short tests where no mark is asked for, also of one file."""
    config.option.markexpr = config.option.markexpr or SHORT
    config.stash[_REPORT] = Report()
    config.stash[_STARTED] = time.monotonic()
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
    report.write(RESULTS, run_of(terminalreporter, config))


def run_of(terminal: pytest.TerminalReporter, config: pytest.Config) -> Run:
    """Return which run this was: whole, as `make faults` makes it, or of a part."""
    counts = {name: len(terminal.stats.get(name, ())) for name in ("passed", "failed", "error")}
    options = config.option
    is_whole = not (options.keyword or options.deselect) and [
        Path(each).resolve() for each in config.args
    ] == [HERE]
    command = {SHORT: "make faults", LONG: "make faults-long"}.get(options.markexpr)
    if not is_whole or command is None:
        is_whole, command = False, shlex.join(["pytest", *config.invocation_params.args])
    return Run(
        command=command,
        is_whole=is_whole,
        seconds=time.monotonic() - config.stash[_STARTED],
        passed=counts["passed"],
        failed=counts["failed"] + counts["error"],
    )
