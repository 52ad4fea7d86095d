"""One word for one thing: words that were replaced by the field's terms do not come back.

docs/glossary.md explains the terms that stay. `make lint` runs this module.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("service", "timernn", "rnn_engine", "tests", "benchmarks", "examples", "docs")
PAGES = ("README.md", "CONTRIBUTING.md")
SUFFIXES = (".py", ".lua", ".md")
# Generated, not about this project, or this list itself.
LEFT_OUT = ("timernn/v1/", "benchmarks/peers/", "tests/architecture/test_words.py")
# "counted", "look" and "settle" are ordinary words, and names of the contract and of failpoints: only
# the uses that had a better word are here.
REPLACED = {
    r"\btells? whether\b": "returns whether",
    r"\btellers?\b|\btell_|_tell\b": "callback, report",
    r"\b_?told\b|_told(?=_|\b)|\btold_": "on_done, callback, report; raised, reported, answered",
    r"\bflip(?:s|ped|ping)?\b|_flip(?=_|\b)|\bflip_|Flip(?:Head|Outcome)|HeadFlip|HeadMaker|NextHead": "publish",
    r"\blook_update\b|\bcount_and_look\b|\bTapeLook\b": "read_update_inputs, record_and_read, TapeSnapshot",
    r"\b(?:a|the|one|fresh|first|last) look\b(?! at)|\bbetween (?:two )?looks\b": "read, snapshot, check",
    r"\b(?:lay|lays|laid|laying) down\b|\blaid_|_laid\b": "stage, staged",
    r"\bin hand\b|_in_hand\b|\bLiveSessions\b": "cached; SessionCache, LruCache, ModelCache",
    r"\bsettle_tape\b": "mark_tape_consumed",
    r"\b(?:new|old|earlier|later|another|whole) (?:life|lives)\b|_life\b|\blife_\w": "incarnation; ttl",
    r"\blanes?(?:_|\b)|_lanes?(?:_|\b)": "order, queue",
    r"\b_?[Ss]hel(?:f|ves)\b": "LogBudget",
    r"\b(?:both|either|two|asyncio|blocking|other|thin) faces?\b|_faces?\b|\bfaces\.py\b": "frontends",
    r"\b(?:was|were|is|are|been|be) counted (?:already|again|twice)\b|\bcounted (?:contribution|name)": (
        "recorded; consumed"
    ),
}


def _lines() -> list[tuple[str, str]]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    found = []
    for path in [*paths, *(ROOT / page for page in PAGES)]:
        name = str(path.relative_to(ROOT))
        if path.suffix in SUFFIXES and not name.startswith(LEFT_OUT):
            lines = enumerate(path.read_text("utf-8").splitlines(), 1)
            found += [(f"{name}:{number}", line.strip()) for number, line in lines]
    return found


LINES = _lines()


@pytest.mark.parametrize(("pattern", "better"), REPLACED.items())
def test_a_replaced_word_does_not_come_back(pattern: str, better: str) -> None:
    """No name, comment or page has it; the failure says which word to write."""
    word = re.compile(pattern, re.IGNORECASE)
    found = [f"{place}: {line}" for place, line in LINES if word.search(line)]
    assert found == [], f"better: {better}\n" + "\n".join(found)
