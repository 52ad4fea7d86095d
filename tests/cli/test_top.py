"""`timernn top` against a real metrics port: what it prints, whom it shows it, one line on errors."""

from __future__ import annotations

import json
import ssl
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import trustme

import timernn
from instruments.processes import ServiceProcess, free_port, wait_until
from service.cli.remote import TLS_ADVICE
from service.security.roles import Role
from service.security.tokens import create_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Watched:
    """A server with tokens: its metrics port, and a file with a token of each role."""

    metrics: str
    folder: Path

    def option(self, role: str) -> tuple[str, ...]:
        """The options by which the command reaches it."""
        return ("--metrics", self.metrics, "--token-file", str(self.folder / role))


@pytest.fixture(scope="module")
def watched(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Run a server with a model and a session."""
    folder = tmp_path_factory.mktemp("top")
    for role in (Role.ADMIN, Role.INFER):
        made, _ = create_token(folder / "tokens.toml", role, "top", name=role.value, expires=None)
        (folder / role.value).write_text(f"{made}\n")
    options = ("--tokens", str(folder / "tokens.toml"), "--metrics-listen", "127.0.0.1:0")
    with ServiceProcess(store_url, *options) as process:
        url = urlsplit(process.wait_for_line(r".*metrics on (http://\S+)")[1])
        token = (folder / "admin").read_text().strip()
        with timernn.connect(process.address, token=token) as client:
            client.create_model("m", input_size=3, hidden_size=4)
            client.session("m", session_id="top-session").forward(np.ones((1, 2, 3), np.float32))
            yield Watched(url.netloc, folder)


def test_it_prints_once_without_a_terminal(bare: Callable[..., Any], watched: Watched) -> None:
    """Replicas, durations, models, sessions, aligned and without colours."""
    wait_until("the replica", lambda: "serving" in bare("top", *watched.option("admin")).out)
    ran = bare("top", *watched.option("admin"))
    assert ran.code == 0
    for text in ("tenant top", "sessions 1", "refusals ", "Forward", "SESSION", "top-session"):
        assert text in ran.out
    assert "\x1b" not in ran.out


def test_the_json_is_that_of_the_page(bare: Callable[..., Any], watched: Watched) -> None:
    """Under a name for each path; another model's sessions are left out on demand."""
    found = json.loads(bare("top", "--json", *watched.option("infer")).out)
    assert list(found) == ["now", "models", "sessions"]
    assert found["now"]["tenant"] == "top"
    assert [one["session_id"] for one in found["sessions"]["sessions"]] == ["top-session"]
    ran = bare("top", "--json", "--model", "another", *watched.option("infer"))
    assert json.loads(ran.out)["sessions"]["sessions"] == []


def test_other_roles_see_their_tenant_alone(bare: Callable[..., Any], watched: Watched) -> None:
    """And read why there is no more."""
    ran = bare("top", "--once", *watched.option("infer"))
    assert "top-session" in ran.out
    assert "roles admin and operator" in ran.out
    assert "REPLICA" not in ran.out


def test_a_missing_token_is_said_in_a_line(bare: Callable[..., Any], watched: Watched) -> None:
    """With what to do."""
    ran = bare("top", "--metrics", watched.metrics)
    assert ran.code == 1
    assert "a token is needed: --token-file, or the variable TIMERNN_TOKEN" in ran.err
    assert ran.err.count("\n") == 1


def test_a_wrong_token_is_said_in_a_line(
    bare: Callable[..., Any], watched: Watched, tmp_path: Path
) -> None:
    """Without the token."""
    (tmp_path / "token").write_text("wr0ng")
    ran = bare("top", "--metrics", watched.metrics, "--token-file", str(tmp_path / "token"))
    assert ran.code == 1
    assert "not valid" in ran.err
    assert "wr0ng" not in ran.err
    assert ran.err.count("\n") == 1


def test_nobody_who_listens_is_said_in_a_line(bare: Callable[..., Any]) -> None:
    """With the server's option."""
    ran = bare("top", "--metrics", f"127.0.0.1:{free_port()}")
    assert ran.code == 1
    assert "Connection refused; the server needs --metrics-listen" in ran.err
    assert ran.err.count("\n") == 1


def test_plaintext_that_was_taken_for_tls_is_said(
    bare: Callable[..., Any], watched: Watched
) -> None:
    """In a line as well."""
    ran = bare("top", "--tls", "--metrics", watched.metrics)
    assert ran.code == 1
    assert ran.err == f"timernn: {watched.metrics}: it speaks no TLS{TLS_ADVICE['tls']}\n"


def test_a_token_is_not_sent_in_plaintext_to_another_machine(
    bare: Callable[..., Any], watched: Watched
) -> None:
    """Unless it was asked for."""
    token = ("--token-file", str(watched.folder / "infer"))
    ran = bare("top", "--metrics", "192.0.2.1:9464", *token)
    assert ran.code == 2
    assert "in plaintext" in ran.err


class _Elsewhere(BaseHTTPRequestHandler):
    """A web server that is none of ours."""

    def do_GET(self) -> None:
        """Answer with a page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, *_args: object) -> None:
        """Write nothing."""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """Serve pages over TLS with a certificate whose authority is in ca.pem."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = HTTPServer(("127.0.0.1", 0), _Elsewhere)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_another_web_server_is_not_taken_for_one(
    bare: Callable[..., Any], elsewhere: str, tmp_path: Path
) -> None:
    """Over TLS that is believed."""
    ran = bare("top", "--metrics", elsewhere, "--tls-ca", str(tmp_path / "ca.pem"))
    assert ran.code == 1
    assert "is no metrics port of timernn" in ran.err


def test_a_certificate_that_is_not_believed_is_said(
    bare: Callable[..., Any], elsewhere: str
) -> None:
    """In plain words, on one line."""
    ran = bare("top", "--metrics", elsewhere, "--tls")
    assert ran.code == 1
    why = "its certificate is not signed by an authority that is trusted here"
    assert ran.err == f"timernn: {elsewhere}: {why}; --tls-ca names one\n"
