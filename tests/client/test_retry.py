"""Calls that fail are tried again, with the same content, within bounds."""

from __future__ import annotations

import copy
import re
from typing import Any

import grpc
import numpy as np
import pytest

import timernn
from timernn._core.contract import GET_MODEL
from timernn._core.effects import RpcCall, Sleep
from timernn._core.retry import Budget, Caller, RetryPolicy
from timernn.v1.model_service_pb2 import GetModelRequest

XS = np.ones((1, 4, 3), "f4")
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def test_unavailable_is_retried_with_the_same_number(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """A chunk whose answer was lost is sent again as the same chunk."""
    session = client.session("m")
    stand_in.fail_next("Forward", refusal(UNAVAILABLE, "UNKNOWN_OUTCOME"), after_applying=True)
    hs = session.forward(XS)
    sent = stand_in.requests["Forward"]
    assert [request.chunk_seq for request in sent] == [1, 1]
    assert sent[0] == sent[1]
    assert hs[0, -1, 0] == 4


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (UNAVAILABLE, "STORE_DOWN"),
        (UNAVAILABLE, "DRAINING"),
        (UNAVAILABLE, ""),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
        (grpc.StatusCode.ABORTED, ""),
    ],
)
def test_passing_failures_are_not_raised(
    client: timernn.Client, stand_in: Any, refusal: Any, code: grpc.StatusCode, reason: str
) -> None:
    """What may pass is tried again until it does."""
    stand_in.fail_next("GetModel", *[refusal(code, reason)] * 3)
    assert client.get_model("m").input_size == 3
    assert len(stand_in.requests["GetModel"]) == 4


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "MAX_SESSIONS"),
        (grpc.StatusCode.INTERNAL, "BUG"),
        (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS"),
    ],
)
def test_lasting_failures_are_raised_at_once(
    client: timernn.Client, stand_in: Any, refusal: Any, code: grpc.StatusCode, reason: str
) -> None:
    """What will not pass is raised without another try."""
    stand_in.fail_next("OpenSession", refusal(code, reason))
    with pytest.raises(timernn.Error) as caught:
        client.session("m")
    assert caught.value.reason == reason
    assert len(stand_in.requests["OpenSession"]) == 1


def caller(addresses: list[str], policy: RetryPolicy) -> Caller:
    """Make a caller that has a minute for everything."""
    return Caller(addresses, policy, timeout_s=60.0, connect_timeout_s=60.0)


def test_the_servers_advice_is_kept() -> None:
    """A retry does not come before the time that the server names."""
    op = caller(["here"], RetryPolicy()).call(GET_MODEL, GetModelRequest())
    next(op)
    wait = op.throw(timernn.Overloaded("full", retry_after_s=0.7))
    assert wait == Sleep(0.7)


def test_each_attempt_leaves_time_for_the_next_address() -> None:
    """A replica that hangs is left after the attempt's time, which doubles with each that hung."""
    policy = RetryPolicy(attempt_timeout_s=5.0)
    op = caller(["one", "two"], policy).call(GET_MODEL, GetModelRequest())
    first = next(op)
    assert isinstance(op.throw(timernn.DeadlineExceeded()), Sleep)
    second = op.send(None)
    assert isinstance(first, RpcCall)
    assert isinstance(second, RpcCall)
    assert (first.address, first.timeout_s) == (0, 5.0)
    assert (second.address, second.timeout_s) == (1, 10.0)


def test_the_last_error_is_raised_when_time_is_over(
    stand_in: Any, refusal: Any, quick: timernn.RetryPolicy
) -> None:
    """After the deadline the typed error of the last try comes out, with the number of tries."""
    stand_in.fail_next("GetModel", *[refusal(UNAVAILABLE, "STORE_DOWN")] * 1000)
    client = timernn.connect(stand_in.address, timeout=0.5, retry=quick)
    with client, pytest.raises(timernn.StoreDown) as caught:
        client.get_model("m")
    assert caught.value.attempts >= len(stand_in.requests["GetModel"]) > 1
    assert caught.value.is_outcome_unknown


