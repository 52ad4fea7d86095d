"""Client commands against a server with TLS and tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from typer.main import get_command

from service.cli import main
from service.cli.app import app
from service.cli.remote import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Secured:
    """A running server, and what a client needs.

    Attributes:
        address: Where it listens.
        ca: Its authority.
        token: A file with what `timernn tokens create` printed.
    """

    address: str
    ca: Path
    token: Path

    @property
    def tls(self) -> tuple[str, str]:
        """The option by which its certificate is believed."""
        return ("--tls-ca", str(self.ca))


@pytest.fixture(scope="module")
def secured(
    serving: Callable[..., Any], bare: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    """Run a server with TLS and tokens."""
    folder = tmp_path_factory.mktemp("secured")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    issued.private_key_pem.write_to_path(folder / "tls.key")
    (folder / "tls.key").chmod(0o600)
    tokens = folder / "tokens.toml"
    made = bare("tokens", "create", "--file", str(tokens), "--role=admin", "--tenant=acme")
    (folder / "token").write_text(made.out)
    made = bare("tokens", "create", "--file", str(tokens), "--role=operator", "--tenant=ops")
    (folder / "operator").write_text(made.out)
    files = ("--tls-cert", folder / "tls.crt", "--tls-key", folder / "tls.key", "--tokens", tokens)
    with serving(folder, *map(str, files)) as server:
        yield Secured(server.address, folder / "ca.pem", folder / "token")


@pytest.fixture
def command(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> Callable[..., tuple[int, str, str]]:
    """Run a command against the server within the test; returns code, stdout, stderr."""
    monkeypatch.setenv("TIMERNN_SERVER", secured.address)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("words", [("doctor",), ("models", "list")], ids=" ".join)
def test_grpc_writes_nothing_beside_what_a_command_says(
    bare: Callable[..., Any], secured: Secured, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Of a handshake that fails, its core would write several lines to stderr for each try."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "another.pem")
    place = ("--server", secured.address, "--tls-ca", str(tmp_path / "another.pem"), "--timeout=1")
    shown = bare(*words, *place)
    assert shown.code == 1
    assert "not signed by an authority" in shown.out + shown.err
    assert len(shown.err.splitlines()) == (0 if words == ("doctor",) else 1)


def test_a_command_has_its_token_from_a_file(command: Any, secured: Secured) -> None:
    """What `timernn tokens create` printed is such a file."""
    file = ("--token-file", str(secured.token))
    code, out, err = command("models", "list", "--json", *secured.tls, *file)
    assert (code, json.loads(out), err) == (0, [], "")


def test_variables_stand_for_the_options(
    bare: Callable[..., Any], secured: Secured, tmp_path: Path
) -> None:
    """Those of a server in the same shell mean nothing to a client."""
    token = secured.token.read_text().split()[-1]
    of_server = {"TIMERNN_TLS_CERT": str(tmp_path / "no"), "TIMERNN_TLS_KEY": str(tmp_path / "no")}
    done = bare(
        "sessions",
        "list",
        "--json",
        TIMERNN_SERVER=secured.address,
        TIMERNN_CLIENT_TLS_CA=str(secured.ca),
        TIMERNN_TOKEN=token,
        **of_server,
    )
    assert (done.code, done.out.strip(), done.err) == (0, "[]", "")


def test_without_a_token_a_command_says_what_is_missing(command: Any, secured: Secured) -> None:
    """In one line."""
    code, out, err = command("models", "list", *secured.tls)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("timernn: NO_CREDENTIALS: ")
    assert "--token-file" in err


def test_whether_a_server_is_ready_needs_no_token(command: Any, secured: Secured) -> None:
    """As a probe asks; what it is, it does not say."""
    code, out, err = command("ping", *secured.tls)
    assert (code, err) == (0, "")
    assert out.startswith(f"{secured.address} is ready; ")
    code, out, err = command("ping", "--json", *secured.tls)
    assert json.loads(out)["serving"] is True


def test_plaintext_to_a_server_with_tls_is_one_line(bare: Any, secured: Secured) -> None:
    """Of the process too: gRPC writes nothing beside it."""
    for options, words in (
        ((), "it may expect TLS"),
        ((), "; --tls or --tls-ca speaks it"),
        (("--tls",), "not signed by an authority that this client trusts; --tls-ca names one"),
    ):
        failed = bare("ping", "--server", secured.address, "--timeout", "9", *options)
        assert (failed.code, failed.out, failed.err.count("\n")) == (1, "", 1)
        assert words in failed.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--token-file", "{token}"), "'--token-file': expected TLS for 10.0.0.7:50051"),
        (("--token-file", "{empty}"), "'--token-file': expected a token, got nothing"),
        (("--tls-cert", "{token}"), "'--tls-key': expected cert and key together"),
        (("--tls-ca", "{token}"), "'--tls-ca': expected a file in PEM"),
    ],
)
def test_options_that_do_not_fit_are_exit_code_2(
    capsys: Capture, secured: Secured, tmp_path: Path, options: tuple[str, str], words: str
) -> None:
    """Nothing is sent, and no secret is shown."""
    (tmp_path / "empty").touch()
    flag, value = options
    file = value.format(token=secured.token, empty=tmp_path / "empty")
    assert main(["models", "list", "--server", "10.0.0.7", flag, file]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert secured.token.read_text().split()[-1] not in err


def test_every_command_that_reaches_a_server_takes_the_same_options() -> None:
    """Only those that run a server, read its metrics, or work on its files, do without."""
    connecting, others = set[str](), set[str]()
    wanted = {f"--{field.name.replace('_', '-')}" for field in fields(Connection)} - {"--tenant"}
    for name, command in commands_of(get_command(app)):
        options = {option for parameter in command.params for option in parameter.opts}
        (connecting if wanted <= options else others).add(name)
        assert wanted <= options or "--server" not in options, name
    assert others == {
        "serve", "tokens create", "tokens list", "tokens revoke", "tenants purge", "top",
    }  # fmt: skip
    assert connecting >= {"ping", "doctor", "backup", "restore", "models list", "sessions list"}


def test_a_command_takes_a_tenant_where_an_operator_may_call_it() -> None:
    """The lists of the table of roles, and what reads the page's figures; nothing that changes something."""
    taking = {
        name
        for name, command in commands_of(get_command(app))
        if any("--tenant" in parameter.opts for parameter in command.params)
    }
    assert taking - {"tokens create"} == {
        "models list", "models show", "checkpoints list", "sessions list", "top",
    }  # fmt: skip


