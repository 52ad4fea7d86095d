"""The bidirectional stream: order, frames, back-pressure, tokens, ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from service.domain.errors import Aborted, NotFound
from service.rpc.stream import StreamRules
from service.settings import Limits
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    MakeTensor = Callable[..., Any]
    Unpack = Callable[[Any], Any]
    Until = Callable[[Callable[[], Any]], Awaitable[None]]
    MakeChunk = Callable[..., pb.Operation]


async def send(call: Any, *operations: pb.Operation) -> None:
    """Send operations as one message."""
    await call.write(pb.StreamRequest(operations=operations))


async def read_results(call: Any, count: int) -> list[pb.OperationResult]:
    """Read messages until so many results have come."""
    results: list[pb.OperationResult] = []
    while len(results) < count:
        message = await call.read()
        assert message is not grpc.aio.EOF, results
        results += message.results
    return results


def previous_tokens(domain: Any) -> list[bytes]:
    """The tokens with which the domain was asked."""
    return [forward.previous_token for _, forward in domain.asked]


def token_of(chunk_seq: int) -> bytes:
    """The token that the stand-in gives a chunk."""
    return f"token {chunk_seq:010}".encode()


async def test_a_lone_operation_is_answered_at_once(serve: Serve, chunk: MakeChunk) -> None:
    """Ping-pong: each answer comes before the next question."""
    call = (await serve()).rnn.Stream()
    for seq in range(1, 6):
        await send(call, chunk("a", seq))
        (result,) = (await call.read()).results
        assert (result.tag, result.forward.chunk_seq) == (seq, seq)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_frame_of_many_sessions_is_answered_in_one_message(
    serve: Serve, chunk: MakeChunk
) -> None:
    """What is ready together leaves together."""
    served = await serve()
    call = served.rnn.Stream()
    await send(call, *(chunk(f"s{i}", 1, tag=i) for i in range(100)))
    results = (await call.read()).results
    assert [result.tag for result in results] == list(range(100))


async def test_operations_of_one_session_run_one_after_another(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """The second chunk is submitted only when the first is answered."""
    served = await serve()
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 2), chunk("b", 1))
    await until(lambda: len(served.domain.held) == 2)
    assert [(f.session_id, f.chunk_seq) for f, _ in served.domain.held] == [("a", 1), ("b", 1)]
    served.domain.release()
    await until(lambda: served.domain.held)
    assert [(f.session_id, f.chunk_seq) for f, _ in served.domain.held] == [("a", 2)]
    served.domain.release()
    await read_results(call, 3)


async def test_ten_interleaved_sessions_are_each_answered_in_order(
    serve: Serve, chunk: MakeChunk
) -> None:
    """Whatever is joined or overtaken, one session's answers come as they were sent."""
    served = await serve()
    call = served.rnn.Stream()
    for seq in range(1, 4):
        for session in range(10):
            await send(call, chunk(f"s{session}", seq))
    results = await read_results(call, 30)
    for session in range(10):
        seqs = [r.forward.chunk_seq for r in results if r.forward.session_id == f"s{session}"]
        assert seqs == [1, 2, 3]


async def test_a_slow_session_does_not_hold_up_another(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """An answer leaves when it is ready, not when its neighbours are."""
    served = await serve()
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, chunk("slow", 1))
    await until(lambda: served.domain.held)
    served.domain.hold = False
    await send(call, chunk("fast", 1, tag=7))
    assert (await read_results(call, 1))[0].tag == 7
    served.domain.release()
    await read_results(call, 1)


async def test_a_failing_session_disturbs_no_other(
    serve: Serve, chunk: MakeChunk, unpack: Unpack
) -> None:
    """One session's error stands in its own result, with the details of a unary call's."""
    served = await serve()
    served.domain.failures[5] = NotFound("SESSION_NOT_FOUND", "no such session", id="a")
    call = served.rnn.Stream()
    await send(call, chunk("a", 5), chunk("b", 1))
    by_tag = {result.tag: result for result in await read_results(call, 2)}
    refusal = unpack(by_tag[5].error)
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "SESSION_NOT_FOUND")
    assert by_tag[1].forward.session_id == "b"


async def test_a_bad_operation_is_answered_in_its_turn(
    serve: Serve, chunk: MakeChunk, unpack: Unpack
) -> None:
    """What cannot even be submitted waits for the operations before it."""
    served = await serve()
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 0, tag=2), pb.Operation(tag=3), chunk("a", 2, tag=4))
    results = await read_results(call, 4)
    of_a = [result.tag for result in results if result.tag != 3]
    assert of_a == [1, 2, 4]
    by_tag = {result.tag: result for result in results}
    assert unpack(by_tag[2].error).message == "chunk_seq: must be 1 to 2^53-1, got 0"
    assert unpack(by_tag[3].error).reason == "BAD_FIELD"


