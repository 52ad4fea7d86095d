"""`timernn checkpoints`, `timernn backup` and `timernn restore` against real servers."""

from __future__ import annotations

import io
import json
import stat
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn as library
from service.cli.backup_file import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Timernn = Callable[..., Any]


def one_line(text: str) -> str:
    """Return the only line of a text."""
    assert text.count("\n") == 1, text
    return text.strip()


def weights_of(client: library.Client, model_id: str, version: library.Version | None) -> Any:
    """Return all arrays of a version by name, the optimizer's state included."""
    got = client.get_weights(model_id, version, include_moments=True)
    return {"Wx": got.Wx, "Wh": got.Wh, "b": got.b, **got.moments}


def train(client: library.Client, model_id: str, xs: np.ndarray[Any, Any]) -> None:
    """Make one step."""
    with client.session(model_id, train=True) as session:
        hs = session.forward(xs)
        session.backward(hs)
        client.update(model_id)
    client.close_session(session.session_id)


@pytest.fixture(scope="module")
def server(serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a server with nothing in it but what these tests put there."""
    with serving(tmp_path_factory.mktemp("saved")) as started:
        yield started


@pytest.fixture
def filled(server: Any, rng: np.random.Generator) -> Any:
    """Fill the server with a model, two checkpoints and a session; empty it at the end."""
    xs = rng.normal(size=(1, 4, 3))
    with library.connect(server.address) as client:
        client.create_model(
            "m", input_size=3, hidden_size=4, dtype="float64", optimizer=library.Adam(lr=0.01)
        )
        train(client, "m", xs)
        client.create_checkpoint("m", "first")
        train(client, "m", xs)
        train(client, "m", xs)
        client.create_checkpoint("m", "newest")
        session = client.session("m", "device-7", ttl=600)
        session.forward(xs)
        yield client
        client.close_session("device-7")
        client.delete_model("m")


def test_a_checkpoint_is_kept_and_brought_back(timernn: Timernn, filled: library.Client) -> None:
    """Its weights become the next version; then it can be deleted."""
    head = filled.get_model("m").head
    assert one_line(timernn("checkpoints", "create", "m", "now").out) == "now keeps version 4 of m"
    shown = json.loads(timernn("checkpoints", "list", "m", "--json").out)
    assert [(each["checkpoint_id"], each["version"]["number"]) for each in shown] == [
        ("first", 2),
        ("newest", 4),
        ("now", 4),
    ]
    done = timernn("checkpoints", "restore", "m", "first", "--expect-version", str(head.number))
    assert one_line(done.out) == "m has weights version 5 now"
    assert timernn("checkpoints", "delete", "m", "now").code == 0
    assert timernn("checkpoints", "delete", "m", "now", "--missing-ok").code == 0
    assert "CHECKPOINT_NOT_FOUND" in one_line(timernn("checkpoints", "delete", "m", "now").err)


def test_a_restored_model_is_the_same_bit_for_bit(
    timernn: Timernn, filled: library.Client, serving: Any, tmp_path: Path
) -> None:
    """Weights, optimizer state and checkpoints; the next step gives the same weights in both places."""
    file = tmp_path / "b"
    done = timernn("backup", str(file), "--sessions")
    assert done.code == 0, done.err
    assert done.out.startswith("wrote 1 model, 2 checkpoints, 1 session to ")
    assert "not saved: superseded versions" in done.out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    xs = np.ones((1, 2, 3))
    with serving(tmp_path) as other, library.connect(other.address) as client:
        restored = timernn("restore", str(file), "--sessions", "--server", other.address)
        assert restored.code == 0, restored.err
        assert restored.out.startswith(
            "restored 1 of 1 model, 2 of 2 checkpoints, 1 of 1 session, "
        )
        assert filled.get_model("m").optimizer == client.get_model("m").optimizer
        kept = [
            {
                each.checkpoint_id: weights_of(c, "m", each.version)
                for each in c.list_checkpoints("m")
            }
            for c in (filled, client)
        ]
        np.testing.assert_equal(kept[1], kept[0])
        for each in (filled, client):
            train(each, "m", xs)
        np.testing.assert_equal(weights_of(client, "m", None), weights_of(filled, "m", None))
        before, after = filled.get_session("device-7"), client.get_session("device-7")
        assert after.ttl == before.ttl
        assert after.epoch > before.epoch
        assert after.chunk_seq == 0
        np.testing.assert_equal(client.get_state("device-7")[1], filled.get_state("device-7")[1])


def test_what_is_there_is_left_as_it_is(
    timernn: Timernn, filled: library.Client, tmp_path: Path
) -> None:
    """The same model and a live session are named and not touched; another model of the name stops all."""
    file = str(tmp_path / "b")
    timernn("backup", file, "--sessions")
    epoch = filled.get_session("device-7").epoch
    again = timernn("restore", file, "--sessions")
    assert again.code == 0
    assert again.out.startswith("restored 0 of 1 model, 0 of 2 checkpoints, 0 of 1 session, ")
    assert "m: it is there with the same weights" in again.err
    assert "session device-7: it is live" in again.err
    assert filled.get_session("device-7").epoch == epoch
    reset = timernn("restore", file, "--sessions", "--reset-sessions")
    assert reset.code == 0
    assert reset.out.startswith("restored 0 of 1 model, 0 of 2 checkpoints, 1 of 1 session, ")
    assert filled.get_session("device-7").epoch > epoch
    train(filled, "m", np.ones((1, 2, 3)))
    refused = timernn("restore", file)
    assert refused.code == 1
    assert "nothing was restored: there with other weights: m" in one_line(refused.err)


def test_a_writer_of_the_old_epoch_is_fenced(
    timernn: Timernn, filled: library.Client, server: Any, tmp_path: Path
) -> None:
    """A program that went on meanwhile learns that its session stands elsewhere."""
    file = str(tmp_path / "b")
    timernn("backup", file, "--sessions")
    with library.connect(server.address) as other:
        writer = other.session("m", "device-7")
        timernn("restore", file, "--sessions", "--reset-sessions")
        with pytest.raises(library.errors.EpochFenced):
            writer.forward(np.ones((1, 2, 3)))
    assert filled.get_session("device-7").chunk_seq == 0


@pytest.mark.usefixtures("filled")
def test_a_backup_does_not_overwrite_by_accident(timernn: Timernn, tmp_path: Path) -> None:
    """An existing file stays unless --force is given, and no half of one is left."""
    file = tmp_path / "precious"
    file.write_text("mine")
    refused = timernn("backup", str(file))
    assert (refused.code, file.read_text()) == (2, "mine")
    assert (
        timernn("backup", str(file), "--server", "127.0.0.1:1", "--timeout=1", "--force").code == 1
    )
    assert [each.name for each in tmp_path.iterdir()] == ["precious"]
    assert file.read_text() == "mine"


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    "kind", ["rubbish", "other zip", "later", "damaged", "missing", "packed", "headless"]
)
def test_a_file_that_is_no_backup_is_refused_whole(
    timernn: Timernn, tmp_path: Path, kind: str
) -> None:
    """One line that says why; nothing is sent."""
    file = tmp_path / "b"
    timernn("backup", str(file))
    expected = spoil(file, kind)
    refused = timernn("restore", str(file), "--server", "127.0.0.1:1")
    assert refused.code == 1
    assert expected in one_line(refused.err)


def spoil(file: Path, kind: str) -> str:
    """Make something else of a backup; return what the refusal has to say."""
    if kind == "rubbish":
        file.write_bytes(b"rubbish")
        return "no backup, or damaged"
    if kind == "damaged":
        data = bytearray(file.read_bytes())
        data[300] ^= 1
        file.write_bytes(data)
        return "is damaged"
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pack, expected = zipfile.ZIP_STORED, ""
    if kind == "other zip":
        del entries[MANIFEST]
        expected = "no manifest"
    if kind == "later":
        entries[MANIFEST] = entries[MANIFEST].replace(b'"layout": 1', b'"layout": 2')
        expected = "UNSUPPORTED_LAYOUT"
    if kind == "headless":
        entries[MANIFEST] = entries[MANIFEST].replace(b'"is_head": true', b'"is_head": false')
        expected = "expected one version with is_head"
    if kind == "missing":
        del entries[next(name for name in entries if name != MANIFEST)]
        expected = "is missing"
    if kind == "packed":
        pack, expected = zipfile.ZIP_DEFLATED, "is compressed"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", pack) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    file.write_bytes(made.getvalue())
    return expected
