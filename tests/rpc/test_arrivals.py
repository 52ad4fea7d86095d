"""Messages on their way in: room for each before it is read, and no sender that keeps it for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from service.domain.errors import ResourceExhausted
from service.rpc.admission import Admission, Share
from service.rpc.arrivals import ArrivalRules, Arrivals
from service.rpc.auth import Principal
from service.rpc.errors import DeadlineExceeded
from service.rpc.stream import StreamRules
from service.settings import Limits
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    MakeTensor = Callable[..., Any]
    Until = Callable[[Callable[[], Any]], Awaitable[None]]

SIZE = 100
QUICK = ArrivalRules(limit_s=0.2, slow_s=0.02)
FORWARD = "/timernn.v1.TimeRnnService/Forward"
STREAM = "/timernn.v1.TimeRnnService/Stream"


class Sender:
    """The reading side of a call whose message comes when the test says so."""

    def __init__(self) -> None:
        self.message: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.is_read = False

    async def read(self) -> bytes:
        """Wait for the message."""
        self.is_read = True
        return await self.message


def room_for(
    messages: int,
    rules: ArrivalRules | None = None,
    *,
    admission: Admission | None = None,
    waiting: int = 100,
) -> Arrivals:
    """Return arrivals that read so many of the largest messages at once, beside no work."""
    admission = admission or Admission(100, 100 * SIZE)
    room = messages * SIZE
    return Arrivals(
        admission,
        message_bytes=SIZE,
        room_bytes=room,
        rules=rules or ArrivalRules(),
        waiting_limit=waiting,
    )


def begin(
    arrivals: Arrivals, count: int, tenant: str = "t"
) -> tuple[list[Any], list[asyncio.Task[Any]]]:
    """Begin to read from so many senders."""
    senders: list[Any] = [Sender() for _ in range(count)]
    return senders, [asyncio.ensure_future(arrivals.read(each, tenant)) for each in senders]


async def test_no_more_are_read_than_there_is_room_for_the_largest(until: Until) -> None:
    """The next one is read when one before it has come, in the order of their coming."""
    arrivals = room_for(2)
    senders, tasks = begin(arrivals, 4)
    await asyncio.sleep(0)
    assert [each.is_read for each in senders] == [True, True, False, False]
    assert arrivals.room_taken_bytes == 2 * SIZE
    senders[1].message.set_result(b"one")
    assert await tasks[1] == b"one"
    await until(lambda: senders[2].is_read)
    assert not senders[3].is_read
    for each in senders:
        if not each.message.done():
            each.message.set_result(b"")
    await asyncio.gather(*tasks)
    assert (arrivals.room_taken_bytes, len(arrivals.waiting)) == (0, 0)


async def test_a_room_smaller_than_a_message_takes_one() -> None:
    """No message within the limit is refused for ever."""
    arrivals = room_for(0)
    senders, tasks = begin(arrivals, 1)
    await asyncio.sleep(0)
    senders[0].message.set_result(b"one")
    assert await tasks[0] == b"one"


async def test_a_message_that_does_not_come_ends_its_call() -> None:
    """After the bound its place is free again."""
    arrivals = room_for(1, QUICK)
    _, (task,) = begin(arrivals, 1)
    with pytest.raises(DeadlineExceeded) as caught:
        await task
    assert caught.value.reason == "SLOW_MESSAGE"
    assert arrivals.room_taken_bytes == 0


async def test_slow_senders_leave_a_quarter_of_the_room_to_others() -> None:
    """With all places taken by slow ones, the last of them is refused for whoever waits."""
    arrivals = room_for(4, ArrivalRules(limit_s=60.0, slow_s=0.02))
    _, slow = begin(arrivals, 4)
    await asyncio.sleep(0)
    (quick,), (task,) = begin(arrivals, 1)
    quick.message.set_result(b"quick")
    assert await task == b"quick"
    with pytest.raises(ResourceExhausted) as caught:
        await slow[3]
    assert caught.value.reason == "OVERLOADED"
    assert not any(each.done() for each in slow[:3])
    for each in slow:
        each.cancel()
    await asyncio.wait(slow)


async def test_slow_senders_go_on_while_nobody_waits() -> None:
    """A slow line alone is no reason to refuse."""
    arrivals = room_for(1, ArrivalRules(limit_s=60.0, slow_s=0.01))
    (sender,), (task,) = begin(arrivals, 1)
    await asyncio.sleep(0.05)
    sender.message.set_result(b"late")
    assert await task == b"late"


async def test_what_is_in_work_leaves_less_room() -> None:
    """Only as many are read as would fit beside the work, and the next one when some of it is done."""
    admission = Admission(10, 4 * SIZE)
    arrivals = room_for(4, admission=admission)
    with Share(admission, Principal("t")) as work:
        work.take(2 * SIZE)
        senders, tasks = begin(arrivals, 4)
        await asyncio.sleep(0)
        assert [each.is_read for each in senders] == [True, True, False, False]
        work.give_back(SIZE)
        await asyncio.sleep(0)
        assert [each.is_read for each in senders] == [True, True, True, False]
    for each in senders:
        each.message.set_result(b"")
    await asyncio.gather(*tasks)


async def test_a_full_replica_still_reads_one() -> None:
    """A small message may fit; what was read too much is refused with a reason."""
    admission = Admission(10, SIZE)
    arrivals = room_for(1, admission=admission)
    with Share(admission, Principal("t")) as work:
        work.take(SIZE)
        (sender,), (task,) = begin(arrivals, 1)
        sender.message.set_result(b"one")
        assert await task == b"one"


async def test_tenants_take_turns() -> None:
    """One with many calls that wait lets another's through after the next of its own."""
    arrivals = room_for(1)
    senders, tasks = begin(arrivals, 4)
    (modest,), (task,) = begin(arrivals, 1, "modest")
    await asyncio.sleep(0)
    for each in senders[:2]:
        each.message.set_result(b"")
    modest.message.set_result(b"mine")
    assert await task == b"mine"
    assert not senders[3].is_read
    for each in senders[2:]:
        each.message.set_result(b"")
    await asyncio.gather(*tasks)


