"""How much of a figure a run proves: a part within minutes, all of it at length."""

from __future__ import annotations

from typing import Any

import pytest


def figure(name: str, short: int, full: int) -> pytest.MarkDecorator:
    """Give a test its size: `short` in `make faults`, also `full` in `make faults-long`."""
    sizes: list[Any] = [short]
    if full != short:
        sizes.append(pytest.param(full, marks=[pytest.mark.long, pytest.mark.timeout(3600)]))
    return pytest.mark.parametrize(name, sizes)
