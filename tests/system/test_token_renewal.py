"""A client whose token is revoked or expires: it asks for another and goes on, or says so."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from secured import Secured, secured_process, write_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

XS = np.ones((1, 2, 3), np.float32)
_NUMBERS = itertools.count()


@dataclass
class Successor:
    """A callable that gives one token at first, and another whenever it is asked again.

    Attributes:
        asked: How often it was asked.
    """

    first: str
    then: str
    asked: int = 0

    def __call__(self) -> str:
        """Give a token."""
        self.asked += 1
        return self.first if self.asked == 1 else self.then

    async def later(self) -> str:
        """Do the same for asyncio."""
        return self()


@pytest.fixture(scope="module")
def secured(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Run a server with TLS and tokens."""
    folder = tmp_path_factory.mktemp("secured")
    authority, token = write_files(folder)
    with secured_process(store_url, folder) as process:
        yield Secured(process, folder, authority, token)


@pytest.fixture
def model_id(secured: Secured) -> str:
    """A model of the test's own."""
    name = f"m{next(_NUMBERS)}-{secured.process.port}"
    with secured.connect(secured.known) as client:
        client.create_model(name, input_size=3, hidden_size=2)
    return name


def test_without_a_token_and_with_a_wrong_one_the_call_is_refused_at_once(
    secured: Secured,
) -> None:
    """By two classes; what is no callable cannot get better."""
    for token, kind in (
        (None, timernn.NoCredentials),
        (f"timernn_{'0' * 12}_{'x' * 43}", timernn.BadCredentials),
    ):
        with secured.connect(token) as client, pytest.raises(kind) as caught:
            client.server_info()
        assert caught.value.attempts == 1
        assert not token or token not in f"{caught.value}{caught.value.cause}"


def test_who_is_refused_with_the_new_token_too_gets_that_error(secured: Secured) -> None:
    """The callable is asked once more a call, and not for ever."""
    asked = []

    def token() -> str:
        asked.append(1)
        return f"timernn_{'0' * 12}_{'x' * 43}"

    with secured.connect(token) as client:
        with pytest.raises(timernn.BadCredentials) as caught:
            client.server_info()
        assert (caught.value.attempts, len(asked)) == (2, 2)


def test_every_kind_of_call_goes_on_with_a_new_token(secured: Secured, model_id: str) -> None:
    """Single calls, downloads, streams and frames: none notices, each asks once."""
    calls: dict[str, Callable[[timernn.Client, timernn.Session], Any]] = {
        "download": lambda client, _: client.get_weights(model_id),
        "forward": lambda _, session: session.forward(XS),
        "stream": lambda _, session: list(session.stream([XS, XS])),
        "frame": lambda client, session: client.frame([(session, XS)])[0],
        "new state": lambda _, session: session.reset_state(),
    }
    name, token = secured.issue()
    tokens = {kind: Successor(token, secured.known) for kind in calls}
    with ExitStack() as stack:
        clients = {kind: stack.enter_context(secured.connect(tokens[kind])) for kind in calls}
        sessions = {kind: client.session(model_id) for kind, client in clients.items()}
        clients["frame"].frame([(sessions["frame"], XS)])  # its stream stays open
        secured.revoke(name, token)
        for kind, call in calls.items():
            outcome = call(clients[kind], sessions[kind])
            assert not isinstance(outcome, timernn.Error), kind
        assert {kind: each.asked for kind, each in tokens.items()} == dict.fromkeys(calls, 2)
        chunks = {kind: session.chunk_seq for kind, session in sessions.items()}
        assert chunks == {"download": 0, "forward": 1, "stream": 2, "frame": 2, "new state": 0}


async def test_every_kind_of_call_of_asyncio_goes_on_with_a_new_token(
    secured: Secured, model_id: str
) -> None:
    """The same, with a callable that is awaited; calls that run at once ask once together."""
    name, token = secured.issue()
    tokens = Successor(token, secured.known)
    async with timernn.aio.connect(
        secured.process.address, tls=secured.tls, token=tokens.later
    ) as client:
        sessions = [await client.session(model_id) for _ in range(4)]
        one, framed, streamed, other = sessions
        await client.frame([(framed, XS)])

        async def stream() -> int:
            return len([hs async for hs in streamed.stream([XS, XS])])

        await asyncio.to_thread(secured.revoke, name, token)
        _, frame, count, _ = await asyncio.gather(
            one.forward(XS), client.frame([(framed, XS)]), stream(), other.forward(XS)
        )
        assert isinstance(frame[0], np.ndarray)
        assert count == 2
        assert [session.chunk_seq for session in sessions] == [1, 2, 2, 1]
        assert tokens.asked == 2


def test_a_stream_goes_on_unnoticed(secured: Secured, model_id: str) -> None:
    """Chunks before and after the revocation count once, in order, as on an undisturbed stream."""
    name, token = secured.issue()
    tokens = Successor(token, secured.known)
    rng = np.random.default_rng(7)
    chunks = [rng.normal(size=(1, 2, 3)).astype(np.float32) for _ in range(6)]

    def source() -> Iterator[timernn.types.Array]:
        for number, chunk in enumerate(chunks):
            if number == 3:
                secured.revoke(name, token)
            yield chunk

    with secured.connect(tokens) as client:
        with client.session(model_id) as session:
            disturbed = list(session.stream(source(), in_flight=2))
            assert (session.chunk_seq, tokens.asked) == (len(chunks), 2)
        expected = list(client.session(model_id).stream(chunks))
    np.testing.assert_allclose(np.stack(disturbed), np.stack(expected), rtol=1e-6)


def test_a_stream_with_a_token_alone_says_that_it_was_revoked(
    secured: Secured, model_id: str
) -> None:
    """What was answered before stays applied, and nothing is in doubt."""
    name, token = secured.issue()
    with secured.connect(token) as client, client.session(model_id) as session:
        stream = session.stream(iter([XS, XS]), in_flight=1)
        next(stream)
        secured.revoke(name, token)
        with pytest.raises(timernn.BadCredentials):
            next(stream)
        assert (session.chunk_seq, session.in_doubt) == (1, False)
