"""`timernn tokens`: the file that a server reads, made and changed on the command line."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest

from service.cli import main
from service.security.tokens import read_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tokens = Callable[..., tuple[int, str, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return where the file of tokens is."""
    return tmp_path / "tokens.toml"


@pytest.fixture
def tokens(capsys: pytest.CaptureFixture[str], file: Path) -> Tokens:
    """Run `timernn tokens WORDS --file FILE`; give its code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["tokens", *words, "--file", str(file)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def create(tokens: Tokens, *words: str) -> str:
    """Make a token and return it: the last line of stdout, alone."""
    code, out, err = tokens("create", "--role", "train", "--tenant", "acme", *words)
    assert code == 0, err
    return out.splitlines()[-1]


def test_a_token_is_the_last_line_of_stdout(tokens: Tokens, file: Path) -> None:
    """So that a script can take it, and the file accepts it."""
    presented = create(tokens, "--name", "ci")
    found = read_tokens(file).find(presented)
    assert found is not None
    assert (found.name, found.tenant, found.role.name) == ("ci", "acme", "TRAIN")


def test_expires_gives_a_token_an_end(tokens: Tokens, file: Path) -> None:
    """30d after it was made."""
    presented = create(tokens, "--expires", "30d")
    found = read_tokens(file).find(presented)
    assert found is not None
    assert found.expires is not None
    assert (found.expires - found.created).days == 30


def test_a_list_shows_no_token(tokens: Tokens, file: Path) -> None:
    """Neither the token nor its digest; as a table and as JSON."""
    presented = create(tokens, "--name", "ci")
    digest = next(iter(read_tokens(file))).digest
    code, table, _ = tokens("list")
    _, text, _ = tokens("list", "--json")
    assert code == 0
    for out in (table, text):
        assert presented not in out
        assert digest not in out
    (entry,) = json.loads(text)
    assert (entry["name"], entry["role"], entry["expires"], entry["state"]) == (
        "ci",
        "train",
        None,
        "valid",
    )
    assert table.split()[:7] == ["ID", "NAME", "TENANT", "ROLE", "CREATED", "EXPIRES", "STATE"]


def test_a_leaked_token_is_revoked_from_stdin(
    tokens: Tokens, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never an argument, which everybody on the machine could read."""
    presented, other = create(tokens, "--name", "leaked"), create(tokens, "--name", "other")
    monkeypatch.setattr("sys.stdin", io.StringIO(presented + "\n"))
    code, out, _ = tokens("revoke", "--token-stdin")
    assert code == 0
    assert out.split()[-1] == "leaked"
    assert read_tokens(file).find(presented) is None
    assert read_tokens(file).find(other) is not None


def test_the_last_token_s_end_is_warned_of(tokens: Tokens) -> None:
    """A server with an empty file refuses everybody."""
    create(tokens, "--name", "ci")
    code, _, err = tokens("revoke", "--name", "ci")
    assert code == 0
    assert "servers that use it refuse everybody" in err


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (
            ("create", "--role", "root", "--tenant", "acme"),
            2,
            "): expected one of infer, train, admin, operator, got 'root'",
        ),
        (("create", "--role", "infer", "--tenant", "a b"), 2, "tenant: expected 1 to 63 of"),
        (
            ("create", "--role", "infer", "--tenant", "a", "--expires", "soon"),
            2,
            "expected a span such as 90m, 12h or 30d, got 'soon'",
        ),
        (("revoke",), 2, "expected one of --name, --id and --token-stdin"),
        (("revoke", "--name", "a", "--id", "b"), 2, "expected one of --name, --id and"),
        (("list",), 1, "tokens.toml: No such file or directory"),
        (("revoke", "--name", "a"), 1, "tokens.toml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    tokens: Tokens, words: tuple[str, ...], code: int, error: str
) -> None:
    """On stderr, and nothing on stdout."""
    got, out, err = tokens(*words)
    assert (got, out) == (code, "")
    assert error in err
    assert err.count("\n") == 1


def test_a_name_that_stands_there_twice_is_refused(tokens: Tokens, file: Path) -> None:
    """As after an edit by hand: `revoke --name` would take out the first one, and leave the other."""
    create(tokens, "--name", "ci")
    create(tokens, "--name", "cd")
    file.write_text(file.read_text().replace('"cd"', '"ci"'))
    code, out, err = tokens("revoke", "--name", "ci")
    assert (code, out) == (1, "")
    assert err == f"timernn: {file}: token 2: name: token 1 has the same one\n"


def test_a_file_that_others_may_read_is_refused(tokens: Tokens, file: Path) -> None:
    """Also by the commands, before anything is written."""
    create(tokens)
    file.chmod(0o644)
    code, _, err = tokens("create", "--role", "infer", "--tenant", "acme")
    assert code == 1
    assert "expected mode 0600, got 0644" in err
