"""The state protocol as a model: no rule may be broken, and none may be left out.

`python tests/model/explore.py` runs the same at length.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from state_protocol.rules import RULES, Rules
from state_protocol.runs import WORLDS, run
from state_protocol.values import Violation

if TYPE_CHECKING:
    from state_protocol.rules import Rule

_RUNS_A_WORLD = 19  # of 16 worlds: 300 in all
_MOST_RUNS = 400


@pytest.mark.parametrize("world", WORLDS)
def test_no_promise_is_broken(world: str) -> None:
    """With all rules in force no run of any world breaks a promise."""
    _run_all(world, range(_RUNS_A_WORLD), Rules())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_needed(rule: Rule) -> None:
    """A rule that is left out is missed: some run breaks a promise."""
    rules = Rules(without=rule.name)
    seeds = range(rule.seed, rule.seed + _MOST_RUNS)
    with pytest.raises(Violation):
        _run_all(rule.world, seeds, rules)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_is_documented(rule: Rule) -> None:
    """docs/protocol.md lists the rule as the model has it."""
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text("utf-8")
    assert f"| {rule.name} | {rule.text} | {rule.reason} |" in page


def _run_all(world: str, seeds: range, rules: Rules) -> None:
    for seed in seeds:
        run(seed, WORLDS[world], rules)
