"""Failures become typed exceptions."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # has no stubs

import timernn
from timernn import errors
from timernn._core.status import error_from_rpc, error_from_status

DESIGNED = {
    "INVALID_ARGUMENT": ["MALFORMED", "BAD_FIELD", "BAD_TENSOR", "NON_FINITE", "BAD_WEIGHTS"],
    "NOT_FOUND": [
        "SESSION_NOT_FOUND",
        "SESSION_EXPIRED",
        "SESSION_CLOSED",
        "MODEL_NOT_FOUND",
        "VERSION_GONE",
    ],
    "ALREADY_EXISTS": ["SESSION_EXISTS", "MODEL_EXISTS", "SEQ_REUSED", "REQUEST_ID_REUSED"],
    "ABORTED": ["SEQ_GAP", "EPOCH_FENCED", "HISTORY_FORKED", "VERSION_CONFLICT"],
    "FAILED_PRECONDITION": [
        "TAPE_MISSING",
        "WEIGHTS_FORKED",
        "NO_GRADIENTS",
        "REPLAY_WINDOW_PASSED",
        "NON_FINITE_RESULT",
    ],
    "RESOURCE_EXHAUSTED": [
        "MAX_SESSIONS",
        "TAPE_QUOTA",
        "MESSAGE_TOO_LARGE",
        "STORE_FULL",
        "OVERLOADED",
    ],
    "UNAUTHENTICATED": ["BAD_CREDENTIALS"],
    "PERMISSION_DENIED": ["ROLE"],
    "UNAVAILABLE": ["STORE_DOWN", "DRAINING", "UNKNOWN_OUTCOME"],
    "INTERNAL": ["BUG"],
}


class _Failed(grpc.RpcError):
    """A failed call with a given code, details and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, text: str, trailing: Any = ()) -> None:
        self._code, self._text, self._trailing = code, text, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> Any:
        return self._trailing


@pytest.mark.parametrize(
    ("code", "reason"), [(code, reason) for code, reasons in DESIGNED.items() for reason in reasons]
)
def test_each_reason_of_the_contract_has_its_class(code: str, reason: str) -> None:
    """The class is named after the reason and stands under that of its code."""
    kind = errors.BY_REASON[reason]
    assert kind.__name__.upper() == reason.replace("_", "")
    assert kind.CODE.name == code
    assert errors.BY_CODE[kind.CODE] in kind.__mro__


def test_reason_and_metadata_are_carried(refusal: Any) -> None:
    """What the server reports for programs is on the exception."""
    status = refusal(grpc.StatusCode.ABORTED, "SEQ_GAP", 0.25, expected_seq="4")
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    error = error_from_rpc(_Failed(grpc.StatusCode.ABORTED, "cut", trailing))
    assert isinstance(error, timernn.SeqGap)
    assert (error.reason, error.metadata) == ("SEQ_GAP", {"expected_seq": "4"})
    assert error.retry_after_s == 0.25
    assert error.message == "refused: SEQ_GAP"


def test_an_unknown_reason_becomes_the_class_of_its_code(refusal: Any) -> None:
    """A newer server's reasons are not lost."""
    error = error_from_status(refusal(grpc.StatusCode.NOT_FOUND, "MOON_NOT_FOUND"))
    assert type(error) is timernn.NotFound
    assert error.reason == "MOON_NOT_FOUND"


def test_reasons_of_other_domains_are_not_taken_for_ours() -> None:
    """A proxy's ErrorInfo does not decide."""
    status = status_pb2.Status(code=grpc.StatusCode.ABORTED.value[0])
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="SEQ_GAP", domain="proxy.example"))
    error = error_from_status(status)
    assert type(error) is timernn.Aborted
    assert not error.reason


def test_grpcs_own_size_check_is_recognized() -> None:
    """A message over the receiver's limit has no details, and is recognized all the same."""
    text = "CLIENT: Received message larger than max (5000 vs. 2048)"
    error = error_from_rpc(_Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
    assert isinstance(error, timernn.MessageTooLarge)
    assert "split" in error.message


def test_a_broken_connection_is_unavailable() -> None:
    """What gRPC calls UNKNOWN when a server dies under a call can be retried."""
    error = error_from_rpc(_Failed(grpc.StatusCode.UNKNOWN, "Stream removed"))
    assert isinstance(error, timernn.Unavailable)


def test_bad_input_is_also_a_value_error() -> None:
    """Callers who know nothing of gRPC can catch what they know."""
    assert issubclass(timernn.BadTensor, ValueError)


def test_every_class_is_exported() -> None:
    """The tree's names are the package's names."""
    classes = [*errors.BY_CODE.values(), *errors.BY_REASON.values()]
    assert {kind.__name__ for kind in classes} == set(errors.__all__)
    for kind in classes:
        assert getattr(timernn, kind.__name__) is kind
        assert kind.__name__ in timernn.__all__


def test_every_class_is_drawn() -> None:
    """The tree in the docstring has every class."""
    drawn = errors.__doc__ or ""
    assert [name for name in errors.__all__ if name not in drawn] == []


def test_an_error_can_be_pickled_without_its_cause() -> None:
    """A pool of processes hands it on; gRPC's own errors hold locks, which cannot be."""
    error = timernn.SeqGap("a hole", metadata={"expected_seq": "4"}, retry_after_s=0.5)
    error.attempts, error.cause = 3, Exception(threading.Lock())
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    assert type(again) is timernn.SeqGap
    assert (str(again), again.metadata) == (str(error), error.metadata)
    assert (again.retry_after_s, again.attempts, again.cause) == (0.5, 3, None)
    assert error.at_chunk(2).cause is error.cause