async def test_an_empty_token_is_that_of_the_answer_before(serve: Serve, chunk: MakeChunk) -> None:
    """Chunks in flight are bound to the history that this stream saw."""
    served = await serve()
    call = served.rnn.Stream()
    await send(call, *(chunk("a", seq) for seq in (1, 2, 3)))
    await read_results(call, 3)
    assert previous_tokens(served.domain) == [b"", token_of(1), token_of(2)]


async def test_a_token_that_is_given_is_left_as_it_is(serve: Serve, chunk: MakeChunk) -> None:
    """The client's word comes first."""
    served = await serve()
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 2, previous_token=b"x" * 16))
    await read_results(call, 2)
    assert previous_tokens(served.domain)[1] == b"x" * 16


async def test_a_chunk_sent_again_gets_the_token_it_had(serve: Serve, chunk: MakeChunk) -> None:
    """A replay is bound to the chunk before it, not to the last one answered."""
    served = await serve()
    call = served.rnn.Stream()
    await send(call, *(chunk("a", seq) for seq in (1, 2, 3, 2)))
    await read_results(call, 4)
    assert previous_tokens(served.domain)[3] == token_of(1)


async def test_a_new_epoch_is_not_bound_to_the_old_one(serve: Serve, chunk: MakeChunk) -> None:
    """After a reset there is no answer before."""
    served = await serve()
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 2), chunk("a", 1, epoch=2))
    await read_results(call, 3)
    assert previous_tokens(served.domain)[2] == b""


async def test_what_follows_a_failed_chunk_is_not_tried_unchecked(
    serve: Serve, chunk: MakeChunk, unpack: Unpack
) -> None:
    """A rival wrote chunk 5: our pipelined chunk 6 must not continue the rival's history."""
    served = await serve()
    served.domain.failures[5] = Aborted("HISTORY_FORKED", "another history")
    call = served.rnn.Stream()
    await send(call, chunk("a", 5, previous_token=token_of(4)), chunk("a", 6), chunk("a", 7))
    results = await read_results(call, 3)
    refusals = [unpack(result.error) for result in results]
    assert [refusal.reason for refusal in refusals] == ["HISTORY_FORKED", "SEQ_GAP", "SEQ_GAP"]
    assert refusals[1].metadata["expected_seq"] == "5"
    assert len(served.domain.asked) == 1


async def test_after_a_failure_the_same_chunk_may_come_again(
    serve: Serve, chunk: MakeChunk
) -> None:
    """A chunk that failed for a while goes through, and so do those behind it."""
    served = await serve()
    served.domain.failures[2] = Aborted("SEQ_GAP", "a hole")
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 2))
    await read_results(call, 2)
    served.domain.failures.clear()
    await send(call, chunk("a", 2), chunk("a", 3))
    results = await read_results(call, 2)
    assert [result.forward.chunk_seq for result in results] == [2, 3]
    assert previous_tokens(served.domain)[2:] == [token_of(1), token_of(2)]


async def test_an_update_waits_for_the_sessions_it_names(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """An Update stands in the order of every session whose contributions it takes."""
    served = await serve()
    served.domain.hold = True
    update = pb.UpdateRequest(
        model_id="m",
        request_id="r",
        contributions=[pb.ContributionSelector(session_id=name) for name in ("a", "b")],
    )
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("b", 1), pb.Operation(tag=9, update=update))
    await send(call, chunk("a", 2, tag=4))
    await until(lambda: len(served.domain.asked) == 2)
    served.domain.release()
    await until(lambda: len(served.domain.asked) == 4)
    assert type(served.domain.asked[2][1]).__name__ == "Update"
    served.domain.release()
    results = await read_results(call, 4)
    assert [result.tag for result in results][-2:] == [9, 4]


async def test_every_kind_of_operation_is_answered(
    serve: Serve, chunk: MakeChunk, tensor: MakeTensor
) -> None:
    """Forward with and without a session, Backward, Update, DiscardGradients."""
    served = await serve()
    call = served.rnn.Stream()
    backward = pb.BackwardRequest(
        session_id="a", epoch=1, chunk_seq=1, state_token=b"t" * 16, dhs=tensor(1, 1, 2)
    )
    await send(
        call,
        chunk("a", 1),
        pb.Operation(tag=2, backward=backward),
        pb.Operation(tag=3, update=pb.UpdateRequest(model_id="m", request_id="r")),
        pb.Operation(tag=4, discard_gradients=pb.DiscardGradientsRequest(model_id="m")),
        pb.Operation(tag=5, forward=pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1))),
    )
    results = await read_results(call, 5)
    kinds = {result.tag: result.WhichOneof("result") for result in results}
    assert kinds == {
        1: "forward",
        2: "backward",
        3: "update",
        4: "discard_gradients",
        5: "forward",
    }


