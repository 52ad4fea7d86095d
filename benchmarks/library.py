"""Show what the client library costs: chunks a second through it, and its processor time a chunk.

Run as ``python -m benchmarks.library``. One server, one store, one client process; the closed loops are those that a program
would write. ``--before PATH`` runs the same loops with the library of an earlier checkout in turn with today's, both
against today's server, and sets them side by side; PATH's own .venv is used where it has one.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from tqdm import tqdm

from benchmarks.harness import RESULTS, write_results
from benchmarks.load.lab import Lab, Plan, Samples, laboratory
from benchmarks.load.machine import describe_machine, machine_line
from benchmarks.load.page import write_block
from benchmarks.load.processes import ROOT, Child, interpreter_of
from benchmarks.load.rows import Bar, Row, compare, rows_table, table

COMMAND = "python -m benchmarks.library --write"
SCENARIOS = (
    "forward",
    "stream, 1 in flight",
    "stream, 4 in flight",
    "frame of 64",
    "asyncio forward",
)
LOOPS = ROOT / "benchmarks" / "load" / "library_loops.py"
TODAY, BEFORE = "today", "before"
# What is compared: its name, where the samples hold it, its unit, and the bar of the ratio.
FIGURES = (
    ("processor time", "client_us", "µs a chunk", Bar(1.05, at_most=True)),
    ("rate", "rate", "chunks/s", None),
)


def library_client(lab: Lab, checkout: Path) -> Child:
    """Start the loops with the library of a checkout, against the laboratory's server."""
    address = lab.server("timernn").address
    # -P: the modules beside the script must not come before the checkout's.
    python = str(interpreter_of(checkout))
    return lab.start_client(["env", f"PYTHONPATH={checkout}", python, "-P", str(LOOPS), address])


def measure(
    options: argparse.Namespace, tick: Callable[[str], None]
) -> dict[str, dict[str, Samples]]:
    """Run each loop in turn with each library; by scenario and library what came."""
    plan = Plan(seconds=options.seconds, repetitions=options.repetitions)
    with laboratory(plan, tick=tick) as lab:
        clients = {TODAY: library_client(lab, ROOT)}
        if options.before:
            clients[BEFORE] = library_client(lab, options.before.resolve())
        return {
            scenario: lab.take_turns(
                scenario,
                {name: (child, {"scenario": scenario}) for name, child in clients.items()},
            )
            for scenario in SCENARIOS
        }


def compared(samples: dict[str, dict[str, Samples]]) -> list[Row]:
    """Set today's library beside the earlier one: its processor time a chunk, and the chunks a second."""
    rows = []
    for scenario, by_library in samples.items():
        today, before = by_library[TODAY], by_library[BEFORE]
        for figure, key, unit, bar in FIGURES:
            name = f"library, {scenario}: {figure}"
            rows.append(compare(name, unit, today.values(key), before.values(key), bar))
    return rows


def alone(samples: dict[str, dict[str, Samples]]) -> str:
    """Lay out today's library by itself."""
    lines = [
        (
            scenario,
            f"{median(by_library[TODAY].values('rate')):,.0f}",
            f"{median(by_library[TODAY].values('client_us')):,.0f}",
        )
        for scenario, by_library in samples.items()
    ]
    return table(("through the library", "chunks/s", "client µs a chunk"), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        The exit code: not 0 only where something could not be measured.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    libraries = 2 if options.before else 1
    total = libraries * options.repetitions * len(SCENARIOS)
    with tqdm(total=total, unit="run") as progress:

        def tick(text: str) -> None:
            progress.set_postfix_str(text)
            progress.update()

        samples = measure(options, tick)
    machine, text = describe_machine(), alone(samples)
    if options.before:
        rows = compared(samples)
        text += "\n\n" + rows_table(rows)
        write_results(options.json, rows, machine=machine, command=COMMAND)
    text = f"{machine_line(machine)}.\n\n{text}"
    print("\n" + text)
    if options.write:
        write_block(COMMAND, text)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7, help="of each loop")
    parser.add_argument("--seconds", type=float, default=1.5, help="of one loop")
    parser.add_argument("--json", type=Path, default=RESULTS / "library.json")
    parser.add_argument("--before", type=Path, help="an earlier checkout, for its library")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
