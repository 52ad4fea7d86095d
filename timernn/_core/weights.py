"""Weights as safetensors files, whole and in the parts that travel."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import safetensors.numpy
from safetensors import SafetensorError

from timernn import errors
from timernn._core.files import read_bytes
from timernn.types import Weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from timernn.types import Array, Version

WeightsFile: TypeAlias = str | Path | IO[bytes]
_NAMES = ("Wx", "Wh", "b")
_PART_BYTES = 1 << 20
MAX_FILE_BYTES = 4 << 30  # a server takes what its model needs, which is less


def weights_from_file(data: bytes, version: Version) -> Weights:
    """Read a safetensors file with the tensors Wx, Wh, b and perhaps moments.

    Raises:
        BadWeights: If it is no such file.
    """
    try:
        tensors = safetensors.numpy.load(data)
        Wx, Wh, b = (tensors.pop(name) for name in _NAMES)
    except (SafetensorError, KeyError, ValueError) as error:
        raise errors.BadWeights(
            f"expected a safetensors file with Wx, Wh and b, got {len(data)} bytes of something else"
        ) from error
    return Weights(Wx=Wx, Wh=Wh, b=b, version=version, moments=tensors)


def weights_to_file(Wx: Array, Wh: Array, b: Array) -> bytes:
    """Write Wx (D, H), Wh (H, H) and b (H,) as a safetensors file."""
    tensors = {"Wx": Wx, "Wh": Wh, "b": b}
    # safetensors writes the memory as it lies: a transposed view would come out scrambled.
    return bytes(safetensors.numpy.save({k: v.copy(order="C") for k, v in tensors.items()}))


def parts(data: bytes) -> Iterator[bytes]:
    """Cut a file into parts of at most 1 MiB."""
    for start in range(0, len(data), _PART_BYTES):
        yield data[start : start + _PART_BYTES]


def read_file(source: WeightsFile) -> bytes:
    """Read a path or an open binary file whole.

    Raises:
        OSError: If the path cannot be read, or is no file of at most `MAX_FILE_BYTES`.
        BadWeights: If there is nothing in it.
    """
    data = read_bytes(source, MAX_FILE_BYTES) if isinstance(source, str | Path) else source.read()
    if not data:
        raise errors.BadWeights("expected a safetensors file with Wx, Wh and b, got nothing")
    return data


def write_file(target: WeightsFile, data: bytes) -> None:
    """Write a path or an open binary file whole."""
    if isinstance(target, str | Path):
        Path(target).write_bytes(data)
    else:
        target.write(data)
