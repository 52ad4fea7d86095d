"""What `connect` takes for an address."""

from __future__ import annotations

import pytest

import timernn
from timernn._core.channels import channel_options
from timernn._core.targets import Target, addresses_of, require_proxy


@pytest.mark.parametrize(
    ("given", "reached"),
    [
        ("localhost", "localhost:50051"),
        ("localhost:7", "localhost:7"),
        ("10.0.0.7", "10.0.0.7:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:7", "[::1]:7"),
        ("dns:timernn", "dns:timernn:50051"),
        ("dns:///timernn", "dns:///timernn:50051"),
        ("dns://8.8.8.8/timernn:7", "dns://8.8.8.8/timernn:7"),
        ("ipv4:10.0.0.7,10.0.0.8:7", "ipv4:10.0.0.7:50051,10.0.0.8:7"),
        ("ipv6:[::1],::2", "ipv6:[::1]:50051,[::2]:50051"),
        ("unix:/run/timernn.sock", "unix:/run/timernn.sock"),
        ("unix:///run/timernn.sock", "unix:///run/timernn.sock"),
    ],
)
def test_a_host_without_a_port_gets_the_servers(given: str, reached: str) -> None:
    """In every kind of target, and reading it again changes nothing."""
    assert addresses_of([given, given]) == [reached, reached]
    assert addresses_of(reached) == [reached]


@pytest.mark.parametrize(
    "target", ["", "localhost:", ":7", "a:99999", "a:0", "a b", "a:1,b:2", "http://a:1", "[a]:1"]
)
def test_what_is_no_target_is_refused(target: str) -> None:
    """An invalid target is refused before any call is made, as it was written."""
    with pytest.raises(timernn.BadField, match="target: ") as caught:
        timernn.connect(target)
    assert caught.value.message.endswith(f", got {target!r}")


@pytest.mark.parametrize(
    ("target", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.5:7", True),
        ("[::1]:7", True),
        ("[::ffff:127.0.0.1]:7", True),
        ("dns:///localhost", True),
        ("ipv4:127.0.0.1,127.0.0.2", True),
        ("unix:/run/timernn.sock", True),
        ("ipv4:127.0.0.1,10.0.0.7", False),
        ("10.0.0.7", False),
        ("dns:///timernn", False),
        ("localhost.example.org", False),
    ],
)
def test_a_proxy_is_never_used_for_this_machine(target: str, is_local: bool) -> None:  # noqa: FBT001
    """Elsewhere it is the one that was chosen."""
    options = channel_options(1, Target.parse(target), "http://proxy:3128")
    chosen = ("grpc.enable_http_proxy", 0) if is_local else ("grpc.http_proxy", "http://proxy:3128")
    assert chosen in options


def test_the_environments_proxy_is_used_where_it_was_chosen_alone() -> None:
    """Without a choice the connection is direct."""
    target = Target.parse("timernn")
    assert ("grpc.enable_http_proxy", 0) in channel_options(1, target)
    assert "proxy" not in str(channel_options(1, target, "environment"))


@pytest.mark.parametrize("proxy", ["proxy:3128", "http://proxy", "https://u:secret@proxy:1"])
def test_what_is_no_proxy_is_refused(proxy: str) -> None:
    """Without showing it: it may hold a password."""
    with pytest.raises(timernn.BadField, match="proxy: expected http") as refused:
        require_proxy(proxy)
    assert proxy not in str(refused.value)
