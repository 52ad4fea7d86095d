"""The engine against the engine of an earlier checkout: the same bits, and the time of each function.

Run as ``python -m benchmarks.engine_before --before PATH``. Both compute the same weights after 50 steps
of each optimizer and the same states after 40 chunks, of which the digests are compared; then every case is
timed in turn in two processes, one a checkout, several pairs of them. Printed are the median of each side and the median of
the ratios of the pairs, after / before: below 1 is faster.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.harness import one_thread_environment
from benchmarks.load.rows import table

ROOT = Path(__file__).parent.parent
TRIAL = Path(__file__).parent / "engine_trial.py"
SLICE_S = 0.01
ALLOWED = 1.02
ALLOWED_US = 0.3


class Trial:
    """A process that computes with the engine of one checkout."""

    def __init__(self, checkout: Path) -> None:
        """Start it."""
        environment = one_thread_environment() | {"PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(  # noqa: S603 - this project's own program
            [sys.executable, str(TRIAL)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, command: str) -> Any:
        """Return the answer to one command."""
        pipes = self._process
        assert pipes.stdin is not None and pipes.stdout is not None  # noqa: S101, PT018
        pipes.stdin.write(command + "\n")
        pipes.stdin.flush()
        return json.loads(pipes.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def compare_digests(before: Path) -> list[str]:
    """Return the names of what the two engines compute differently."""
    trials = [Trial(before), Trial(ROOT)]
    there, here = (trial.ask("digests") for trial in trials)
    for trial in trials:
        trial.close()
    print(f"{len(here)} digests compared")
    return [name for name in here if here[name] != there.get(name)]


def time_pairs(
    before: Path, rounds: int, pairs: int, only: str
) -> dict[str, list[tuple[float, float]]]:
    """Return (before, after) in seconds a call, for each case: `rounds` in each of `pairs` pairs of processes."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in tqdm(range(pairs), unit="pair"):
        old, new = Trial(before), Trial(ROOT)
        names = [name for name in new.ask("cases") if only in name]
        counts = {name: max(1, int(SLICE_S / new.ask(f"{name}\t3"))) for name in names}
        for number in range(rounds):
            for name in names:
                order = (old, new) if number % 2 == 0 else (new, old)
                took = {trial: trial.ask(f"{name}\t{counts[name]}") for trial in order}
                times[name].append((took[old], took[new]))
        old.close()
        new.close()
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Compare.

    Returns:
        The exit code: 1 where a digest differs.
    """
    arguments = _parse(argv)
    before = arguments.before.resolve()
    differing = compare_digests(before)
    for name in differing:
        print(f"differs: {name}")
    if not differing:
        print("all the same, bit for bit")
    if arguments.rounds:
        times = time_pairs(before, arguments.rounds, arguments.pairs, arguments.only)
        print(_table(times))
    return 1 if differing else 0


def _table(times: dict[str, list[tuple[float, float]]]) -> str:
    lines = []
    for name, pairs in times.items():
        old, new = (median(pair[side] for pair in pairs) * 1e6 for side in (0, 1))
        ratio = median(after / before for before, after in pairs)
        is_within = ratio <= ALLOWED or (ratio - 1) * old <= ALLOWED_US
        lines.append(
            [name, f"{old:,.2f}", f"{new:,.2f}", f"{ratio:.3f}", "" if is_within else "slower"]
        )
    return table(["case", "before µs", "after µs", "after / before", ""], lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_before", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="an earlier checkout")
    parser.add_argument("--rounds", type=int, default=7, help="of each pair; 0: digests alone")
    parser.add_argument("--pairs", type=int, default=3, help="of processes")
    parser.add_argument("--only", default="", help="cases with this in their names")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