def test_an_operator_sees_the_tenant_that_it_names(command: Any, secured: Secured) -> None:
    """Its own without the option, which has nothing."""
    admin = (*secured.tls, "--token-file", str(secured.token))
    sizes = ("--input-size=2", "--hidden-size=2")
    assert command("models", "create", "seen", *sizes, *admin)[0] == 0
    assert command("checkpoints", "create", "seen", "kept", *admin)[0] == 0
    operator = (*secured.tls, "--token-file", str(secured.token.with_name("operator")))
    assert json.loads(command("models", "list", "--json", *operator)[1]) == []
    named = ("--tenant", "acme", "--json", *operator)
    assert [each["model_id"] for each in json.loads(command("models", "list", *named)[1])] == [
        "seen"
    ]
    assert json.loads(command("models", "show", "seen", *named)[1])["model_id"] == "seen"
    (kept,) = json.loads(command("checkpoints", "list", "seen", *named)[1])
    assert kept["checkpoint_id"] == "kept"
    assert command("sessions", "list", *named)[:2] == (0, "[]\n")
    assert command("models", "delete", "seen", *admin)[0] == 0


def test_what_is_no_tenant_is_one_line(command: Any, secured: Secured) -> None:
    """Refused by the server, or where gRPC cannot send it by the command."""
    operator = (*secured.tls, "--token-file", str(secured.token.with_name("operator")))
    for name, words in (("a b", "expected a tenant's name, got 'a b'"), ("é", "'--tenant': ")):
        code, out, err = command("models", "list", "--tenant", name, *operator)
        assert (code in (1, 2), out, err.count("\n")) == (True, "", 1)
        assert words in err


def commands_of(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Go through the commands below one, with their names."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for own, child in children.items():
        yield from commands_of(child, f"{name} {own}".strip())
