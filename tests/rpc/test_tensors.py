"""Tensors on the wire: what is refused, and that nothing is copied or multiplied too early."""

from __future__ import annotations

import numpy as np
import pytest

from service.domain.errors import InvalidArgument
from service.domain.rules import Axes
from service.rpc.tensors import tensor_from_proto, tensor_to_proto
from timernn.v1.tensor_pb2 import D_TYPE_FLOAT32, D_TYPE_FLOAT64, Tensor

XS = Axes("NTD", 1024, 4096, 4096)


def message(shape: tuple[int, ...], data: bytes = b"", dtype: int = D_TYPE_FLOAT32) -> Tensor:
    """Make a tensor message of any content."""
    return Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]


BAD = [
    (message((1, 1, 1), dtype=0), "xs.dtype: expected D_TYPE_FLOAT32 or D_TYPE_FLOAT64, got D_TYPE_UNSPECIFIED"),
    (message((1, 1, 1), dtype=77), "xs.dtype: expected D_TYPE_FLOAT32 or D_TYPE_FLOAT64, got 77"),
    (message(()), "xs.shape: expected 3 dims (N,T,D), got 0"),
    (message((1, 2)), "xs.shape: expected 3 dims (N,T,D), got 2"),
    (message((1,) * 100_000), "xs.shape: expected 3 dims (N,T,D), got 100000"),
    (message((1, 0, 1)), "xs.shape[1]: T must be 1 to 4096, got 0"),
    (message((-1, 1, 1)), "xs.shape[0]: N must be 1 to 1024, got -1"),
    (message((1025, 1, 1)), "xs.shape[0]: N must be 1 to 1024, got 1025"),
    (message((1, 2**63 - 1, 1)), "xs.shape[1]: T must be 1 to 4096, got 9223372036854775807"),
    (message((2**32, 2**32, 1)), "xs.shape[0]: N must be 1 to 1024, got 4294967296"),
    (message((1, 2, 4), bytes(40)), "xs.data: expected 32 bytes for (1, 2, 4) float32, got 40"),
    (message((1, 2, 4), b""), "xs.data: expected 32 bytes for (1, 2, 4) float32, got 0"),
    (message((1, 1, 1), bytes(4), D_TYPE_FLOAT64), "xs.data: expected 8 bytes for (1, 1, 1) float64, got 4"),
]  # fmt: skip


@pytest.mark.parametrize(("tensor", "text"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_tensor_is_named_with_what_was_expected(tensor: Tensor, text: str) -> None:
    """Each wrong part has a message of its own, found before any size is computed."""
    with pytest.raises(InvalidArgument) as caught:
        XS.check("xs", tensor_from_proto("xs", tensor, XS))
    assert (caught.value.reason, caught.value.message) == ("BAD_TENSOR", text)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_come_back_bit_for_bit(dtype: str, rng: np.random.Generator) -> None:
    """To a message and back nothing changes, in either type."""
    array = rng.standard_normal((2, 3, 4)).astype(dtype)
    back = tensor_from_proto("xs", tensor_to_proto(array), XS)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype
    assert not back.flags.writeable


def test_a_transposed_array_travels_in_c_order(rng: np.random.Generator) -> None:
    """What the engine returns as a view of a time-major buffer is put in order."""
    array = rng.standard_normal((3, 2, 4)).astype(np.float32).swapaxes(0, 1)
    np.testing.assert_array_equal(tensor_from_proto("xs", tensor_to_proto(array), XS), array)


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.nan, "xs[1,2,3] is NaN"), (np.inf, "xs[1,2,3] is infinite"), (-np.inf, "xs[1,2,3] is infinite")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_first_value_that_is_not_finite_is_named(value: float, text: str, dtype: str) -> None:
    """NaN and infinity are refused wherever they stand, with the first index."""
    array = np.ones((2, 3, 4), dtype)
    array[1, 2, 3] = value
    with pytest.raises(InvalidArgument) as caught:
        XS.check("xs", tensor_from_proto("xs", tensor_to_proto(array), XS))
    assert (caught.value.reason, caught.value.message) == ("NON_FINITE", text)
    assert caught.value.metadata["index"] == "xs[1,2,3]"


@pytest.mark.parametrize("value", [3e38, -3e38, 1e-45, 0.0])
def test_large_and_denormal_values_are_finite(value: float) -> None:
    """The quick check overflows on large values; they are accepted all the same."""
    array = np.full((1, 8, 8), value, np.float32)
    np.testing.assert_array_equal(tensor_from_proto("xs", tensor_to_proto(array), XS), array)
