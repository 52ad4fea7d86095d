"""Between `Tensor` messages and arrays.

Decoding copies nothing: the array reads the message's bytes and is read-only. Its dimensions are
checked one by one before any product is formed, and its values for NaN and infinity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from service.domain.errors import bad_field, bad_tensor
from service.domain.finite import check_finite
from timernn.v1.tensor_pb2 import (
    D_TYPE_FLOAT32,
    D_TYPE_FLOAT64,
    DType,
    Tensor,
    WeightsVersion,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rnn_engine import Array
    from service.domain.errors import InvalidArgument
    from service.domain.types import Version

DTYPES: Final[dict[int, np.dtype[np.floating]]] = {
    D_TYPE_FLOAT32: np.dtype("<f4"),
    D_TYPE_FLOAT64: np.dtype("<f8"),
}
_NUMBERS: Final = {"float32": D_TYPE_FLOAT32, "float64": D_TYPE_FLOAT64}


class TensorRule:
    """What one kind of tensor may look like.

    Attributes:
        letters: Its dimensions by their letters, such as "NTD".
        limits: The largest size of each.
    """

    __slots__ = ("letters", "limits", "rank")

    def __init__(self, letters: str, *limits: int) -> None:
        self.letters = letters
        self.limits = limits
        self.rank = len(limits)


def tensor_from_proto(name: str, tensor: Tensor, rule: TensorRule) -> Array:
    """Return a tensor's values as a read-only array over the message's bytes.

    Args:
        name: The field, for messages.
        tensor: What came.
        rule: Rank and the limit of each dimension.

    Returns:
        float32 or float64 values of the tensor's shape, in C order.

    Raises:
        InvalidArgument: BAD_TENSOR for dtype, shape or size; NON_FINITE for NaN or infinity, with
            the first index.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise bad_tensor(f"{name}.dtype", _dtype_expected(tensor.dtype))
    shape = tensor.shape[:]  # a slice: to iterate costs more, the end of it is an exception
    if len(shape) != rule.rank:
        raise _bad_rank(name, len(shape), rule)
    count = 1
    for size, limit in zip(shape, rule.limits):  # noqa: B905 - compared just now, and this is per chunk
        if not 0 < size <= limit:
            raise _bad_dimension(name, shape, rule)
        count *= size
    data = tensor.data
    if len(data) != count * dtype.itemsize:
        expected = f"{count * dtype.itemsize} bytes for {tuple(shape)} {dtype.name}"
        raise bad_tensor(f"{name}.data", f"expected {expected}, got {len(data)}")
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    check_finite(name, array)
    return array


def required_tensor(name: str, tensor: Tensor | None, rule: TensorRule) -> Array:
    """Return a tensor that must be there, as `tensor_from_proto` does."""
    if tensor is None:
        raise bad_field(name, "required")
    return tensor_from_proto(name, tensor, rule)


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


def _bad_rank(name: str, rank: int, rule: TensorRule) -> InvalidArgument:
    dims = ",".join(rule.letters)
    return bad_tensor(f"{name}.shape", f"expected {rule.rank} dims ({dims}), got {rank}")


def _bad_dimension(name: str, shape: Sequence[int], rule: TensorRule) -> InvalidArgument:
    sizes = zip(shape, rule.limits, strict=True)
    axis = next(axis for axis, (size, limit) in enumerate(sizes) if not 0 < size <= limit)
    letter, limit = rule.letters[axis], rule.limits[axis]
    return bad_tensor(f"{name}.shape[{axis}]", f"{letter} must be 1 to {limit}, got {shape[axis]}")
