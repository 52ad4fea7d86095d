"""Which operations are audited, and what an audit line holds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from service.logs import FIELDS
from service.rpc.audit import UNAUDITED, operation_ended, refused_login
from service.rpc.auth import Principal
from service.rpc.permissions import PUBLIC, ROLES, kind_of
from timernn.v1 import model_service_pb2 as models
from timernn.v1 import time_rnn_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Serve = Callable[..., Awaitable[Any]]

AUDITED = {
    "close_session", "create_checkpoint", "create_model", "delete_checkpoint", "delete_model",
    "discard_gradients", "fork_session", "get_weights", "import_model", "open_session", "put_weights",
    "reset_state", "restore_checkpoint", "set_state", "update",
}  # fmt: skip


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the named values of the audit lines."""
    return [getattr(each, FIELDS) for each in caplog.records if each.name == "service.audit"]


def test_what_changes_something_is_audited() -> None:
    """The list is of exceptions, so that a new method is audited until somebody decides otherwise."""
    kinds = {kind_of(method) for method in {*ROLES, *PUBLIC}}
    assert kinds - UNAUDITED == AUDITED
    assert kinds >= UNAUDITED


@pytest.mark.parametrize(
    ("peer", "shown"),
    [
        ("ipv6:%5B::1%5D:4711", "[::1]:4711"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "[fe80::1%eth0]:4711"),
        ("ipv4:10.0.0.9:4711", "10.0.0.9:4711"),
        ("[::1]:4711", "[::1]:4711"),  # of the page
        ("unix:/run/timernn.sock", "unix:/run/timernn.sock"),
        ("unix:", "unix:"),
    ],
)
def test_a_peer_is_shown_as_people_write_it(
    caplog: pytest.LogCaptureFixture, peer: str, shown: str
) -> None:
    """Not as gRPC writes it, with a scheme and percent signs."""
    with caplog.at_level(logging.INFO, "service.audit"):
        refused_login("missing", peer=peer)
    assert fields(caplog) == [{"outcome": "missing", "peer": shown}]


def test_an_upload_is_named_by_its_header(caplog: pytest.LogCaptureFixture) -> None:
    """The names of an upload stand in its first message, the version that it made in the answer."""
    header = models.PutWeightsHeader(model_id="m", request_id="r")
    answer = models.PutWeightsResponse()
    answer.version.number = 7
    with caplog.at_level(logging.INFO, "service.audit"):
        operation_ended(
            "put_weights",
            principal=Principal("acme", name="n"),
            peer="ipv4:1.2.3.4:5",
            outcome="OK",
            request=models.PutWeightsRequest(header=header),
            answer=answer,
        )
    assert fields(caplog) == [
        {
            "operation": "put_weights",
            "outcome": "OK",
            "token": "n",
            "tenant": "acme",
            "peer": "1.2.3.4:5",
            "model_id": "m",
            "request_id": "r",
            "version": 7,
        }
    ]


async def test_a_streamed_update_is_audited_and_a_chunk_is_not(
    serve: Serve, caplog: pytest.LogCaptureFixture, tensor: Callable[..., Any]
) -> None:
    """An operation on a stream is what it stands for."""
    with caplog.at_level(logging.INFO, "service.audit"):
        served = await serve()
        chunk = pb.ForwardRequest(session_id="a", epoch=1, chunk_seq=1, xs=tensor(1, 1, 1))
        update = pb.UpdateRequest(model_id="m", request_id="r")
        stream = served.rnn.Stream()
        await stream.write(
            pb.StreamRequest(
                operations=[pb.Operation(tag=1, forward=chunk), pb.Operation(tag=2, update=update)]
            )
        )
        await stream.done_writing()
        async for _ in stream:
            pass
    (line,) = fields(caplog)
    assert (line["operation"], line["outcome"], line["model_id"]) == ("update", "OK", "m")