async def test_only_so_many_of_a_tenant_wait_for_room() -> None:
    """What waits holds its window, so the next one is refused at once."""
    arrivals = room_for(1, waiting=1)
    _, tasks = begin(arrivals, 2)
    await asyncio.sleep(0)
    _, (surplus,) = begin(arrivals, 1)
    with pytest.raises(ResourceExhausted) as caught:
        await surplus
    assert caught.value.reason == "OVERLOADED"
    for each in tasks:
        each.cancel()
    await asyncio.wait(tasks)


async def test_a_wait_for_room_has_an_end() -> None:
    """Whoever waits in vain hears that the replica is overloaded."""
    arrivals = room_for(1, ArrivalRules(limit_s=0.1, slow_s=0.02))
    (first,), (holding,) = begin(arrivals, 1)
    await asyncio.sleep(0.05)
    arrivals.reading[holding] += 60.0  # this one is in time, whatever the machine does
    _, (waiting,) = begin(arrivals, 1)
    with pytest.raises(ResourceExhausted) as caught:
        await waiting
    assert caught.value.reason == "OVERLOADED"
    first.message.set_result(b"")
    await holding


async def test_who_goes_away_while_it_waits_takes_no_room() -> None:
    """A call that is cancelled in the moment of its turn leaves the turn to the next one."""
    arrivals = room_for(1)
    senders, tasks = begin(arrivals, 3)
    await asyncio.sleep(0)
    senders[0].message.set_result(b"")
    await tasks[0]
    tasks[1].cancel()
    senders[2].message.set_result(b"two")
    assert await tasks[2] == b"two"
    assert arrivals.room_taken_bytes == 0


async def test_a_cancellation_of_the_call_stays_one() -> None:
    """What gRPC cancels ends as cancelled, not as a refusal."""
    arrivals = room_for(1)
    _, (task,) = begin(arrivals, 1)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert arrivals.room_taken_bytes == 0


async def test_a_unary_call_without_its_message_is_ended_with_a_reason(
    serve: Serve, refused: Refused
) -> None:
    """A real client that opens a call and sends nothing gets a typed error after the bound."""
    served = await serve(arrival_rules=QUICK)
    call = served.channel.stream_unary(FORWARD)()
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "SLOW_MESSAGE")
    assert served.server.admission.operations == 0


async def test_a_unary_call_that_ends_without_a_message_is_malformed(
    serve: Serve, refused: Refused
) -> None:
    """Half-closed without a message: there is nothing to parse."""
    served = await serve()
    refusal = await refused(served.channel.stream_unary(FORWARD)(iter([])))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "MALFORMED")


async def test_callers_that_send_nothing_do_not_keep_others_out(
    serve: Serve, tensor: MakeTensor, until: Until
) -> None:
    """Small calls are served beside as many silent ones as fill the room."""
    limits = Limits(message_bytes=1 << 20, request_bytes_in_flight=8 << 20)
    served = await serve(limits=limits, arrival_rules=ArrivalRules(limit_s=60.0, slow_s=0.02))
    silent = [served.channel.stream_unary(FORWARD)() for _ in range(8)]
    await until(lambda: served.server.arrivals.waiting)
    await served.rnn.Forward(pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1)), timeout=30)
    for call in silent:
        call.cancel()


async def test_only_so_many_streams_may_be_quiet(serve: Serve, until: Until) -> None:
    """A quiet stream may hold half of a message: one too many, and the first is asked to move."""
    limits = Limits(message_bytes=1 << 20, request_bytes_in_flight=4 << 20)
    rules = StreamRules(quiet_s=0.02, sweep_s=0.01, goodbye_s=0.05)
    served = await serve(limits=limits, rules=rules)
    streams = [served.channel.stream_stream(STREAM)() for _ in range(3)]
    answers = [asyncio.ensure_future(each.read()) for each in streams]
    done, rest = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
    (answer,) = done
    assert pb.StreamResponse.FromString(answer.result()).draining
    for each in streams:
        each.cancel()
    await asyncio.wait(rest)


async def test_a_stream_reads_on_once_there_is_room(
    serve: Serve, tensor: MakeTensor, until: Until
) -> None:
    """With the replica full of others' work, nothing is read; what is given back lets it go on."""
    served = await serve()
    admission = served.server.admission
    request = pb.StreamRequest()
    request.operations.add().forward.CopyFrom(pb.ForwardRequest(model_id="m", xs=tensor(1, 1, 1)))
    with Share(admission, Principal("other")) as others:
        others.take(admission.max_bytes)
        stream = served.channel.stream_stream(STREAM)()
        await stream.write(request.SerializeToString())
        await until(lambda: admission.when_released)
        assert admission.request_bytes == admission.max_bytes
    answer = pb.StreamResponse.FromString(await stream.read())
    assert answer.results[0].forward.ByteSize()
    await stream.done_writing()
