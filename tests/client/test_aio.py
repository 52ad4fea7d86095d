"""The asyncio frontend: the same core, awaited."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

import timernn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

XS = np.ones((1, 4, 3), "f4")


@pytest.fixture
async def client(stand_in: Any, quick: timernn.RetryPolicy) -> AsyncIterator[timernn.aio.Client]:
    """An asynchronous client of the stand-in."""
    async with timernn.aio.connect(stand_in.address, timeout=5, retry=quick) as connected:
        yield connected


def public(kind: type) -> dict[str, list[str]]:
    """Return what a class offers, with the names of the arguments."""
    return {
        name: list(inspect.signature(value).parameters) if callable(value) else []
        for name, value in inspect.getmembers(kind)
        if not name.startswith("_")
    }


@pytest.mark.parametrize("kind", ["Client", "Session"])
def test_both_frontends_have_the_same_names(kind: str) -> None:
    """Whatever one has, the other has, with the same arguments."""
    assert public(getattr(timernn, kind)) == public(getattr(timernn.aio, kind))


@pytest.mark.parametrize("kind", [timernn.Client, timernn.Session, timernn.aio.Session])
def test_methods_are_documented(kind: type) -> None:
    """Help shows the core's docstrings on either frontend."""
    assert [name for name in public(kind) if not inspect.getdoc(getattr(kind, name))] == []


async def test_a_session_opens_with_its_block(client: timernn.aio.Client) -> None:
    """`async with` opens it; the state is awaited."""
    async with client.session("m") as session:
        hs = await session.forward(XS)
        assert hs[0, :, 0].tolist() == [1, 2, 3, 4]


async def test_a_session_can_be_awaited(client: timernn.aio.Client) -> None:
    """`await` opens it without a block."""
    session = await client.session("m")
    assert session.session_id


async def test_sessions_run_beside_each_other(client: timernn.aio.Client) -> None:
    """Many tasks share one client."""
    sessions = [await client.session("m") for _ in range(8)]
    outputs = await asyncio.gather(*(session.forward(XS) for session in sessions))
    assert [hs[0, -1, 0] for hs in outputs] == [4] * 8


async def test_calls_of_one_session_take_turns(client: timernn.aio.Client, stand_in: Any) -> None:
    """Two tasks on one session do not take the same number."""
    session = await client.session("m")
    await asyncio.gather(*(session.forward(XS) for _ in range(5)))
    assert [r.chunk_seq for r in stand_in.requests["Forward"]] == [1, 2, 3, 4, 5]


async def test_a_cancelled_call_is_in_doubt(
    client: timernn.aio.Client, stand_in: Any, refusal: Any
) -> None:
    """Cancelled by its caller, a chunk is finished before the next one."""
    session = await client.session("m")
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.UNAVAILABLE, "", 4.0))
    call = asyncio.ensure_future(session.forward(XS))
    await asyncio.to_thread(stand_in.wait_for, "Forward")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert session.in_doubt
    hs = await session.forward(XS * 2)
    assert [r.chunk_seq for r in stand_in.requests["Forward"]] == [1, 1, 2]
    assert hs[0, -1, 0] == 8


async def test_stream_from_an_asynchronous_source(client: timernn.aio.Client) -> None:
    """Answers come while the source waits for its next chunk."""
    answered = asyncio.Event()

    async def source() -> AsyncIterator[Any]:
        yield XS
        await answered.wait()
        for _ in range(9):
            yield XS

    session = await client.session("m")
    got = []
    async for hs in session.stream(source()):
        answered.set()
        got.append(float(hs[0, -1, 0]))
    assert got == [4.0 * k for k in range(1, 11)]


async def test_stream_from_a_list(client: timernn.aio.Client) -> None:
    """An ordinary iterable will do."""
    session = await client.session("m")
    assert len([hs async for hs in session.stream([XS] * 5)]) == 5


