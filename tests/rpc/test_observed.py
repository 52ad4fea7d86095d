"""What an observer sees of calls and of the operations on streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from recorder import Recorder
from service.domain.errors import Aborted
from timernn.v1 import model_service_pb2, session_service_pb2
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    MakeTensor = Callable[..., Any]
    Until = Callable[[Callable[[], Any]], Awaitable[None]]

FORWARD = "/timernn.v1.TimeRnnService/Forward"
STREAM = "/timernn.v1.TimeRnnService/Stream"


@pytest.fixture
def recorder() -> Recorder:
    """What has been seen."""
    return Recorder()


@pytest.fixture
def request_of(tensor: MakeTensor) -> Callable[[int], pb.ForwardRequest]:
    """Make a chunk of session a."""

    def request_of(chunk_seq: int) -> pb.ForwardRequest:
        return pb.ForwardRequest(session_id="a", epoch=1, chunk_seq=chunk_seq, xs=tensor(1, 1, 1))

    return request_of


def without_duration(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out how long it took, which must not be less than nothing."""
    assert all(report["duration_s"] >= 0 for report in reports)
    return [
        {key: value for key, value in report.items() if key != "duration_s"} for report in reports
    ]


async def test_a_unary_call_is_one_rpc_and_one_operation(
    serve: Serve, request_of: Callable[[int], pb.ForwardRequest], recorder: Recorder
) -> None:
    """Its bytes are those of its messages."""
    served = await serve(observer=recorder)
    request = request_of(1)
    answer = await served.rnn.Forward(request)
    assert recorder.seen["rpc_started"] == [{"name": FORWARD}]
    assert without_duration(recorder.seen["rpc_ended"]) == [{"name": FORWARD, "code": "OK"}]
    assert without_duration(recorder.seen["operation_ended"]) == [
        {
            "name": "forward",
            "outcome": "OK",
            "code": "OK",
            "request_bytes": request.ByteSize(),
            "answer_bytes": answer.ByteSize(),
        }
    ]


async def test_a_refusal_is_seen_by_its_code_and_its_reason(
    serve: Serve,
    refused: Refused,
    request_of: Callable[[int], pb.ForwardRequest],
    recorder: Recorder,
) -> None:
    """The call has the code, the operation the reason, and nothing was answered."""
    served = await serve(observer=recorder)
    served.domain.failures[1] = Aborted("SEQ_GAP", "a hole")
    await refused(served.rnn.Forward(request_of(1)))
    (call,) = recorder.seen["rpc_ended"]
    (operation,) = recorder.seen["operation_ended"]
    assert call["code"] == "ABORTED"
    assert (operation["outcome"], operation["answer_bytes"]) == ("SEQ_GAP", 0)


async def test_each_operation_of_a_frame_is_seen_and_the_stream_as_one_rpc(
    serve: Serve,
    request_of: Callable[[int], pb.ForwardRequest],
    recorder: Recorder,
    until: Until,
) -> None:
    """Two operations, one refused, are two reports; the call ends when the client half-closes."""
    served = await serve(observer=recorder)
    served.domain.failures[2] = Aborted("SEQ_GAP", "a hole")
    call = served.rnn.Stream()
    operations = [pb.Operation(tag=seq, forward=request_of(seq)) for seq in (1, 2)]
    frame = pb.StreamRequest(operations=operations)
    await call.write(frame)
    await call.done_writing()
    results = [result async for answer in call for result in answer.results]
    size = pb.StreamResponse(results=results[:1]).ByteSize()
    assert without_duration(recorder.seen["operation_ended"]) == [
        {
            "name": "forward",
            "outcome": outcome,
            "code": code,
            "request_bytes": frame.ByteSize() // 2,
            "answer_bytes": answer_bytes,
        }
        for outcome, code, answer_bytes in (("OK", "OK", size), ("SEQ_GAP", "ABORTED", 0))
    ]
    assert recorder.seen["operation_started"] == [{"name": "forward"}] * 2
    await until(lambda: recorder.seen["rpc_ended"])
    assert without_duration(recorder.seen["rpc_ended"]) == [{"name": STREAM, "code": "OK"}]


async def test_an_operation_whose_client_went_away_is_seen_as_cancelled(
    serve: Serve,
    request_of: Callable[[int], pb.ForwardRequest],
    recorder: Recorder,
    until: Until,
) -> None:
    """What was started ends in some way for everyone who counts."""
    served = await serve(observer=recorder)
    served.domain.hold = True
    call = served.rnn.Stream()
    await call.write(pb.StreamRequest(operations=[pb.Operation(forward=request_of(1))]))
    await until(lambda: served.domain.held)
    call.cancel()
    await until(lambda: recorder.seen["rpc_ended"])
    assert [each["outcome"] for each in recorder.seen["operation_ended"]] == ["CANCELLED"]
    assert [each["code"] for each in recorder.seen["rpc_ended"]] == ["CANCELLED"]


async def test_an_upload_is_an_operation_with_all_its_bytes(
    serve: Serve, refused: Refused, recorder: Recorder
) -> None:
    """A stream of messages counts as the sum of them."""
    served = await serve(observer=recorder)
    parts = [model_service_pb2.PutWeightsRequest(data=b"x" * size) for size in (5, 7)]
    await refused(served.models.PutWeights(iter(parts)))
    (operation,) = recorder.seen["operation_ended"]
    assert (operation["name"], operation["outcome"]) == ("put_weights", "BAD_FIELD")
    assert operation["request_bytes"] == parts[0].ByteSize()


async def test_a_method_of_two_words_is_seen_in_snake_case(
    serve: Serve, refused: Refused, recorder: Recorder
) -> None:
    """An operation has the name of its method, whatever service it is of."""
    served = await serve(observer=recorder)
    await refused(served.sessions.GetSession(session_service_pb2.GetSessionRequest()))
    assert [each["name"] for each in recorder.seen["operation_ended"]] == ["get_session"]
