"""What the engine raises when arrays do not fit together.

EngineError (also a ValueError):
    ├── ShapeError      (a dimension is not the one that the other arrays imply)
    └── DTypeError      (not float32 or float64, or two of them mixed)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class EngineError(ValueError):
    """Arrays or hyperparameters that the engine refuses to compute with."""


class ShapeError(EngineError):
    """An array whose shape disagrees with the others; nothing is ever broadcast."""

    def __init__(self, name: str, expected: str, got: tuple[int, ...]) -> None:
        """Say which array is wrong, what shape was expected and what came."""
        super().__init__(f"{name}: expected shape {expected}, got {got}")
        self.name = name
        self.expected = expected
        self.got = got


class DTypeError(EngineError):
    """An array of another type than the weights, or a type without an engine."""

    def __init__(self, name: str, expected: str, got: np.dtype[Any]) -> None:
        """Say which array is wrong, what type was expected and what came."""
        super().__init__(f"{name}: expected dtype {expected}, got {got}")
        self.name = name
        self.expected = expected
        self.got = got
