"""Run the state protocol's model at length.

python tests/model/explore.py --runs 10000            every world with all rules: no violation
python tests/model/explore.py --broken                each rule left out in turn: noticed
python tests/model/explore.py --broken RULE --world W one rule, one world
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from state_protocol.rules import RULES, Rules
from state_protocol.runs import WORLDS, Summary

if TYPE_CHECKING:
    from state_protocol.rules import Rule


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="runs of each world")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--world", choices=WORLDS, action="append")
    parser.add_argument(
        "--broken", nargs="?", const="all", choices=["all", *[r.name for r in RULES]]
    )
    asked = parser.parse_args()
    seeds = range(asked.first_seed, asked.first_seed + asked.runs)
    if asked.broken is None:
        return explore(Rules(), asked.world or list(WORLDS), seeds)
    return leave_out([r for r in RULES if asked.broken in ("all", r.name)], asked.world, seeds)


def explore(rules: Rules, worlds: list[str], seeds: range) -> int:
    """Run worlds with these rules and print a table; return how many had violations."""
    summaries = {world: Summary() for world in worlds}
    with tqdm(total=len(worlds) * len(seeds), unit="run") as progress:
        for world, summary in summaries.items():
            progress.set_description(world)
            for seed in seeds:
                summary.add(seed, world, rules)
                progress.update()
    print(f"{'world':46} {'runs':>6} {'lost writes':>11} {'violations':>10}  ends")
    for world, summary in summaries.items():
        ends = ", ".join(f"{end} {count}" for end, count in summary.ends.most_common())
        count = summary.violations.total()
        print(f"{world:46} {summary.runs:6} {summary.rolled_back:11} {count:10}  {ends}")
        for text, times in summary.violations.most_common():
            print(f"    {times} x {text}")
    return sum(bool(summary.violations) for summary in summaries.values())


def leave_out(rules: list[Rule], worlds: list[str] | None, seeds: range) -> int:
    """Leave out each rule in turn and print what was noticed; return how many were not."""
    found = {rule: Summary() for rule in rules}
    for rule in tqdm(rules, unit="rule"):
        for world in worlds or [rule.world]:
            for seed in seeds:
                found[rule].add(seed, world, Rules(without=rule.name))
    print(f"{'rule left out':20} {'runs':>6} {'violations':>10}  most of them")
    for rule, summary in found.items():
        most = summary.violations.most_common(1)
        text = most[0][0] if most else "NOT NOTICED"
        print(f"{rule.name:20} {summary.runs:6} {summary.violations.total():10}  {text}")
    return sum(not summary.violations for summary in found.values())


if __name__ == "__main__":
    sys.exit(min(1, main()))
