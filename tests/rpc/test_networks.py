"""Every network that the engine has can be stored and is part of the contract."""

from __future__ import annotations

from typing import Any

import pytest

import rnn_engine
from rnn_engine import SGD, Network
from service.domain.types import ModelSpec
from service.domain.weights import CELLS, spec_from_bytes, spec_to_bytes
from service.rpc.model_messages import spec_from_proto, spec_to_proto


def spec_of(cell: str) -> ModelSpec:
    """Return a specification of a cell."""
    kind: Any = CELLS[cell]
    return ModelSpec("m", kind(3, 4), "float32", SGD())


def test_every_network_has_a_name_in_the_store() -> None:
    """A cell that the engine exports and no specification can name fails."""
    exported = [getattr(rnn_engine, name) for name in rnn_engine.__all__]
    networks = {
        one
        for one in exported
        if isinstance(one, type) and issubclass(one, Network) and one is not Network
    }
    assert networks == set(CELLS.values())


@pytest.mark.parametrize("cell", CELLS)
def test_a_specification_survives_the_store_and_the_contract(cell: str) -> None:
    """Which network it is, and its sizes, come back from bytes and from a message."""
    spec = spec_of(cell)
    assert spec_from_bytes(spec_to_bytes(spec)) == spec
    assert spec_from_proto(spec_to_proto(spec)) == spec