async def test_nothing_is_read_beyond_the_bound_of_operations(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """More than may be unanswered stays with the client until there is room."""
    served = await serve(limits=Limits(stream_operations_in_flight=4))
    served.domain.hold = True
    call = served.rnn.Stream()

    async def send_all() -> None:
        for index in range(50):
            await send(call, chunk(f"s{index}", 1, tag=index))

    sending = asyncio.ensure_future(send_all())
    await until(lambda: len(served.domain.held) == 4)
    await asyncio.sleep(0.05)
    assert served.server.admission.operations == 4
    served.domain.hold = False
    served.domain.release()
    results = await read_results(call, 50)
    assert sorted(result.tag for result in results) == list(range(50))
    await sending


async def test_a_client_that_does_not_read_costs_bounded_memory(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """Once a message's worth of answers waits, nothing more is started or read."""
    limit = 1 << 20
    served = await serve(limits=Limits(message_bytes=limit))
    served.domain.hidden_size = 1 << 12
    call = served.rnn.Stream()

    async def send_all() -> None:
        for index in range(400):
            await send(call, chunk(f"s{index}", 1, steps=16, tag=index))

    sending = asyncio.ensure_future(send_all())
    await until(lambda: served.domain.asked)
    (stream,) = served.server.streams.open
    await until(lambda: stream.budget.answer_bytes >= limit)
    assert stream.budget.answer_bytes < 2 * limit
    assert len(served.domain.asked) < 400
    results = await read_results(call, 400)
    assert len({result.tag for result in results}) == 400
    await sending


async def test_a_frame_of_large_answers_is_worked_on_a_message_at_a_time(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """What a frame asks for is bounded before it is computed, however small the request is."""
    limit = 1 << 20
    served = await serve(limits=Limits(message_bytes=limit))
    served.domain.hidden_size = 1 << 12
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, *(chunk(f"s{index}", 1, steps=15, tag=index) for index in range(40)))
    await until(lambda: served.domain.held)
    one_answer = 16 * (1 << 12) * 4
    assert len(served.domain.held) == limit // one_answer
    assert served.server.admission.request_bytes >= limit
    served.domain.hold = False
    served.domain.release()
    results = await read_results(call, 40)
    assert sorted(result.tag for result in results) == list(range(40))
    await until(lambda: served.server.admission.request_bytes == 0)


async def test_a_client_that_does_not_read_takes_nobody_elses_place(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """What waits until it reads on is not in work: others are let in."""
    limit = 1 << 20
    served = await serve(limits=Limits(message_bytes=limit, operations_in_flight=10))
    served.domain.hidden_size = 1 << 12
    greedy = served.rnn.Stream()
    for seq in range(1, 101):
        await send(greedy, *(chunk("greedy", 4 * seq + k, steps=16) for k in range(4)))
    (stream,) = served.server.streams.open
    await until(lambda: stream.budget.answer_bytes >= limit and stream.budget.operations > 10)
    assert served.server.admission.operations == 0
    other = served.rnn.Stream()
    await send(other, chunk("modest", 1))
    (result,) = (await other.read()).results
    assert result.WhichOneof("result") == "forward"
    greedy.cancel()


async def test_joined_answers_stay_within_the_message_limit(serve: Serve, chunk: MakeChunk) -> None:
    """A message holds what fits, the rest goes with the next."""
    served = await serve(limits=Limits(message_bytes=20_000))
    served.domain.hidden_size = 1000
    call = served.rnn.Stream()
    await send(call, *(chunk(f"s{index}", 1, tag=index) for index in range(20)))
    count = 0
    while count < 20:
        message = await call.read()
        assert message.ByteSize() <= 20_000
        count += len(message.results)


async def test_an_answer_that_is_too_large_is_an_error_of_its_operation(
    serve: Serve, chunk: MakeChunk, unpack: Unpack
) -> None:
    """The stream goes on."""
    served = await serve(limits=Limits(message_bytes=1000))
    served.domain.hidden_size = 1000
    call = served.rnn.Stream()
    await send(call, chunk("a", 1))
    (result,) = await read_results(call, 1)
    assert unpack(result.error).reason == "MESSAGE_TOO_LARGE"
    served.domain.hidden_size = 1
    await send(call, chunk("b", 1))
    assert (await read_results(call, 1))[0].forward.session_id == "b"


async def test_operations_beyond_the_replicas_bound_are_overloaded(
    serve: Serve, chunk: MakeChunk, unpack: Unpack
) -> None:
    """Each is refused at once; those that were admitted are answered."""
    served = await serve(limits=Limits(operations_in_flight=2))
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, *(chunk(f"s{index}", 1, tag=index) for index in range(3)))
    (result,) = await read_results(call, 1)
    assert result.tag == 2
    assert unpack(result.error).reason == "OVERLOADED"
    served.domain.release()
    await read_results(call, 2)
    assert served.server.admission.operations == 0


async def test_a_message_of_too_many_operations_ends_the_stream(
    serve: Serve, chunk: MakeChunk, refused: Refused
) -> None:
    """What was accepted before is still answered."""
    served = await serve(limits=Limits(operations_per_message=2))
    call = served.rnn.Stream()
    await send(call, chunk("a", 1))
    await send(call, *(chunk("b", seq) for seq in (1, 2, 3)))
    assert (await read_results(call, 1))[0].forward.session_id == "a"
    refusal = await refused(call.read())
    assert refusal.message == "operations: must be at most 2 a message, got 3"


async def test_a_malformed_message_ends_the_stream(
    serve: Serve, chunk: MakeChunk, refused: Refused
) -> None:
    """Bytes that are no message have no tag to answer to."""
    served = await serve()
    call = served.channel.stream_stream("/timernn.v1.TimeRnnService/Stream")()
    await call.write(pb.StreamRequest(operations=[chunk("a", 1)]).SerializeToString())
    await call.write(b"\xff\xff")
    answer = pb.StreamResponse.FromString(await call.read())
    assert answer.results[0].tag == 1
    assert (await refused(call.read())).reason == "MALFORMED"


async def test_a_drain_answers_what_was_accepted_and_says_so(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """The client learns where the line is and sends the rest elsewhere."""
    served = await serve()
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 2))
    await until(lambda: served.domain.held)
    draining = asyncio.ensure_future(served.server.drain(10))
    await asyncio.sleep(0)
    served.domain.hold = False
    served.domain.release()
    results, drained = [], False
    while (message := await call.read()) is not grpc.aio.EOF:
        results += message.results
        drained = message.draining
    assert [result.tag for result in results] == [1, 2]
    assert drained
    await draining


async def test_a_client_that_goes_away_frees_everything(
    serve: Serve, chunk: MakeChunk, until: Until
) -> None:
    """Operations that nobody waits for are given up and uncounted, queued ones too."""
    served = await serve()
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, chunk("a", 1), chunk("a", 2), chunk("b", 1))
    await until(lambda: len(served.domain.held) == 2)
    call.cancel()
    await until(lambda: not served.server.admission.operations)
    assert served.server.admission.request_bytes == 0
    served.domain.release()
    assert (served.server.admission.operations, served.server.admission.request_bytes) == (0, 0)


