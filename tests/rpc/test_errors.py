"""From exceptions to statuses: one table, bounded size, no text that is not for clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest

from service.domain import errors as domain_errors
from service.domain.errors import (
    Aborted,
    AlreadyExists,
    DomainError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    UnsupportedLayout,
    bad_field,
)
from service.rpc.errors import MAX_DETAILS_BYTES, code_of, refusal_of, refusal_to_status

if TYPE_CHECKING:
    from collections.abc import Callable

CODES = [
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (Aborted, grpc.StatusCode.ABORTED),
    (FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (UnsupportedLayout, grpc.StatusCode.FAILED_PRECONDITION),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
]


@pytest.mark.parametrize(("kind", "code"), CODES, ids=str)
def test_each_branch_has_its_code(kind: type[DomainError], code: grpc.StatusCode) -> None:
    """A branch, or a class under it, has the branch's code."""
    narrower = type("Narrower", (kind,), {})
    assert code_of(kind("REASON", "text")) is code
    assert code_of(narrower("REASON", "text")) is code


def test_no_branch_of_the_domains_tree_is_without_a_code() -> None:
    """A new class of errors needs a line in the table."""
    branches = {
        value
        for value in vars(domain_errors).values()
        if isinstance(value, type) and issubclass(value, DomainError)
    }
    assert branches - {DomainError} == {kind for kind, _ in CODES}


def test_details_carry_reason_metadata_field_and_delay(unpack: Callable[[Any], Any]) -> None:
    """What a program needs is in the details, as Google's standard messages."""
    error = ResourceExhausted("TAPE_QUOTA", "too many", retry_after_s=1.5, field="mode", limit=8)
    refusal = unpack(refusal_to_status(error))
    assert (refusal.reason, refusal.metadata) == ("TAPE_QUOTA", {"limit": "8"})
    assert refusal.details["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert refusal.details["BadRequest"].field_violations[0].field == "mode"
    assert refusal.details["QuotaFailure"].violations[0].subject == "TAPE_QUOTA"


def test_a_field_without_a_delay_has_only_its_violation(unpack: Callable[[Any], Any]) -> None:
    """Trying the same again does not help, so nothing says it might."""
    refusal = unpack(refusal_to_status(bad_field("epoch", "required")))
    assert set(refusal.details) == {"ErrorInfo", "BadRequest"}


def test_details_stay_small_enough_for_the_trailers(unpack: Callable[[Any], Any]) -> None:
    """Trailers over 8 KiB would take the place of the code itself."""
    metadata: dict[str, Any] = {f"key{i}": "é" * 10_000 for i in range(30)}
    error = ResourceExhausted(
        "REASON", "é" * 10_000, field="f" * 10_000, retry_after_s=1, **metadata
    )
    status = refusal_to_status(error)
    assert status.ByteSize() <= MAX_DETAILS_BYTES
    assert len(status.message.encode()) <= 512
    assert status.details[0].TypeName() == "google.rpc.ErrorInfo"


def test_an_unknown_exception_leaks_nothing(unpack: Callable[[Any], Any]) -> None:
    """The text of a bug stays in the log."""
    refusal = unpack(refusal_to_status(refusal_of(KeyError("/usr/lib/secret"), "/m")))
    assert (refusal.code, refusal.reason) == ("INTERNAL", "BUG")
    assert "secret" not in str(refusal)