async def test_a_loop_left_early_frees_the_session_at_once(client: timernn.aio.Client) -> None:
    """The next call does not find the session in use."""
    session = await client.session("m")
    async for _ in session.stream([XS] * 10):
        break
    hs = await session.forward(XS)
    assert hs[0, -1, 0] == 4.0 * session.chunk_seq


async def test_a_broken_stream_is_not_noticed(
    client: timernn.aio.Client, stand_in: Any, refusal: Any
) -> None:
    """Unanswered chunks are sent again on a new stream."""
    session = await client.session("m")
    stand_in.fail_next(
        "Forward", refusal(grpc.StatusCode.UNAVAILABLE, "BREAK"), after_applying=True
    )
    got = [float(hs[0, -1, 0]) async for hs in session.stream([XS] * 6)]
    assert got == [4.0 * k for k in range(1, 7)]


CHUNKS = [np.ones((1, count, 3), "f4") for count in range(1, 8)]
ENDS = [float(sum(range(k + 1))) for k in range(1, 8)]


async def test_answers_before_a_refused_one_in_one_message_are_given_out(
    client: timernn.aio.Client, stand_in: Any, refusal: Any
) -> None:
    """They come in order, then the error; going on from there applies nothing twice."""
    session, got = await client.session("m"), []
    stand_in.results_per_message = 4
    stand_in.apply_next("Forward", 2)
    stand_in.fail_next("Forward", refusal(grpc.StatusCode.INVALID_ARGUMENT, "NON_FINITE"))
    stream = session.stream(CHUNKS)
    got += [float((await anext(stream))[0, -1, 0]) for _ in range(2)]
    with pytest.raises(timernn.NonFinite, match="chunk 3"):
        await anext(stream)
    stand_in.results_per_message = 1
    got += [float(hs[0, -1, 0]) async for hs in session.stream(CHUNKS[2:])]
    assert got == ENDS
    assert stand_in.steps_of(session.session_id) == list(range(1, 8))


async def test_a_refused_second_stream_does_not_free_the_session(
    client: timernn.aio.Client, stand_in: Any
) -> None:
    """Of two consumers of one session the second is refused, as often as it tries."""
    session = await client.session("m")
    unused, stream = session.stream(CHUNKS), session.stream(CHUNKS)
    got = [float((await anext(stream))[0, -1, 0])]
    for _ in range(2):
        with pytest.raises(timernn.SessionBusy):
            await anext(session.stream(CHUNKS))
        with pytest.raises(timernn.SessionBusy):
            await session.forward(XS)
    del unused
    got += [float(hs[0, -1, 0]) async for hs in stream]
    assert got == ENDS
    assert stand_in.steps_of(session.session_id) == list(range(1, 8))


async def test_a_stream_whose_consumer_is_cancelled_goes_on_with_the_same_data(
    client: timernn.aio.Client, stand_in: Any
) -> None:
    """What was sent and whose output nobody got is in doubt; the same chunks are these."""
    session, got = await client.session("m"), []
    stand_in.results_per_message = 2
    stream = session.stream(CHUNKS[:3], in_flight=4)
    got += [float((await anext(stream))[0, -1, 0]), float((await anext(stream))[0, -1, 0])]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):  # no answer comes: it waits for company
            await anext(stream)
    assert session.in_doubt
    stand_in.results_per_message = 1
    got += [float(hs[0, -1, 0]) async for hs in session.stream(CHUNKS[2:])]
    assert got == ENDS
    assert stand_in.steps_of(session.session_id) == list(range(1, 8))


async def test_a_chunk_has_its_whole_patience_after_a_pause_of_the_source(
    client: timernn.aio.Client, stand_in: Any, refusal: Any
) -> None:
    """However long the source pauses, a stream that broke meanwhile is opened again."""
    caller, ahead_s = client._core.context.caller, 0.0
    caller.clock = lambda: time.monotonic() + ahead_s

    async def source() -> AsyncIterator[Any]:
        nonlocal ahead_s
        for chunk in CHUNKS[:2]:
            yield chunk
        ahead_s = 1000
        stand_in.fail_next("Forward", refusal(grpc.StatusCode.UNAVAILABLE, "BREAK"))
        for chunk in CHUNKS[2:]:
            yield chunk

    session = await client.session("m")
    assert [float(hs[0, -1, 0]) async for hs in session.stream(source())] == ENDS