async def test_an_operation_that_takes_too_long_is_given_up(
    serve: Serve, chunk: MakeChunk, unpack: Unpack
) -> None:
    """One session's hanging chunk has a deadline of its own."""
    served = await serve(rules=StreamRules(deadline_s=0.02, sweep_s=0.01))
    served.domain.hold = True
    call = served.rnn.Stream()
    await send(call, chunk("a", 1))
    (result,) = await read_results(call, 1)
    assert unpack(result.error).code == "DEADLINE_EXCEEDED"


async def test_an_idle_stream_is_ended(serve: Serve, refused: Refused) -> None:
    """A client that neither sends nor half-closes does not hold a stream for ever."""
    served = await serve(rules=StreamRules(idle_s=0.02, sweep_s=0.01))
    call = served.rnn.Stream()
    refusal = await refused(call.read())
    assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "IDLE_STREAM")


async def test_an_old_stream_is_asked_to_move(serve: Serve, chunk: MakeChunk) -> None:
    """Streams spread over replicas again, without losing an answer."""
    served = await serve(rules=StreamRules(age_s=0.05, sweep_s=0.01))
    call = served.rnn.Stream()
    await send(call, chunk("a", 1))
    await read_results(call, 1)
    assert (await call.read()).draining
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_no_task_is_left_behind(serve: Serve, chunk: MakeChunk, until: Until) -> None:
    """Streams that ended each in its own way leave no reader waiting."""
    served = await serve(rules=StreamRules(idle_s=0.05, sweep_s=0.01))
    served.domain.hold = True
    cancelled, idle = served.rnn.Stream(), served.rnn.Stream()
    await send(cancelled, chunk("a", 1))
    await until(lambda: served.domain.held)
    cancelled.cancel()
    with pytest.raises(grpc.aio.AioRpcError):
        await idle.read()
    await until(
        lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "stream reader"]
    )
