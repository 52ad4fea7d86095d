"""The log of a server as a process: its lines as JSON, and who did what in the audit log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from instruments.processes import ServiceProcess, wait_until
from service.security.roles import Role
from service.security.tokens import create_token
from timernn.v1 import model_service_pb2 as models
from timernn.v1 import session_service_pb2 as sessions
from timernn.v1 import time_rnn_service_pb2 as rnn
from timernn.v1.model_service_pb2_grpc import ModelServiceStub
from timernn.v1.session_service_pb2_grpc import SessionServiceStub
from timernn.v1.time_rnn_service_pb2_grpc import TimeRnnServiceStub

if TYPE_CHECKING:
    from pathlib import Path

FORGED = (
    'm\n2026-01-01 00:00:00,000 INFO pid 1 service.audit: operation outcome="OK"\x1b[2J\x9b\u2028'
)
SPEC = models.ModelSpec(model_id="weather", input_size=2, hidden_size=3)


class Caller:
    """Stubs with a token."""

    def __init__(self, address: str, token: str) -> None:
        """Open a channel."""
        channel = grpc.insecure_channel(address)
        self.channel = channel
        self.models: Any = ModelServiceStub(channel)
        self.sessions: Any = SessionServiceStub(channel)
        self.rnn: Any = TimeRnnServiceStub(channel)
        self.metadata = [("authorization", f"Bearer {token}")]

    def call(self, method: Any, request: Any) -> str:
        """Call a method; return the name of its status."""
        try:
            method(request, metadata=self.metadata, timeout=30)
        except grpc.RpcError as error:
            failed: Any = error
            return str(failed.code().name)
        return "OK"


def lines_of(process: ServiceProcess) -> list[dict[str, Any]]:
    """Return the log's lines, each of which has to be an object; the ready line is none of them."""
    return [
        json.loads(line)
        for line in process.log.splitlines()
        if not line.startswith("timernn ready")
    ]


def audited(process: ServiceProcess) -> list[dict[str, Any]]:
    """Return the lines of the audit log."""
    return [line for line in lines_of(process) if line["logger"] == "service.audit"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_every_line_is_one_event(store_url: str, tmp_path: Path, form: str) -> None:
    """Line breaks and terminal codes in names are escaped, in the log for people too."""
    tokens = tmp_path / "tokens.toml"
    token, _ = create_token(tokens, Role.ADMIN, "acme", name="deploy", expires=None)
    with ServiceProcess(store_url, "--tokens", str(tokens), "--log-format", form) as process:
        caller = Caller(process.address, token)
        asked = sessions.CloseSessionRequest(session_id=FORGED)
        assert caller.call(caller.sessions.CloseSession, asked) == "INVALID_ARGUMENT"
        caller.channel.close()
        wait_until("the line", lambda: "close_session" in process.log)
        shown = process.log
    found = [line for line in shown.split("\n") if "close_session" in line]
    assert len(found) == 1
    assert "\\n2026-01-01" in found[0]
    assert all(line.isprintable() for line in shown.split("\n"))
    assert not [line for line in shown.split("\n") if line.startswith("2026-01-01 00:00:00,000")]
    assert token not in shown


def test_the_audit_log_says_who_did_what_to_which(store_url: str, tmp_path: Path) -> None:
    """A line an operation that changes something, none a chunk, with the token's name and never the token."""
    tokens = tmp_path / "tokens.toml"
    token, _ = create_token(tokens, Role.ADMIN, "acme", name="deploy", expires=None)
    reader, _ = create_token(tokens, Role.INFER, "acme", name="reader", expires=None)
    with ServiceProcess(store_url, "--tokens", str(tokens), "--log-format", "json") as process:
        caller, other = Caller(process.address, token), Caller(process.address, reader)
        made = models.CreateModelRequest(spec=SPEC, request_id="r-1")
        assert caller.call(caller.models.CreateModel, made) == "OK"
        assert caller.call(caller.models.CreateModel, models.CreateModelRequest(spec=SPEC)) != "OK"
        opened = sessions.OpenSessionRequest(model_id="weather", session_id="a")
        assert caller.call(caller.sessions.OpenSession, opened) == "OK"
        assert caller.call(caller.rnn.Forward, rnn.ForwardRequest(session_id="a")) != "OK"
        gone = models.DeleteModelRequest(model_id="weather")
        assert other.call(other.models.DeleteModel, gone) == "PERMISSION_DENIED"
        assert caller.call(caller.models.DeleteModel, gone) == "OK"
        stranger = Caller(process.address, token[:-3] + "abc")
        assert stranger.call(stranger.models.DeleteModel, gone) == "UNAUTHENTICATED"
        for each in (caller, other, stranger):
            each.channel.close()
        wait_until("the lines", lambda: "login" in process.log)
        found, shown = audited(process), process.log
    short = [
        tuple(line.get(key) for key in ("operation", "outcome", "token", "tenant", "model_id"))
        for line in found
    ]
    assert short == [
        ("create_model", "OK", "deploy", "acme", "weather"),
        ("create_model", "MODEL_EXISTS", "deploy", "acme", "weather"),
        ("open_session", "OK", "deploy", "acme", "weather"),
        ("delete_model", "ROLE", "reader", "acme", None),
        ("delete_model", "OK", "deploy", "acme", "weather"),
        (None, "refused", None, None, None),
    ]
    assert (found[0]["request_id"], found[2]["session_id"]) == ("r-1", "a")
    assert all(
        {"time", "level", "logger", "message", "worker", "pid"} <= set(line) for line in found
    )
    assert token not in shown
    assert reader not in shown
