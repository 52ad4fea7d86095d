"""Transfers weights between a server and a safetensors file."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import timernn
from service.cli.progress import bar

if TYPE_CHECKING:
    from pathlib import Path


def write_weights(
    client: timernn.Client, model_id: str, file: Path, *, version: int | None, moments: bool
) -> tuple[timernn.Version, int]:
    """Fetch a version and write it to a file, atomically: the file is complete or not there.

    Args:
        client: The connection.
        model_id: The model.
        file: Where to; overwritten if it exists.
        version: Its number; None for the newest.
        moments: With the optimizer's state.

    Returns:
        The version, and the file's size in bytes.
    """
    data = io.BytesIO()
    named = None if version is None else timernn.Version(version)
    with bar(f"fetching {model_id}"):
        got = client.export_weights(model_id, data, version=named, include_moments=moments)
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data.getbuffer())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return got, data.getbuffer().nbytes


def read_weights(
    client: timernn.Client, model_id: str, file: Path, *, expected_version: int | None
) -> timernn.Version:
    """Send a file's weights; they become the model's next version.

    Args:
        client: The connection.
        model_id: The model.
        file: Where from.
        expected_version: Refuse unless the newest version has this number; None for any.
    """
    named = None if expected_version is None else timernn.Version(expected_version)
    with bar(f"sending {file.stat().st_size:,} bytes to {model_id}"):
        return client.import_weights(model_id, file, expected_version=named)
