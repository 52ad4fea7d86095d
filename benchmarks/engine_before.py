"""The engine against the engine of an earlier checkout: the same bits, and the time of each function.

Run as ``python -m benchmarks.engine_before --before PATH``. Both compute the same weights after 50 steps
of each optimizer and the same states after 40 chunks, of which the digests are compared. Then every case is timed: both engines
are loaded into one process and take turns, in several processes one after another, since where arrays come to lie
differs between them. Printed are the median of each side and the median of the ratios after / before: below 1 is faster.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engine_cases import digests, make_cases
from benchmarks.harness import interleave, one_thread_environment, pin_to_one_core
from benchmarks.load.rows import table

ROOT = Path(__file__).parent.parent
PACKAGE = "rnn_engine"
ALLOWED = 1.02
ALLOWED_US = 0.3

Timings = dict[str, tuple[list[float], list[float]]]


def load_engine(checkout: Path) -> Any:
    """Import the engine of a checkout, beside one that is loaded already."""
    for name in [one for one in sys.modules if one.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(PACKAGE)
    finally:
        del sys.path[0]


def compare_digests(before: Any, after: Any) -> list[str]:
    """Return the names of what the two engines compute differently."""
    there, here = digests(before), digests(after)
    print(f"{len(here)} digests compared", file=sys.stderr)
    return [name for name in here if here[name] != there.get(name)]


def time_cases(before: Any, after: Any, budget_s: float, only: str) -> Timings:
    """Return samples (before, after) in seconds a call, for each case."""
    there, here = make_cases(before), make_cases(after)
    timings: Timings = {}
    for name in tqdm([one for one in here if only in one], unit="case"):
        samples = interleave(
            {"before": there[name], "after": here[name]},
            budget_s=budget_s,
            rounds=25,
            clock=time.process_time,
        )
        timings[name] = samples["before"], samples["after"]
    return timings


def measure(arguments: argparse.Namespace) -> int:
    """Compare in this process; print JSON."""
    pin_to_one_core()
    before, after = load_engine(arguments.before.resolve()), load_engine(ROOT)
    if before.__file__ == after.__file__:
        raise SystemExit("--before: expected another checkout than this one")
    differing = [] if arguments.no_digests else compare_digests(before, after)
    timings = (
        time_cases(before, after, arguments.seconds, arguments.only) if arguments.seconds else {}
    )
    print(json.dumps({"differing": differing, "timings": timings}))
    return 0


def main(argv: Sequence[str]) -> int:
    """Compare in child processes, since libraries read their thread settings when they are loaded.

    Returns:
        The exit code: 1 where a digest differs.
    """
    arguments = _parse(argv)
    command = [sys.executable, "-m", "benchmarks.engine_before", "--in-this-process", *argv]
    differing: list[str] = []
    timings: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for number in range(arguments.processes):
        once = ["--no-digests"] if number else []
        answer = subprocess.run(  # noqa: S603 - this program
            [*command, *once], env=one_thread_environment(), stdout=subprocess.PIPE, check=True
        )
        found = json.loads(answer.stdout)
        differing += found["differing"]
        for name, sides in found["timings"].items():
            for target, samples in zip(timings[name], sides, strict=True):
                target.extend(samples)
    for name in differing:
        print(f"differs: {name}")
    if not (differing or arguments.no_digests):
        print("all digests are the same")
    print(_table(timings))
    return 1 if differing else 0


def _table(timings: Timings) -> str:
    lines = []
    for name, (old, new) in timings.items():
        before, after = (statistics.median(samples) * 1e6 for samples in (old, new))
        ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
        is_within = ratio <= ALLOWED or (ratio - 1) * before <= ALLOWED_US
        shown = f"{before:,.2f}", f"{after:,.2f}", f"{ratio:.3f}"
        lines.append([name, *shown, "" if is_within else "slower"])
    return table(["case", "before µs", "after µs", "after / before", ""], lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_before", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="an earlier checkout")
    parser.add_argument("--seconds", type=float, default=1.0, help="a case; 0: digests alone")
    parser.add_argument("--processes", type=int, default=3, help="one after another")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--no-digests", action="store_true", help="times alone")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if "--in-this-process" in sys.argv:
        raise SystemExit(measure(_parse([a for a in sys.argv[1:] if a != "--in-this-process"])))
    raise SystemExit(main(sys.argv[1:]))
