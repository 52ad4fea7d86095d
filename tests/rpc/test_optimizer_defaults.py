"""The defaults of the optimizers: decided in the engine, and the same wherever they are written."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import timernn
from rnn_engine import OPTIMIZERS, SGD
from service.rpc.model_messages import optimizer_from_proto, optimizer_to_proto
from timernn.v1 import model_service_pb2 as model_pb

if TYPE_CHECKING:
    from rnn_engine.optimizers import Optimizer

PROTO = Path(__file__).parents[2] / "proto/timernn/v1/model_service.proto"


def message_of(kind: type[Optimizer]) -> tuple[str, Any]:
    """Return an optimizer's field in the contract and its message with nothing set."""
    name = optimizer_to_proto(kind()).WhichOneof("kind")
    assert name is not None
    message = model_pb.Optimizer()
    part = getattr(message, name)
    part.SetInParent()
    return name, message


def defaults_in_the_proto(message_name: str) -> dict[str, float]:
    """Read "default X." out of the comments of a message's fields."""
    body = re.search(
        rf"^message {message_name} {{(.*?)^}}", PROTO.read_text(), re.MULTILINE | re.DOTALL
    )
    assert body is not None
    found = re.findall(r"default ([0-9.e-]+)\.\n\s+optional double (\w+) =", body[1])
    return {name: float(value) for value, name in found}


def defaults_of(kind: type[Optimizer]) -> dict[str, float]:
    """Return the engine's defaults by name."""
    return {field.name: getattr(kind(), field.name) for field in fields(kind)}


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_the_server_uses_the_engines_defaults(kind: type[Optimizer]) -> None:
    """A message with nothing set makes the engine's optimizer with nothing given."""
    assert optimizer_from_proto(message_of(kind)[1]) == kind()


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_the_contracts_comments_name_the_engines_defaults(kind: type[Optimizer]) -> None:
    """What a reader of the proto file is promised is what the server does."""
    name, message = message_of(kind)
    assert defaults_in_the_proto(getattr(message, name).DESCRIPTOR.name) == defaults_of(kind)


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_the_librarys_docstrings_name_the_engines_defaults(kind: type[Optimizer]) -> None:
    """Each default stands in parentheses in the docstring of the library's class."""
    text = getattr(timernn, kind.__name__).__doc__
    named = [float(n) for group in re.findall(r"\(([0-9.e, -]+)\)", text) for n in group.split(",")]
    assert named == list(defaults_of(kind).values())


def test_without_an_optimizer_it_is_plain_gradient_descent_of_a_thousandth() -> None:
    """The rate that torch.optim has too: 0.001."""
    assert optimizer_from_proto(model_pb.Optimizer()) == SGD(lr=0.001)
