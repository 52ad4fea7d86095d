"""Named arrays as views of one buffer: weights, their gradients, and what an optimizer keeps of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rnn_engine.errors import DTypeError, EngineError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from numpy.typing import DTypeLike

Array: TypeAlias = NDArray[np.floating[Any]]
"""A float32 or float64 array."""

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
CACHE_LINE_BYTES = 64
SLICE_BYTES = 256 * 1024
"""So much of each buffer is worked on at a time where several go through the cache together."""


class ArraySpec(NamedTuple):
    """One array of a network.

    Attributes:
        name: What it is called where arrays are stored, digested or sent.
        shape: Of weights all of it; of a state that of one row.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """The arrays of a network in order, and where each lies in their common buffer.

    The order of `arrays` is that of tuples, of bytes and of sums. Where the arrays lie is another matter, which
    each network decides for its own passes.

    Attributes:
        arrays: Names and shapes.
        memory: The names in the order in which the arrays follow one another in the buffer.
        size: Numbers in the buffer.
        places: Where each array lies in the buffer, and its shape, in the order of `arrays`.
    """

    arrays: tuple[ArraySpec, ...]
    memory: tuple[str, ...]
    size: int = field(init=False, compare=False)
    places: tuple[tuple[slice, tuple[int, ...]], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the places."""
        sizes = {name: prod(shape) for name, shape in self.arrays}
        ends = dict(zip(self.memory, accumulate(sizes[name] for name in self.memory), strict=True))
        places = tuple(
            (slice(ends[name] - sizes[name], ends[name]), shape) for name, shape in self.arrays
        )
        object.__setattr__(self, "size", sum(sizes.values()))
        object.__setattr__(self, "places", places)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names in order."""
        return tuple(name for name, _ in self.arrays)

    def view(self, buffer: Array) -> Arrays:
        """Return the arrays of a buffer of `size` numbers."""
        return Arrays.view(self, buffer)

    def pack(self, arrays: Sequence[Array]) -> Arrays:
        """Copy arrays, in the order of the specification, into a buffer of their own.

        Raises:
            ShapeError: If one has another shape than the specification says.
            DTypeError: If they are not of one type.
        """
        packed = self.view(aligned_empty(self.size, arrays[0].dtype))
        for (name, _), target, array in zip(self.arrays, packed, arrays, strict=True):
            check_like(name, array, target)
            target[...] = array
        return packed

    def split(self, flat: Array) -> tuple[Array, ...]:
        """Return views of numbers that lie one array after another in the order of the specification."""
        parts, start = [], 0
        for _, shape in self.arrays:
            stop = start + prod(shape)
            parts.append(flat[start:stop].reshape(shape))
            start = stop
        return tuple(parts)

    def split_rows(self, rows: Array) -> tuple[Array, ...]:
        """Return the arrays of a state whose rows hold all numbers side by side, shape (N, size)."""
        if len(self.arrays) == 1 and len(self.arrays[0].shape) == 1:
            return (rows,)
        parts, start = [], 0
        for _, shape in self.arrays:
            stop = start + prod(shape)
            parts.append(np.ascontiguousarray(rows[:, start:stop]).reshape(len(rows), *shape))
            start = stop
        return tuple(parts)

    def join_rows(self, state: State) -> Array:
        """Return a state as rows that hold all numbers side by side, shape (N, size): undo `split_rows`."""
        if len(state) == 1 and state[0].ndim == 2:
            return state[0]
        return np.concatenate([array.reshape(len(array), -1) for array in state], axis=1)


class Arrays(tuple[Array, ...]):  # noqa: SLOT001 - a tuple cannot have slots of its own
    """Arrays in the order of a specification, views of one 1-D buffer; compared by identity.

    What is done to every number alike is done to `buffer`; what has an order is done to the tuple.

    Attributes:
        spec: Their names, shapes and places in the buffer.
        buffer: All their numbers, C-contiguous, float32 or float64.
    """

    spec: Spec
    buffer: Array

    @classmethod
    def view(cls, spec: Spec, buffer: Array) -> Self:
        """Return the arrays that a buffer of `spec.size` numbers holds."""
        arrays = [buffer[place].reshape(shape) for place, shape in spec.places]
        return cls.of(arrays, spec, buffer)

    @classmethod
    def of(cls, arrays: Sequence[Array], spec: Spec, buffer: Array) -> Self:
        """Return arrays that are views of the buffer already."""
        made = tuple.__new__(cls, arrays)
        made.spec, made.buffer = spec, buffer
        return made

    def like(self, buffer: Array) -> Self:
        """Return arrays of the same kind and specification in another buffer."""
        return self.view(self.spec, buffer)

    def named(self) -> dict[str, Array]:
        """Return the arrays by name, in order."""
        return dict(zip(self.spec.names, self, strict=True))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the one type of all arrays."""
        return self.buffer.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays together."""
        return self.buffer.nbytes

    def __eq__(self, other: object) -> bool:
        """Return whether the other is this very object: a comparison of arrays has no one truth value."""
        return self is other

    def __ne__(self, other: object) -> bool:
        """Return whether the other is another object."""
        return self is not other

    __hash__ = object.__hash__


Weights: TypeAlias = Arrays
"""The weights of a network, in the order of its `weight_spec`."""

Grads: TypeAlias = Arrays
"""The gradients of a loss with respect to weights, of the weights' specification."""

State: TypeAlias = tuple[Array, ...]
"""What a network carries from one step to the next, in the order of its `state_spec`: each array
(N, *shape), C-contiguous."""


def aligned_empty(size: int, dtype: DTypeLike) -> Array:
    """Return a 1-D array of numbers not yet set that begins at a cache line's border.

    A wide load across two cache lines costs twice; NumPy aligns to 16 bytes only. With a row of
    states (N = 1) a pass is 3-10 % shorter so.
    """
    memory = np.empty(size * np.dtype(dtype).itemsize + CACHE_LINE_BYTES, np.uint8)
    offset = -memory.__array_interface__["data"][0] % CACHE_LINE_BYTES
    return memory[offset : offset - CACHE_LINE_BYTES].view(dtype)


def slices(buffer: Array) -> list[slice]:
    """Return the slices, in order, in which a buffer is worked on where several arrays go through the cache."""
    step = SLICE_BYTES // buffer.itemsize
    return [slice(start, start + step) for start in range(0, buffer.size, step)]


def check_alike(prefix: str, arrays: Arrays, like: Arrays, *, whose: str = "the weights") -> None:
    """Raise unless arrays lie in their buffer as others do, in the same type.

    Args:
        prefix: Stands before a name in the message: "d" of a gradient.
        arrays: What to check.
        like: What they are to be like.
        whose: What those are, for the message.

    Raises:
        ShapeError: If an array has another shape.
        DTypeError: If the type is another.
        EngineError: If their numbers are in another order in memory.
    """
    if arrays.spec is not like.spec and arrays.spec != like.spec:
        for name, array, other in zip(like.spec.names, arrays, like, strict=False):
            check_like(prefix + name, array, other, whose=whose)
        text = f"expected the arrays {like.spec.memory} in memory, got {arrays.spec.memory}"
        raise EngineError(f"{prefix}{like.spec.names[0]}: {text}")
    if arrays.buffer.dtype != like.buffer.dtype:
        check_like(prefix + like.spec.names[0], arrays[0], like[0], whose=whose)


def check_like(name: str, array: Array, other: Array, *, whose: str = "the weights") -> None:
    """Raise unless an array has the shape and type of another; never broadcast.

    Raises:
        ShapeError: If it has another shape.
        DTypeError: If it has another type.
    """
    if array.shape != other.shape:
        raise ShapeError(name, f"{other.shape} like {whose}", array.shape)
    if array.dtype != other.dtype:
        raise DTypeError(name, f"{other.dtype} like {whose}", array.dtype)