async def test_frames(client: timernn.aio.Client) -> None:
    """Many sessions in one message."""
    sessions = [await client.session("m") for _ in range(3)]
    for k in (1, 2):
        outputs = await client.frame([(session, XS) for session in sessions])
        assert [hs[0, -1, 0] for hs in outputs if not isinstance(hs, timernn.Error)] == [4 * k] * 3


async def test_training(client: timernn.aio.Client) -> None:
    """Forward, backward, update, and a step over several sessions."""
    sessions = [await client.session("m", train=True) for _ in range(2)]
    for session in sessions:
        await session.backward(await session.forward(XS))
    version = await sessions[0].update()
    result = await client.update("m", sessions=sessions)
    assert (version.number, result.version.number, result.contribution_count) == (2, 3, 1)


@pytest.mark.parametrize("turns", range(2, 12, 2))
async def test_a_stream_that_begins_as_its_client_is_closed_ends(stand_in: Any, turns: int) -> None:
    """A write of gRPC waits for its call to be on its way, also when it never will be."""

    async def stream(session: timernn.aio.Session) -> None:
        async for _ in session.stream([XS]):
            pass

    async with timernn.aio.connect(stand_in.address, timeout=5) as client:
        streaming = asyncio.create_task(stream(await client.session("m")))
        for _ in range(turns):
            await asyncio.sleep(0)
    done, _ = await asyncio.wait([streaming], timeout=5)
    assert done


async def test_a_program_started_again_takes_what_waits(
    replicas: list[str], model_id: str, rng: np.random.Generator
) -> None:
    """The asyncio frontend lists what an earlier client left, finishes its tape and takes all in one step."""
    chunks = [rng.normal(size=(1, 3, 3)) for _ in range(2)]
    async with timernn.aio.connect(replicas) as killed:
        await killed.create_model(model_id, input_size=3, hidden_size=2)
        session = await killed.session(model_id, model_id, train=True)
        await session.backward(await session.forward(chunks[0]))
        hs = await session.forward(chunks[1])
    async with timernn.aio.connect(replicas) as client:
        await client.create_model(model_id, input_size=3, hidden_size=2, exist_ok=True)
        again = await client.session(model_id, model_id, train=True, must_exist=True)
        assert again.resumed
        assert [one.kind for one in await again.waiting] == ["contribution", "tape"]
        np.testing.assert_array_equal(await again.forward(chunks[1], chunk_seq=2), hs)
        await again.backward(hs)
        assert (await again.update(take_waiting=True)).number == 2
        assert await again.waiting == []


async def test_a_session_whose_opening_nobody_awaited_says_so(
    client: timernn.aio.Client, stand_in: Any, refusal: Any
) -> None:
    """Each use of it does, and so does awaiting an opening again that has failed."""
    session = client.session("m")
    assert repr(session) == "<Session that is not open>"
    uses: list[Callable[[], Any]] = [
        lambda: session.forward(XS),
        session.update,
        session.fork,
        lambda: client.frame([(session, XS)]),
        lambda: client.update("m", sessions=[session]),
    ]
    for use in uses:
        with pytest.raises(timernn.SessionNotOpen, match=r"await client\.session"):
            await use()
    with pytest.raises(timernn.SessionNotOpen):
        session.stream([XS])
    stand_in.fail_next("OpenSession", refusal(grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"))
    failing = client.session("m")
    with pytest.raises(timernn.SessionNotFound):
        await failing
    with pytest.raises(timernn.SessionNotOpen):
        await failing
