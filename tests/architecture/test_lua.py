"""The linter of the Lua scripts finds what it is there for, and Lua's layouts are Python's."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import lua_lint
import pytest

from service.store import keys, layouts, models
from service.store.scripts import library_of, load_script, with_library

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = """-- A library.
local BYTES <const> = 80

local function size_of(data) return #data + BYTES end
"""
HEAD = "#!lua\n-- A script.\n-- KEYS[1] key  ARGV[1] number\n-- Library: sizes\n"
BODY = "return size_of(redis.call('GET', KEYS[1]))\n"
FAULTS = {
    "retrun 1\n": "not Lua",
    "return siez_of(1)\n": "siez_of is not defined",
    "total = 1\n": "total is assigned, and no local variable",
    "function f() return 1 end\n": "f is assigned, and no local variable",
    "local unused = 1\n": "unused is never used",
    "local function f(a, b) return a end\nreturn f(1, 2)\n": "b is never used",
    "local a = 1\nfor a = 1, 2 do redis.call('GET', a) end\nreturn a\n": "a hides another a",
    "local size_of = 1\nreturn size_of\n": "size_of hides another size_of",
    "return 4194304\n": "4194304 has no name: local NAME <const> = 4194304",
    "return struct.pack('>I8', 1)\n": "'>I8' has no name: local NAME <const> = '>I8'",
    "return KEYS[2]\n": "KEYS[2] is not in the head",
    "local function f()\n" + "  redis.call('TIME')\n" * 25 + "end\nf()\n": "a function of 27 lines, at most 25",
    "redis.call('TIME')\n" * 40: "43 lines beside functions and variables, at most 35",
    "return '" + "x" * 120 + "'\n": "129 columns, at most 120",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Hold a library of one file and a script without a fault."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "sizes.lua").write_text(LIBRARY)
    (tmp_path / "good.lua").write_text(HEAD + BODY)
    return tmp_path


def test_a_script_without_a_fault_passes(folder: Path) -> None:
    """Names of the library and of the server are known."""
    assert lua_lint.findings(folder) == []


@pytest.mark.parametrize(("fault", "finding"), FAULTS.items(), ids=lambda text: text[:30])
def test_a_fault_is_found(folder: Path, fault: str, finding: str) -> None:
    """Each with its line, and no other."""
    (folder / "bad.lua").write_text(f"{HEAD}do\n{fault}end\n{BODY}")
    found = lua_lint.findings(folder)
    assert [re.sub(r"^bad.lua:\d+: ", "", one) for one in found] == [finding]


def test_a_copied_function_is_found(folder: Path) -> None:
    """A function that two scripts define belongs into the library."""
    for name in ("one", "two"):
        (folder / f"{name}.lua").write_text(
            HEAD + "local function copied() return 1 end\ncopied()\n" + BODY
        )
    assert lua_lint.findings(folder) == [
        f"{name}.lua:5: copied stands in 2 files" for name in ("one", "two")
    ]


def test_a_library_function_without_a_use_is_found(folder: Path) -> None:
    """Nothing is kept for later."""
    (folder / "good.lua").write_text(HEAD + "return 1\n")
    assert lua_lint.findings(folder) == [
        "lib/sizes.lua:4: size_of is used by no script",
    ]


def test_a_script_gets_what_it_uses_and_no_more() -> None:
    """Functions of the library that a run would make in vain are left out; constants are values."""
    text = "#!lua\n-- Library: sessions\nlocal LEAST <const> = 7\nreturn {read_head('HEAD_BYTES'), HEAD_BYTES, LEAST}\n"
    whole = with_library(text)
    assert re.findall(r"^local function (\w+)", whole, re.MULTILINE) == ["unsupported", "read_head"]
    assert whole.endswith("return {read_head('HEAD_BYTES'), 80, 7}\n")
    assert "<const>" not in whole


def constants() -> dict[str, str]:
    """Return the constants of the whole library and of the two scripts that have offsets of their own."""
    scripts = [load_text(name) for name in ("begin_epoch", "commit_chunks", "publish_version")]
    texts = [text for script in scripts for text in (*library_of(script).values(), script)]
    texts += library_of("-- Library: checkpoints, selectors, requests\n").values()
    pattern = r"^local (\w+) <const> = '?([^'\s]+)'?"
    return {
        name: value for text in texts for name, value in re.findall(pattern, text, re.MULTILINE)
    }


def load_text(name: str) -> str:
    """Return a script as it stands in its file."""
    return (lua_lint.FOLDER / f"{name}.lua").read_text("utf-8")


def in_python(text: str) -> str:
    """Return a format of Lua's `struct` as Python's, each number and each string by itself."""
    codes = {"1": "B", "2": "H", "4": "I", "8": "Q"}
    return ">" + re.sub(
        r"I(\d)|c(\d+)", lambda m: codes[m[1]] if m[1] else f"{m[2]}s", text.removeprefix(">")
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("TAPE_ENTRY", layouts.TAPE_ENTRY),
        ("TAPE_NAME", layouts.TAPE_NAME),
        ("VERSION_ENTRY", layouts.VERSION_ENTRY),
        ("WAITING_ENTRY", layouts.WAITING_CONTRIBUTION),
        ("CONSUMED_ENTRY", layouts.CONSUMED_CONTRIBUTION),
    ],
)
def test_an_entry_is_laid_out_as_in_python(name: str, layout: struct.Struct) -> None:
    """The same fields, and the length by which another layout is known."""
    found = constants()
    fields = in_python(found[name]).replace("s1s", "sc").replace(">1s", ">c").replace("Q1s", "Qc")
    assert fields == layout.format
    if f"{name}_BYTES" in found:
        assert int(found[f"{name}_BYTES"]) == layout.size


def test_offsets_are_those_of_python() -> None:
    """Each number that Lua counts with is the layout's."""
    found = constants()
    head = layouts.HEAD.pack(1, 2, 3, 4, 5, 6, 7, 8, bytes(range(16)), 9, 1, bytes(16))
    before = struct.Struct(in_python(found["HEAD_NUMBERS"]))
    assert before.unpack_from(head) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert head[int(found["SLOTS_AT"])] == 2
    after = struct.Struct(in_python(found["AFTER_CHUNK"]))
    assert after.unpack_from(head, int(found["CHUNK_SEQ_AT"])) == (6, 7, 8)
    assert head[int(found["REQUEST_AT"]) :][:16] == bytes(range(16))
    slot = layouts.SLOT.pack(1, b"d" * 16, b"t" * 16, 2, b"v" * 16)
    assert slot[int(found["SLOT_TOKEN_AT"]) :][: int(found["TOKEN_BYTES"])] == b"t" * 16
    sizes = {
        "RECORD_LAYOUT": layouts.RECORD_LAYOUT,
        "HEAD_BYTES": layouts.HEAD.size,
        "SLOT_HEAD_BYTES": layouts.SLOT.size,
        "MARKER_BYTES": layouts.MARKER.size,
        "VERSION_ENTRY_BYTES": layouts.VERSION_ENTRY.size,
        "VERSION_NAME_BYTES": layouts.VERSION.size,
        "CHECKPOINT_BYTES": layouts.CHECKPOINT.size,
        "NAME_BYTES": layouts.CONTRIBUTION_NAME.size,
        "PART_BYTES": models.PART_BYTES,
        "CONTENT_BYTES": layouts.DIGEST_BYTES,
    }
    assert {name: int(found[name]) for name in sizes} == sizes


def test_a_sessions_keys_are_those_of_python() -> None:
    """What the commit adds to a record's key is what keys.py adds."""
    found = constants()
    assert found["MARKER"].encode() == keys.marker_key(b"")
    assert found["TAPE_INDEX"].encode() == keys.tape_index_key(b"")
    assert found["STAGED_TAPE"].encode() == keys.staged_tape_key(b"", b"")


def test_the_script_that_is_sent_has_its_library() -> None:
    """The reader, which may not write, has it as well."""
    script = load_script("commit_chunks")
    assert script.reader is not None
    for text in (script.text, script.reader.text):
        assert "local function read_head(" in text
    assert script.reader.text.startswith("#!lua flags=no-writes\n")
