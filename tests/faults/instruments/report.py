"""Gather the evidence of each promise: faults that hit, operations checked, violations, seeds.

A promise is proved by a run in which faults really happened and traffic flowed before them; a run
without either proves nothing and fails, however green its assertions are.
"""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from instruments.redis_servers import server_binary

STEADY_OPERATIONS_PER_S = 50.0
"""Traffic that must flow before the first fault."""


def run_seeds() -> list[int]:
    """Return the seeds that every promise is tested with.

    FAULTS_SEED is the first (1 if unset), FAULTS_SEEDS is how many in a row (1 if unset).
    """
    first = int(os.environ.get("FAULTS_SEED", "1"))
    return list(range(first, first + int(os.environ.get("FAULTS_SEEDS", "1"))))


@dataclass(slots=True)
class Proof:
    """What one test of a promise found.

    Attributes:
        promise: Its id, as R1.
        seed: FAULTS_SEED of the run; with the test's name it decides every random choice.
        is_control: Whether the test needs no faults or no steady traffic, as a control does.
        faults: How often each fault hit.
        operations: How many operations were checked.
        steady_rate: Committed operations a second before the first fault.
        violations: What went against the promise, in words.
        figures: Further results by name, as "replayed" or "recovery s".
    """

    promise: str
    seed: int
    is_control: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    steady_rate: float = 0.0
    violations: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def hit(self, faults: Mapping[str, int] | str, count: int = 1) -> None:
        """Count faults: one kind by name, or a whole counter of them."""
        self.faults.update({faults: count} if isinstance(faults, str) else faults)

    def checked(self, operations: int = 1) -> None:
        """Count operations whose answer was compared with what it had to be."""
        self.operations += operations

    def steady(self, operations: int, seconds: float) -> None:
        """Note how much traffic was committed before the first fault."""
        self.steady_rate = operations / seconds

    def violated(self, text: str) -> None:
        """Note a violation; the test goes on, and fails when it ends."""
        self.violations.append(text)

    def require(self, is_kept: object, text: str) -> None:
        """Count one operation as checked; note a violation if it went wrong."""
        self.checked()
        if not is_kept:
            self.violated(text)

    def shortcomings(self) -> list[str]:
        """Return why this is no proof; empty if it is one."""
        found = [f"violated: {text}" for text in self.violations[:5]]
        if len(self.violations) > len(found):
            found.append(f"and {len(self.violations) - len(found)} violations more")
        if not self.operations:
            found.append("no operation was checked")
        if not self.is_control and not self.faults.total():
            found.append("no fault hit")
        if not self.is_control and self.steady_rate < STEADY_OPERATIONS_PER_S:
            found.append(
                f"traffic before the fault was {self.steady_rate:.0f} operations/s, "
                f"at least {STEADY_OPERATIONS_PER_S:.0f} are needed"
            )
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """The sum of a promise's proofs."""

    promise: str
    text: str
    runs: int
    faults: dict[str, int]
    operations: int
    violations: list[str]
    steady_rate: float
    seeds: list[int]
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One call of pytest.

    Attributes:
        command: What to type to have it again.
        is_whole: Whether no test was left out but those for longer runs.
        seconds: How long it took.
        passed: Tests that passed.
        failed: Tests that failed, or whose proof fell short.
    """

    command: str
    is_whole: bool
    seconds: float
    passed: int
    failed: int

    def facts(self) -> dict[str, str]:
        """Return the machine and the versions of what took part."""
        store = subprocess.run(
            [server_binary(), "--version"], capture_output=True, text=True, check=True
        ).stdout
        return {
            "machine": f"{os.cpu_count()} cores ({_processor()}), {platform.system()}",
            "Python": platform.python_version(),
            "store": re.sub(r"^(\w+) server v=(\S+).*", r"\1 \2", store.strip()),
            **{name: metadata.version(name) for name in ("grpcio", "redis", "numpy")},
        }


HEADINGS = ("promise", "runs", "faults injected", "operations checked", "violations", "seed")
FIGURE_HEADINGS = (
    "promise",
    "operations/s before the first fault",
    "figures, the largest of its runs",
)


class Report:
    """Every proof of a test session."""

    def __init__(self) -> None:
        """Start empty."""
        self._texts: dict[str, str] = {}
        self._proofs: list[Proof] = []

    def add(self, proof: Proof, text: str) -> None:
        """Take a proof under way and the sentence that it is to prove."""
        self._texts.setdefault(proof.promise, text)
        self._proofs.append(proof)

    def __len__(self) -> int:
        """Return how many proofs there are."""
        return len(self._proofs)

    def rows(self) -> list[Row]:
        """Return one row a promise, in the order of their ids."""
        return [self._row(promise) for promise in sorted(self._texts, key=_natural)]

    def table(self) -> list[str]:
        """Return the lines of the table, aligned for a terminal."""
        cells = [HEADINGS, *(_cells(row) for row in self.rows())]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEADINGS))]
        lines = [
            "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zipped))
            for zipped in (list(zip(row, widths, strict=True)) for row in cells)
        ]
        return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]

    def markdown(self, run: Run) -> str:
        """Return what the documentation says of a run: where it was, the table, the figures."""
        facts = run.facts()
        summary = (
            f"`{run.command}`, {run.seconds:.0f} s: {run.passed} tests passed, {run.failed} failed."
        )
        where = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "machine")
        figures = [
            (row.promise, f"{row.steady_rate:,.0f}" if row.steady_rate else "", _figures(row))
            for row in self.rows()
        ]
        return "\n".join(
            (
                f"{summary} On {facts['machine']}; {where}.",
                "",
                *_markdown_table(HEADINGS, map(_cells, self.rows())),
                "",
                *_markdown_table(FIGURE_HEADINGS, figures),
                "",
            )
        )

    def write(self, directory: Path, run: Run) -> None:
        """Write `faults.json` and `faults.md` into a directory that git ignores."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".gitignore").write_text("*\n")
        (directory / "faults.md").write_text(self.markdown(run))
        document = {
            "run": asdict(run),
            "where": run.facts(),
            "promises": [asdict(row) for row in self.rows()],
        }
        (directory / "faults.json").write_text(json.dumps(document, indent=2) + "\n")

    def _row(self, promise: str) -> Row:
        proofs = [proof for proof in self._proofs if proof.promise == promise]
        figures: dict[str, float] = {}
        for proof in proofs:
            for name, value in proof.figures.items():
                figures[name] = max(value, figures.get(name, -math.inf))
        return Row(
            promise=promise,
            text=self._texts[promise],
            runs=len(proofs),
            faults=dict(sum((proof.faults for proof in proofs), Counter[str]())),
            operations=sum(proof.operations for proof in proofs),
            violations=[text for proof in proofs for text in proof.violations],
            steady_rate=min((p.steady_rate for p in proofs if not p.is_control), default=0.0),
            seeds=sorted({proof.seed for proof in proofs}),
            figures=figures,
        )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.promise} {row.text}",
        f"{row.runs}",
        f"{sum(row.faults.values()):,}",
        f"{row.operations:,}",
        f"{len(row.violations)}",
        ", ".join(map(str, row.seeds[:3])) + (", …" if len(row.seeds) > 3 else ""),
    )


def _figures(row: Row) -> str:
    return "; ".join(f"{name} {_three_digits(value)}" for name, value in row.figures.items())


def _three_digits(value: float) -> str:
    """Write a number with three digits that count, or whole."""
    places = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{places if abs(value) >= 1 else 3}f}" if value else "0"


def _markdown_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    lines = [list(headings), *map(list, rows)]
    for number, cells in enumerate(lines):
        yield "| " + " | ".join(cells) + " |"
        if not number:
            yield "|" + " --- |" * len(cells)


def _processor() -> str:
    """Return the processor's name if the system reports it."""
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return str(names[0]) if names else platform.machine()
    return platform.machine()


def _natural(promise: str) -> tuple[str, int, str]:
    """Sort R2 before R10, R8b after R8."""
    letters = promise.rstrip("0123456789abc")
    digits = promise[len(letters) :].rstrip("abc")
    return letters, int(digits or 0), promise[len(letters) + len(digits) :]