TLS = timernn.TlsFailed("it may expect TLS")
REFUSED = timernn.NoServer("no server at localhost:50051; is `timernn serve` running?")
SLOW = timernn.Unavailable("connect() timed out")
LATE = timernn.DeadlineExceeded("no answer in time")
DOWN = timernn.StoreDown("the store is down")


@pytest.mark.parametrize(
    ("failures", "clearest"),
    [
        ((TLS, SLOW), TLS),
        ((TLS, REFUSED), TLS),  # `localhost`, where nothing listens on ::1
        ((TLS, LATE, REFUSED), TLS),
        ((REFUSED, TLS), TLS),
        ((SLOW, LATE), SLOW),
        ((LATE, REFUSED), REFUSED),
        ((TLS, DOWN, LATE), DOWN),
        ((DOWN, REFUSED), REFUSED),
        ((LATE, LATE), LATE),
    ],
)
def test_what_says_most_is_raised_when_time_is_over(
    failures: tuple[timernn.Error, ...], clearest: timernn.Error
) -> None:
    """What is to be changed comes out, not what a busy machine did to the last attempt."""
    now = [0.0]
    hasty = Caller(
        ["localhost"], RetryPolicy(), timeout_s=1.0, connect_timeout_s=1.0, clock=lambda: now[0]
    )
    op = hasty.call(GET_MODEL, GetModelRequest())
    next(op)
    *before, last = failures
    for failure in before:
        assert isinstance(op.throw(copy.copy(failure)), Sleep)
        assert isinstance(op.send(None), RpcCall)
    now[0] = 0.99
    with pytest.raises(type(clearest), match=re.escape(clearest.message)) as caught:
        op.throw(copy.copy(last))
    assert caught.value.attempts == len(failures)
    assert caught.value.is_outcome_unknown


def test_the_next_address_takes_over(
    stand_in: Any, other_stand_in: Any, quick: timernn.RetryPolicy
) -> None:
    """When a replica is gone, the next one is asked, and stays in use."""
    addresses = [stand_in.address, other_stand_in.address]
    with timernn.connect(addresses, timeout=10, retry=quick) as client:
        assert client.server_info().replica_id == "one"
        stand_in.stop()
        assert client.server_info().replica_id == "two"
        assert client.server_info().replica_id == "two"


def test_an_unreachable_server_is_reported_soon(quick: timernn.RetryPolicy) -> None:
    """An address where nobody has ever answered is given up after the connect timeout."""
    client = timernn.connect("127.0.0.1:1", connect_timeout=0.2, retry=quick)
    with client, pytest.raises(timernn.Unavailable):
        client.server_info()


def test_deleting_survives_a_lost_answer(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """A delete that finds nothing after a try of unknown outcome has succeeded."""
    gone = refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    stand_in.fail_next("DeleteModel", refusal(UNAVAILABLE), after_applying=True)
    stand_in.fail_next("DeleteModel", gone)
    assert client.delete_model("m")


def test_deleting_what_does_not_exist_is_an_error(
    client: timernn.Client, stand_in: Any, refusal: Any
) -> None:
    """A delete that finds nothing at once is an error."""
    stand_in.fail_next("DeleteModel", refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"))
    with pytest.raises(timernn.ModelNotFound):
        client.delete_model("m")


def test_waits_grow_up_to_a_bound() -> None:
    """Each wait is twice the one before, until the longest."""
    policy = RetryPolicy(jitter=0.5)
    assert [policy.backoff_s(n, 0.0) for n in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert policy.backoff_s(0, 1.0) == 0.025
    assert policy.backoff_s(10_000, 0.0) == 2.0


def test_retries_are_rationed() -> None:
    """Beyond the budget retries wait for it to fill, and they do not fail."""
    now = [0.0]
    budget = Budget(RetryPolicy(budget=2.0, budget_per_s=1.0), lambda: now[0])
    assert [budget.spend() for _ in range(4)] == [0.0, 0.0, 1.0, 2.0]
    now[0] = 10.0
    assert budget.spend() == 0.0
