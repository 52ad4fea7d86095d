"""Weights and inputs to compute with; every random number comes from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rnn_engine import Params

if TYPE_CHECKING:
    from typing import Protocol

    from numpy.typing import DTypeLike

    from rnn_engine import Array

    class CaseMaker(Protocol):
        """What the fixture `case_of` returns."""

        def __call__(
            self, n: int, t: int, d: int, h: int, *, dtype: DTypeLike = ..., seed: int = ...
        ) -> Case:
            """Return arrays of the given sizes."""
            ...


@dataclass(frozen=True)
class Case:
    """One layer, one chunk for it, and gradients that arrive at its outputs."""

    params: Params
    xs: Array
    h0: Array
    dhs: Array
    dh_next: Array


def make_case(
    n: int, t: int, d: int, h: int, *, dtype: DTypeLike = np.float64, seed: int = 0
) -> Case:
    """Return random arrays of the given sizes, weights scaled so that tanh does not saturate."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (rng.normal(size=shape) * scale).astype(dtype)

    params = Params(normal(d, h, scale=d**-0.5), normal(h, h, scale=h**-0.5), normal(h, scale=0.1))
    return Case(
        params, normal(n, t, d), normal(n, h, scale=0.5), normal(n, t, h), normal(n, h, scale=0.5)
    )


@pytest.fixture(scope="session")
def case_of() -> CaseMaker:
    """The maker of cases, for tests that choose their sizes."""
    return make_case


@pytest.fixture
def case() -> Case:
    """A small batch in float64."""
    return make_case(3, 5, 4, 6)


@pytest.fixture
def row_case() -> Case:
    """A single row in float64, which takes the vector path."""
    return make_case(1, 7, 4, 6)
