"""Tokens and metadata on the client's side: what is refused before anything is sent, what is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import timernn
from timernn._core.credentials import Credentials
from timernn._core.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "s3cr3t"  # noqa: S105  # a stand-in for one
CONNECTS = (timernn.connect, timernn.aio.connect)
OPEN = (
    "10.0.0.7",
    "dns:///timernn",
    "localhost.example.org",
    "cache.localhost",
    "dns://8.8.8.8/localhost",
    "ipv4:127.0.0.1,10.0.0.7",
    "vsock:2:1",
)


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize("target", [*OPEN, ["localhost", "10.0.0.7"]])
def test_a_token_is_not_sent_where_others_can_read_it(
    connect: Callable[..., Any], target: str | list[str]
) -> None:
    """Refused at the door, unless there is TLS or it was asked for."""
    for token in (SECRET, lambda: SECRET):
        with pytest.raises(timernn.BadField, match="token: expected TLS for ") as caught:
            connect(target, token=token)
        assert SECRET not in str(caught.value)
        connect(target, token=token, tls=True)
        connect(target, token=token, token_over_plaintext=True)


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize(
    "target",
    [
        "localhost",
        "127.0.0.5:7",
        "::1",
        "0.0.0.0",  # noqa: S104  # of a client: this machine
        "ipv4:127.0.0.1",
        "unix:/run/x",
        "unix-abstract:x",
    ],
)
def test_a_token_may_stay_on_this_machine(connect: Callable[..., Any], target: str) -> None:
    """Loopback addresses and Unix sockets need no TLS."""
    connect(target, token=SECRET)


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize("token", ["", "two words", "line\n", "sécret", b"s3cr3t"])
def test_what_is_no_token_is_not_shown(connect: Callable[..., Any], token: Any) -> None:
    """It may be one all the same."""
    with pytest.raises(timernn.BadField) as caught:
        connect("localhost", token=token)
    assert caught.value.message.startswith("token: expected visible ASCII characters or a callable")
    assert not token or str(token) not in caught.value.message


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ([("a", "b")], "a mapping"),
        ({"Upper": "x"}, "lower-case"),
        ({7: "x"}, "lower-case"),
        ({"grpc-x": "x"}, "none of gRPC's own"),
        ({"authorization": SECRET}, "the token as `token`"),
        ({"a": f"{SECRET}\n"}, "ASCII characters for 'a'"),
        ({"a": SECRET.encode()}, "ASCII characters for 'a'"),
        ({"a-bin": SECRET}, "bytes for a key that ends with '-bin'"),
    ],
)
def test_metadata_that_cannot_be_sent_is_refused(
    connect: Callable[..., Any], metadata: Any, words: str
) -> None:
    """By its key; its values may be secrets."""
    with pytest.raises(timernn.BadField, match="metadata: expected") as caught:
        connect("localhost", metadata=metadata)
    assert words in caught.value.message
    assert SECRET not in caught.value.message


def test_options_show_no_secret() -> None:
    """Nor does a client."""
    options = Options(token=SECRET, metadata={"x-key": SECRET}, proxy=f"http://a:{SECRET}@b:1")
    assert SECRET not in repr(options)
    with timernn.connect("localhost", token=SECRET) as client:
        assert SECRET not in repr(client)


def test_a_refusal_of_an_earlier_token_asks_for_no_other() -> None:
    """Of many calls that carried one, the first asks; the others go on with its successor."""
    credentials = Credentials(lambda: "unused")
    due = [credentials.is_due]
    for token in ("one", "two"):
        credentials.take(token)
        credentials.refuse(1)
        due.append(credentials.is_due)
    assert due == [True, True, False]
    assert credentials.metadata == (("authorization", "Bearer two"),)


@pytest.mark.parametrize("given", [None, "", "two words", 7])
def test_a_callable_that_returns_no_token_is_an_error_of_its_own(stand_in: Any, given: Any) -> None:
    """Nothing is sent without one."""
    with (
        timernn.connect(stand_in.address, token=lambda: given) as client,
        pytest.raises(timernn.NoCredentials, match="expected the callable to return visible ASCII"),
    ):
        client.get_model("m")
    assert not stand_in.requests


async def test_a_callable_that_raises_is_an_error_of_its_own(stand_in: Any) -> None:
    """What it raised is the cause; its text is not repeated. With asyncio it may be awaited."""

    def fail() -> str:
        raise RuntimeError(SECRET)

    async def fail_later() -> str:
        raise RuntimeError(SECRET)

    def check(error: timernn.Error) -> None:
        assert SECRET not in str(error)
        assert isinstance(error.cause, RuntimeError)

    with (
        timernn.connect(stand_in.address, token=fail) as client,
        pytest.raises(timernn.NoCredentials) as caught,
    ):
        client.get_model("m")
    check(caught.value)
    for token in (fail, fail_later):
        async with timernn.aio.connect(stand_in.address, token=token) as other:
            with pytest.raises(timernn.NoCredentials) as caught:
                await other.get_model("m")
            check(caught.value)
