"""The file of `timernn backup`: a zip of safetensors files and a manifest; docs/operations.md describes it.

It holds no code and no pickle, its entries are not compressed, and none is ever written to a path that the
file names: each is read whole and sent to a server.
"""

from __future__ import annotations

import json
import os
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from service.files import open_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LAYOUT: Final = 1
MANIFEST: Final = "manifest.json"
_FORMAT: Final = "timernn-backup"
_MANIFEST_BYTES: Final = 256 << 20
_MODE: Final = 0o600  # it holds weights, and with --sessions what clients' states are


class BackupFileError(Exception):
    """A file cannot be used as a backup; the message is one line for people."""


@dataclass(frozen=True, slots=True)
class SavedVersion:
    """A weights version in the file.

    Attributes:
        entry: Its safetensors file in the zip.
        number: The version's number where it was saved.
        digest: What stands for weights and moments, in hexadecimal.
        has_moments: Whether the optimizer's state is in it.
        checkpoints: The names under which it is kept.
        is_head: Whether it was the newest.
    """

    entry: str
    number: int
    digest: str
    has_moments: bool
    checkpoints: list[str]
    is_head: bool


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A model in the file.

    Attributes:
        model_id: Its name.
        input_size: D.
        hidden_size: H.
        dtype: "float32" or "float64".
        optimizer: Its kind, and its hyperparameters by name.
        versions: The checkpoints' versions and the newest, by number.
    """

    model_id: str
    input_size: int
    hidden_size: int
    dtype: str
    optimizer: dict[str, Any]
    versions: list[SavedVersion]


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A session in the file.

    Attributes:
        entry: A safetensors file with the tensor "state", (N, H).
        session_id: Its name.
        model_id: The model that it runs.
        batch_size: N.
        ttl_s: Time to live, in seconds.
        epoch: The epoch in which it was saved.
        chunk_seq: The last chunk that had been applied.
    """

    entry: str
    session_id: str
    model_id: str
    batch_size: int
    ttl_s: float
    epoch: int
    chunk_seq: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file holds.

    Attributes:
        create_time: When it was made, ISO 8601.
        server_version: Of the server that it was made from.
        models: The models.
        sessions: The sessions, if they were asked for.
    """

    create_time: str
    server_version: str
    models: list[SavedModel]
    sessions: list[SavedSession]


@contextmanager
def write_backup(file: Path) -> Iterator[zipfile.ZipFile]:
    """Yield a zip that becomes `file` at the end of the block, or is not there if the block fails.

    Args:
        file: Where to; overwritten if it exists. Only its owner may read it.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _MODE)
    try:
        with os.fdopen(descriptor, "wb") as data:
            with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
                yield archive
            data.flush()
            os.fsync(data.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Write an entry whose size may be over 2 GiB."""
    with archive.open(name, "w", force_zip64=True) as entry:
        entry.write(data)


def write_manifest(archive: zipfile.ZipFile, manifest: Manifest) -> None:
    """Write the manifest, the last entry."""
    written = {"format": _FORMAT, "layout": LAYOUT, **asdict(manifest)}
    write_entry(archive, MANIFEST, json.dumps(written, indent=1).encode())


@contextmanager
def read_backup(file: Path) -> Iterator[tuple[zipfile.ZipFile, Manifest]]:
    """Open a backup and check all of it: its layout, that each entry is there and intact.

    Raises:
        BackupFileError: If it is none, is damaged, or a later release made it.
    """
    try:
        with open_file(file) as data, zipfile.ZipFile(data) as archive:
            manifest = _read_manifest(file, archive)
            _check_entries(file, archive, manifest)
            yield archive, manifest
    except zipfile.BadZipFile as error:
        raise BackupFileError(f"{file}: no backup, or damaged: {error}") from error


def _read_manifest(file: Path, archive: zipfile.ZipFile) -> Manifest:
    try:
        entry = archive.getinfo(MANIFEST)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _MANIFEST_BYTES:
            raise BackupFileError(f"{file}: no backup: its manifest is compressed, or too large")
        found = json.loads(archive.read(entry))
        layout = found["layout"] if found["format"] == _FORMAT else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BackupFileError(f"{file}: no backup: it has no manifest of one") from error
    if layout != LAYOUT:
        raise BackupFileError(
            f"UNSUPPORTED_LAYOUT: {file}: layout {layout}, this timernn reads layout {LAYOUT}"
        )
    try:
        return Manifest(
            create_time=str(found["create_time"]),
            server_version=str(found["server_version"]),
            models=[_model(model) for model in found["models"]],
            sessions=[SavedSession(**session) for session in found["sessions"]],
        )
    except (KeyError, TypeError) as error:
        raise BackupFileError(f"{file}: its manifest is damaged: {error}") from error


def _model(found: Mapping[str, Any]) -> SavedModel:
    versions = [SavedVersion(**version) for version in found["versions"]]
    if [version.is_head for version in versions].count(True) != 1:
        raise TypeError(f"{found['model_id']!r}: expected one version with is_head")
    return SavedModel(**{**found, "versions": versions})


def _check_entries(file: Path, archive: zipfile.ZipFile, manifest: Manifest) -> None:
    entries = {version.entry for model in manifest.models for version in model.versions}
    entries |= {session.entry for session in manifest.sessions}
    there = {each.filename: each for each in archive.infolist()}
    for entry in sorted(entries):
        if entry not in there or there[entry].compress_type != zipfile.ZIP_STORED:
            raise BackupFileError(f"{file}: {entry} is missing, or compressed")
    if (damaged := archive.testzip()) is not None:
        raise BackupFileError(f"{file}: {damaged} is damaged")
