"""Operations without gRPC, as another protocol on the same port would run them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from service.domain.errors import InvalidArgument, ResourceExhausted
from service.rpc.auth import DEFAULT_TENANT
from service.settings import Limits
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]
    MakeTensor = Callable[..., Any]

FORWARD = "/timernn.v1.TimeRnnService/Forward"


class Peer:
    """A caller of another protocol, without a credential."""

    def invocation_metadata(self) -> Any:
        """Return no headers."""
        return ()

    def peer(self) -> str:
        """Return an address."""
        return "http:192.0.2.1:4711"

    def auth_context(self) -> Any:
        """Return no certificate."""
        return {}


async def run(served: Any, method: str, request: Any) -> Any:
    """Run a unary operation as a protocol would: let the caller in, take its bytes, call."""
    dispatcher = served.server.dispatcher
    operation = dispatcher.operations[method]
    with dispatcher.let_in(operation, Peer()) as share:
        share.take(request.ByteSize(), operations=1)
        return await dispatcher.call(operation, request, share)


async def test_an_operation_runs_by_the_name_of_its_method(
    serve: Serve, tensor: MakeTensor
) -> None:
    """A request message in, a response message out, for the tenant of the caller."""
    served = await serve()
    request = pb.ForwardRequest(session_id="a", epoch=1, chunk_seq=3, xs=tensor(1, 2, 1))
    response = await run(served, FORWARD, request)
    assert isinstance(response, pb.ForwardResponse)
    assert response.chunk_seq == 3
    assert served.domain.asked[0][0] == DEFAULT_TENANT


@pytest.mark.parametrize("is_refused", [False, True])
async def test_an_operation_gives_back_what_it_held(
    serve: Serve, tensor: MakeTensor, *, is_refused: bool
) -> None:
    """While it runs, its request and the answer to come count; afterwards nothing does."""
    served = await serve()
    admission, request = served.server.admission, pb.ForwardRequest(session_id="a", epoch=1)
    if is_refused:
        with pytest.raises(InvalidArgument):
            await run(served, FORWARD, request)
    else:
        served.domain.hold = True
        request = pb.ForwardRequest(session_id="a", epoch=1, chunk_seq=1, xs=tensor(1, 2, 1))
        running = asyncio.ensure_future(run(served, FORWARD, request))
        await asyncio.sleep(0)
        held = request.ByteSize() + 3 * served.domain.hidden_size * 4
        assert (admission.operations, admission.request_bytes) == (1, held)
        served.domain.release()
        await running
    assert (admission.operations, admission.request_bytes) == (0, 0)


async def test_an_answer_that_finds_no_room_is_not_computed(
    serve: Serve, tensor: MakeTensor
) -> None:
    """What the answer may need is taken before the domain is asked."""
    served = await serve(limits=Limits(request_bytes_in_flight=1000))
    served.domain.hold = True
    request = pb.ForwardRequest(model_id="m", xs=tensor(1, 100, 1))
    first = asyncio.ensure_future(run(served, FORWARD, request))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as caught:
        await run(served, FORWARD, request)
    assert caught.value.metadata["bound"] == "request_bytes_in_flight"
    assert len(served.domain.asked) == 1
    served.domain.release()
    await first
