"""The programs in README.md and docs/client.md, run as they stand there."""

from __future__ import annotations

import asyncio
import contextlib
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from examples.restart import batch, gradient
from examples.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "client.md").read_text(), re.DOTALL)
D, H = 8, 64


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for this module's programs."""
    with ServerProcess(tmp_path_factory.mktemp("pages")) as server:
        yield server.address


def test_the_readme_s_program_prints_what_the_readme_says(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run's lines stand below it; the second goes on where that ended."""
    program, output = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)[0]
    program = program.replace("localhost:50051", address)
    exec(program, {})  # noqa: S102  # the repository's own page
    assert capsys.readouterr().out == output
    exec(program, {})  # noqa: S102
    numbers = re.findall(r"(?:version|chunk) (\d+)", capsys.readouterr().out)
    assert re.findall(r"version (\d+), chunk (\d+)\.", README) == [tuple(numbers)]


def test_the_client_page_s_examples_run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Each raises nothing, given what the page leaves to its reader."""
    monkeypatch.chdir(tmp_path)  # one writes a file
    rows = rng.normal(size=(32, 10, D))
    xs = rows[:1]
    with timernn.connect(address) as client:
        adam = timernn.Adam(lr=1e-3)
        client.create_model("weather", input_size=D, hidden_size=H, optimizer=adam)
        session, one, two, three = (client.session("weather", train=True) for _ in range(4))
        for each in (one, two, three):
            each.backward(each.forward(xs))
        given: dict[str, Any] = {
            "timernn": timernn, "contextlib": contextlib, "client": client,
            "Wx": np.zeros((D, H)), "Wh": np.zeros((H, H)), "b": np.zeros(H),
            "session": session, "one": one, "two": two, "three": three,
            "xs": xs, "chunks": [xs] * 6, "arrived": [(one, xs), (two, xs)],
            "batches": [(rows, np.zeros((32, 10, H)))], "head": lambda hs, wanted: (0.0, hs - wanted),
            "batch": batch, "gradient": gradient, "steps": 3,
        }  # fmt: skip
        for block in BLOCKS:
            _run(block, address, dict(given))
        assert client.get_model("restart").head.number == 1 + given["steps"]
        assert client.get_model("weather").waiting_contribution_count == 0


def _run(block: str, address: str, names: dict[str, Any]) -> None:
    """Run a block where the page's addresses are the server's."""
    here = re.sub(r"(?:localhost|replica-\d):50051", address, block)
    if "async with" not in here:
        exec(here, names)  # noqa: S102  # the repository's own page
        return
    exec(f"async def main():\n{textwrap.indent(here, '    ')}", names)  # noqa: S102
    asyncio.run(names["main"]())
