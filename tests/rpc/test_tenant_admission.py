"""What one tenant may ask of a replica, and that another notices nothing when it asks for more."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from service.rpc.admission import LONGEST_HOLD_S, TenantAdmissions, TokenBucket
from service.rpc.auth import AllowAll, Principal
from service.settings import Limits
from service.tenants import TenantRates
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.rpc.admission import TenantAdmission
    from service.rpc.auth import Caller
    from tests.rpc.conftest import Served

    Serve = Callable[..., Awaitable[Served]]
    Refused = Callable[[Awaitable[Any]], Awaitable[Any]]
    Unpack = Callable[[Any], Any]
    MakeTensor = Callable[..., Any]
    MakeChunk = Callable[..., Any]
    Until = Callable[[Callable[[], Any]], Awaitable[None]]

GREEDY, MODEST = (("tenant", "greedy"),), (("tenant", "modest"),)
UPDATE = pb.UpdateRequest(model_id="m", request_id="r")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now_s


class ByMetadata(AllowAll):
    """Takes the tenant from the metadata."""

    def authenticate(self, caller: Caller) -> Principal:
        """Return the tenant that the caller names."""
        return Principal(dict(caller.invocation_metadata() or ())["tenant"])


class Rates:
    """The rates of the greedy tenant; everyone else has none."""

    def __init__(self, **rates: int) -> None:
        self.greedy = TenantRates(**rates)

    def __call__(self, tenant: str) -> TenantRates:
        """Return the rates of a tenant."""
        return self.greedy if tenant == "greedy" else TenantRates()


@pytest.fixture
def clock() -> Clock:
    """The clock of the buckets."""
    return Clock()


async def started(serve: Serve, tenants: TenantAdmissions) -> Served:
    """Serve two tenants with these bounds."""
    return await serve(authenticator=ByMetadata(), tenants=tenants)


async def read_results(call: Any, count: int) -> list[pb.OperationResult]:
    """Read messages until so many results have come."""
    results: list[pb.OperationResult] = []
    while len(results) < count:
        results += (await call.read()).results
    return results


def test_a_bucket_fills_by_its_rate_and_holds_a_second_of_it(clock: Clock) -> None:
    """What was not used for longer than a second is lost."""
    bucket = TokenBucket(4.0, clock)
    clock.now_s += 3600
    for _ in range(4):
        assert bucket.wait_s() == 0
        bucket.take(1)
    assert bucket.wait_s() == 0.25
    clock.now_s += 0.25
    assert bucket.wait_s() == 0


def test_a_bucket_owes_what_is_larger_than_itself(clock: Clock) -> None:
    """The next one waits until it is paid, so that the rate holds for any size."""
    bucket = TokenBucket(4.0, clock)
    bucket.take(12)
    assert bucket.wait_s() == 2.25
    clock.now_s += 2.25
    assert bucket.wait_s() == 0


def test_fifty_refusals_a_second_come_at_once_and_more_come_later(clock: Clock) -> None:
    """Each waits 20 ms longer than the one before, up to a second; whoever comes less often waits for none."""
    greedy = TenantAdmissions(Rates(), clock=clock).of("greedy")
    delays = [greedy.refusal_delay_s() for _ in range(110)]
    assert delays[:50] == [0.0] * 50
    assert delays[50:100] == pytest.approx([0.02 * count for count in range(1, 51)])
    assert delays[100:] == [1.0] * 10
    clock.now_s += 2.0
    assert greedy.refusal_delay_s() == 0


async def test_a_tenant_beyond_its_rate_is_refused_and_another_is_not(
    serve: Serve, refused: Refused, clock: Clock
) -> None:
    """The refusal says which limit, how much it is and when to come again; then it is let in."""
    served = await started(serve, TenantAdmissions(Rates(operations_per_second=2), clock=clock))
    for _ in range(2):
        await served.rnn.Update(UPDATE, metadata=GREEDY)
    refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert (refusal.metadata["bound"], refusal.metadata["limit"]) == ("operations_per_second", "2")
    assert refusal.details["RetryInfo"].retry_delay.ToMilliseconds() == 500
    for _ in range(5):
        await served.rnn.Update(UPDATE, metadata=MODEST)
    clock.now_s += 0.5
    await served.rnn.Update(UPDATE, metadata=GREEDY)


@pytest.fixture
async def exhausted(serve: Serve, clock: Clock) -> tuple[Served, TenantAdmission]:
    """A server and the bounds of a tenant that has used up its rate, and its refusals for the next second."""
    tenants = TenantAdmissions(Rates(operations_per_second=1), clock=clock)
    served, greedy = await started(serve, tenants), tenants.of("greedy")
    await served.rnn.Update(UPDATE, metadata=GREEDY)
    while greedy.refusal_delay_s() < LONGEST_HOLD_S:
        pass
    return served, greedy


async def test_a_tenant_that_does_not_wait_when_it_is_refused_waits_for_the_refusal(
    exhausted: tuple[Served, TenantAdmission], refused: Refused, until: Until
) -> None:
    """Meanwhile its neighbour is served, and what it was refused for has not changed in the end."""
    served, greedy = exhausted
    late = asyncio.ensure_future(refused(served.rnn.Update(UPDATE, metadata=GREEDY)))
    await until(lambda: greedy.held.count)
    await served.rnn.Update(UPDATE, metadata=MODEST)
    assert not late.done()
    assert (await late).metadata["bound"] == "operations_per_second"
    assert greedy.held.count == 0


async def test_a_refusal_comes_before_the_callers_deadline(
    exhausted: tuple[Served, TenantAdmission], refused: Refused
) -> None:
    """It says that nothing was done, and an expired deadline would not."""
    served, _ = exhausted
    refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY, timeout=0.9))
    assert refusal.reason == "OVERLOADED"


async def test_a_cancelled_call_does_not_stay_held(
    exhausted: tuple[Served, TenantAdmission], until: Until
) -> None:
    """Its place goes to another at once."""
    served, greedy = exhausted
    call = served.rnn.Update(UPDATE, metadata=GREEDY)
    await until(lambda: greedy.held.count)
    call.cancel()
    await until(lambda: not greedy.held.count)


async def test_bytes_a_second_are_counted_by_the_request(
    serve: Serve, refused: Refused, tensor: MakeTensor, clock: Clock
) -> None:
    """A request larger than the rate is let in, and the next has to wait for as long as it takes."""
    served = await started(serve, TenantAdmissions(Rates(bytes_per_second=1000), clock=clock))
    chunk = pb.ForwardRequest(model_id="m", xs=tensor(1, 10, 100))
    size = chunk.ByteSize()
    await served.rnn.Forward(chunk, metadata=GREEDY)
    refusal = await refused(served.rnn.Forward(chunk, metadata=GREEDY))
    assert refusal.metadata["bound"] == "bytes_per_second"
    wait_ms = refusal.details["RetryInfo"].retry_delay.ToMilliseconds()
    assert wait_ms == pytest.approx(size - 999, abs=1)
    clock.now_s += wait_ms / 1000 + 1e-6
    await served.rnn.Forward(chunk, metadata=GREEDY)


async def test_a_tenant_has_its_own_bound_of_work_in_flight(
    serve: Serve, refused: Refused, until: Until
) -> None:
    """What a tenant has in work keeps nobody else out; when it is done, the tenant may send more."""
    served = await started(serve, TenantAdmissions(Rates(operations_in_flight=1)))
    release = asyncio.Event()
    served.domain.answers["update"] = release.wait
    first = asyncio.ensure_future(served.rnn.Update(UPDATE, metadata=GREEDY))
    await until(lambda: served.domain.asked)
    refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY))
    assert (refusal.metadata["bound"], refusal.metadata["limit"]) == ("operations_in_flight", "1")
    assert "of this tenant" in refusal.message
    other = asyncio.ensure_future(served.rnn.Update(UPDATE, metadata=MODEST))
    await until(lambda: served.server.admission.operations == 2)
    release.set()
    await asyncio.gather(first, other)
    await served.rnn.Update(UPDATE, metadata=GREEDY)


async def test_what_has_no_room_in_work_does_not_use_up_the_rate(
    serve: Serve, refused: Refused, until: Until, clock: Clock
) -> None:
    """A tenant that is refused while its work goes on may send as many operations a second as before."""
    rates = Rates(operations_in_flight=1, operations_per_second=2)
    served = await started(serve, TenantAdmissions(rates, clock=clock))
    release = asyncio.Event()
    served.domain.answers["update"] = release.wait
    first = asyncio.ensure_future(served.rnn.Update(UPDATE, metadata=GREEDY))
    await until(lambda: served.domain.asked)
    for _ in range(3):
        refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY))
        assert refusal.metadata["bound"] == "operations_in_flight"
    release.set()
    await first
    await served.rnn.Update(UPDATE, metadata=GREEDY)
    refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY))
    assert refusal.metadata["bound"] == "operations_per_second"


ONE, BYTES = {"operations_per_second": 2}, {"bytes_per_second": 900}


@pytest.mark.parametrize(
    ("rates", "limits", "full", "is_streamed"),
    [
        (ONE | {"operations_in_flight": 1}, Limits(), "operations_in_flight", True),
        (ONE | {"request_bytes_in_flight": 1000}, Limits(), "request_bytes_in_flight", False),
        (ONE | {"request_bytes_in_flight": 1000}, Limits(), "request_bytes_in_flight", True),
        (ONE, Limits(operations_in_flight=1), "operations_in_flight", False),
        (ONE, Limits(operations_in_flight=1), "operations_in_flight", True),
        (ONE, Limits(request_bytes_in_flight=1000), "request_bytes_in_flight", False),
        # Room for another request, and none for its answer.
        (BYTES | {"request_bytes_in_flight": 2000}, Limits(), "request_bytes_in_flight", False),
        (BYTES | {"request_bytes_in_flight": 2000}, Limits(), "request_bytes_in_flight", True),
    ],
)
async def test_what_has_no_room_does_not_use_up_a_rate(
    serve: Serve,
    tensor: MakeTensor,
    refused: Refused,
    unpack: Unpack,
    until: Until,
    clock: Clock,
    *,
    rates: dict[str, int],
    limits: Limits,
    full: str,
    is_streamed: bool,
) -> None:
    """Of two operations a second, one has been let in; refusals leave the other for when there is room."""
    tenants = TenantAdmissions(Rates(**rates), clock=clock)
    served = await serve(limits=limits, authenticator=ByMetadata(), tenants=tenants)
    chunk = pb.ForwardRequest(model_id="m", xs=tensor(1, 115, 1))
    assert 450 < chunk.ByteSize() < 500  # the second of two uses up the rate
    stream = served.rnn.Stream(metadata=GREEDY)

    async def bound_of_refusal() -> str:
        """Return which bound keeps another operation out; empty if none does."""
        if is_streamed:
            await stream.write(pb.StreamRequest(operations=[pb.Operation(tag=1, forward=chunk)]))
            (result,) = await read_results(stream, 1)
            return unpack(result.error).metadata["bound"] if result.HasField("error") else ""
        call = served.rnn.Forward(chunk, metadata=GREEDY)
        if await call.code() is grpc.StatusCode.OK:
            return ""
        bound: str = (await refused(call)).metadata["bound"]
        return bound

    served.domain.hold = True
    first = asyncio.ensure_future(served.rnn.Forward(chunk, metadata=GREEDY))
    await until(lambda: served.domain.held)
    assert [await bound_of_refusal() for _ in range(4)] == [full] * 4
    served.domain.hold = False
    served.domain.release()
    await first
    assert await bound_of_refusal() == ""
    (rate,) = (name for name in rates if name.endswith("per_second"))
    assert await bound_of_refusal() == rate


@pytest.mark.parametrize(("limit", "taken"), [(1, 1), (2, 2), (3, 3)])
async def test_a_rate_lets_in_so_many_and_not_one_more(
    serve: Serve, refused: Refused, clock: Clock, limit: int, taken: int
) -> None:
    """At a standstill of the clock the bound itself is reached and not passed."""
    served = await started(serve, TenantAdmissions(Rates(operations_per_second=limit), clock=clock))
    for _ in range(taken):
        await served.rnn.Update(UPDATE, metadata=GREEDY)
    refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY))
    assert refusal.metadata["limit"] == str(limit)


async def test_operations_on_a_stream_are_counted_each(
    serve: Serve, chunk: MakeChunk, unpack: Unpack, clock: Clock
) -> None:
    """The stream stays open: what is beyond the rate has its own refusal, and later ones are let in."""
    served = await started(serve, TenantAdmissions(Rates(operations_per_second=2), clock=clock))
    call = served.rnn.Stream(metadata=GREEDY)
    operations = [chunk(f"s{index}", 1, tag=index) for index in range(3)]
    await call.write(pb.StreamRequest(operations=operations))
    results = await read_results(call, 3)
    refusals = [result for result in results if result.HasField("error")]
    assert [result.tag for result in refusals] == [2]
    assert unpack(refusals[0].error).metadata["bound"] == "operations_per_second"
    clock.now_s += 0.5
    await call.write(pb.StreamRequest(operations=[chunk("s2", 1, tag=3)]))
    assert (await call.read()).results[0].forward.session_id == "s2"


async def test_a_stream_beyond_its_rate_is_not_read_until_it_may_come_again(
    serve: Serve, chunk: MakeChunk, clock: Clock
) -> None:
    """Who does not wait when it is refused waits in its own connection, and costs its neighbours nothing."""
    served = await started(serve, TenantAdmissions(Rates(operations_per_second=1), clock=clock))
    call = served.rnn.Stream(metadata=GREEDY)
    for tag in range(3):
        await call.write(pb.StreamRequest(operations=[chunk(f"s{tag}", 1, tag=tag)]))
    results = await read_results(call, 2)
    assert [result.HasField("error") for result in results] == [False, True]
    third = asyncio.ensure_future(read_results(call, 1))
    assert await asyncio.wait({third}, timeout=0.3) == (set(), {third})
    clock.now_s += 1.0
    assert [result.HasField("error") for result in await third] == [False]


async def test_workers_divide_a_tenants_bounds(
    serve: Serve, refused: Refused, clock: Clock
) -> None:
    """Each of four workers takes a quarter of the rate."""
    admissions = TenantAdmissions(Rates(operations_per_second=4), parts=4, clock=clock)
    served = await started(serve, admissions)
    await served.rnn.Update(UPDATE, metadata=GREEDY)
    refusal = await refused(served.rnn.Update(UPDATE, metadata=GREEDY))
    assert refusal.metadata["limit"] == "1"


async def test_new_rates_hold_for_open_streams(
    serve: Serve, chunk: MakeChunk, unpack: Unpack, clock: Clock
) -> None:
    """A tenant that had no rate has one from the moment the file says so."""
    rates = Rates()
    admissions = TenantAdmissions(rates, clock=clock)
    served = await started(serve, admissions)
    call = served.rnn.Stream(metadata=GREEDY)
    await call.write(pb.StreamRequest(operations=[chunk("s", 1, tag=1)]))
    assert (await call.read()).results[0].tag == 1
    rates.greedy = TenantRates(operations_per_second=1)
    admissions.renew()
    operations = [chunk("a", 1, tag=2), chunk("b", 1, tag=3)]
    await call.write(pb.StreamRequest(operations=operations))
    results = await read_results(call, 2)
    assert sorted(result.HasField("error") for result in results) == [False, True]
