"""How much of a figure a run proves: a part within minutes, all of it at length, more for hours."""

from __future__ import annotations

from typing import Any

import pytest


def figure(name: str, short: int, full: int, soak: int = 0) -> pytest.MarkDecorator:
    """Give a test its size: `short` in `make faults`, also `full` in `make faults-long`.

    Where `soak` is given, `make soak` runs the test with that.
    """
    sizes: list[Any] = [short]
    if full != short:
        sizes.append(pytest.param(full, marks=[pytest.mark.long, pytest.mark.timeout(3600)]))
    if soak:
        sizes.append(pytest.param(soak, marks=[pytest.mark.soak, pytest.mark.timeout(0)]))
    return pytest.mark.parametrize(name, sizes)
