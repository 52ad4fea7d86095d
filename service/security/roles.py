"""What a credential is good for."""

from __future__ import annotations

from enum import Enum
from typing import Final

TENANT_KEY: Final = "timernn-tenant"
"""Metadata by which an operator names the tenant that it wants to see."""


class Role(Enum):
    """The roles, each but OPERATOR also with what those before it may."""

    INFER = "infer"  # sessions and forward passes
    TRAIN = "train"  # gradients, updates, weights and checkpoints
    ADMIN = "admin"  # creates and deletes the models of its tenant
    OPERATOR = "operator"  # sees all tenants and changes nothing in them


GRANTED: Final = {
    Role.INFER: frozenset({Role.INFER}),
    Role.TRAIN: frozenset({Role.INFER, Role.TRAIN}),
    Role.ADMIN: frozenset({Role.INFER, Role.TRAIN, Role.ADMIN}),
    Role.OPERATOR: frozenset({Role.OPERATOR}),
}
"""The roles that come with one."""
