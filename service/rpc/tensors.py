"""Between `Tensor` messages and arrays.

Decoding copies nothing: the array reads the message's bytes and is read-only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from service.domain.errors import bad_field, bad_tensor
from timernn.v1.tensor_pb2 import (
    D_TYPE_FLOAT32,
    D_TYPE_FLOAT64,
    DType,
    Tensor,
    WeightsVersion,
)

if TYPE_CHECKING:
    from rnn_engine import Array
    from service.domain.rules import Axes
    from service.domain.types import Version

DTYPES: Final[dict[int, np.dtype[np.floating]]] = {
    D_TYPE_FLOAT32: np.dtype("<f4"),
    D_TYPE_FLOAT64: np.dtype("<f8"),
}
_NUMBERS: Final = {"float32": D_TYPE_FLOAT32, "float64": D_TYPE_FLOAT64}


def tensor_from_proto(name: str, tensor: Tensor, axes: Axes) -> Array:
    """Return a tensor's values as a read-only array over the message's bytes.

    Args:
        name: The field, for messages.
        tensor: What came.
        axes: What its dimensions are, to refuse a shape that no array has.

    Returns:
        float32 or float64 values of the tensor's shape, in C order.

    Raises:
        InvalidArgument: BAD_TENSOR for an unknown dtype, a shape that no such tensor has, or bytes
            that are not as many as the shape needs. What else it must be, the domain checks.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise bad_tensor(f"{name}.dtype", _dtype_expected(tensor.dtype))
    shape = tensor.shape[:]  # a slice: to iterate costs more, the end of it is an exception
    count = 0  # where no array has this shape
    if len(shape) == axes.rank:
        count = 1
        for size in shape:
            count *= max(0, size)
    data = tensor.data
    if not count or len(data) != count * dtype.itemsize:
        axes.check_shape(name, shape)
        expected = f"{count * dtype.itemsize} bytes for {tuple(shape)} {dtype.name}"
        raise bad_tensor(f"{name}.data", f"expected {expected}, got {len(data)}")
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    return array


def required_tensor(name: str, tensor: Tensor | None, axes: Axes) -> Array:
    """Return a tensor that must be there, as `tensor_from_proto` does."""
    if tensor is None:
        raise bad_field(name, "required")
    return tensor_from_proto(name, tensor, axes)


def optional_tensor(name: str, tensor: Tensor | None, axes: Axes) -> Array | None:
    """Return a tensor that may be left out, as `tensor_from_proto` does."""
    return None if tensor is None else tensor_from_proto(name, tensor, axes)


def tensor_to_proto(array: Array) -> Tensor:
    """Return an array as a message, in C order."""
    tensor = Tensor()
    fill_tensor(tensor, array)
    return tensor


def fill_tensor(tensor: Tensor, array: Array) -> None:
    """Write an array into an empty message, in C order."""
    tensor.dtype = D_TYPE_FLOAT32 if array.itemsize == 4 else D_TYPE_FLOAT64
    tensor.shape.extend(array.shape)
    tensor.data = array.tobytes()


def dtype_to_proto(dtype: str) -> DType.ValueType:
    """Return the message's name of "float32" or "float64"."""
    return _NUMBERS[dtype]


def dtype_from_proto(name: str, dtype: int) -> str:
    """Return "float32", also where none is set, or "float64"; refuse others."""
    if not dtype:
        return "float32"
    if dtype not in DTYPES:
        raise bad_field(name, _dtype_expected(dtype))
    return str(DTYPES[dtype].name)


def version_to_proto(version: Version) -> WeightsVersion:
    """Return the name of a weights version as a message."""
    return WeightsVersion(number=version.number, digest=version.digest)


def _dtype_expected(dtype: int) -> str:
    got = DType.Name(dtype) if dtype in DType.values() else str(dtype)  # type: ignore[arg-type]
    return f"expected D_TYPE_FLOAT32 or D_TYPE_FLOAT64, got {got}"
