"""What the engine asks of a network, whatever its cell: the one port between arithmetic and its users."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import DTypeLike

    from rnn_engine.arrays import Array, Grads, Spec, State, Weights

Prepared: TypeAlias = Any
"""What a network's passes take: its weights in the form that they want. Made by `Network.prepare`, another for each
network, kept as long as the weights are, never stored."""


class NetworkTape(Protocol):
    """What a forward pass leaves for its backward pass; what is in it is the network's own affair.

    Never stored: from the same weights, inputs and first state `forward` makes it again, bit for bit.
    """

    @property
    def nbytes(self) -> int:
        """Return the bytes of the arrays that it keeps alive."""
        ...


@dataclass(frozen=True, slots=True)
class Real:
    """Inputs that are vectors of numbers: (N, T, size) in the dtype of the weights.

    Attributes:
        size: D, the number of features.
    """

    size: int


@dataclass(slots=True, eq=False)  # Not frozen: that takes as long to make as a small product.
class Step:
    """What a forward pass over one chunk gives.

    Attributes:
        outputs: Shape (N, T, output_size), dtype of the weights.
        state: The state after the chunk, in memory of its own.
        tape: For the backward pass; None unless it was asked for.
    """

    outputs: Array
    state: State
    tape: NetworkTape | None


class Network(ABC):
    """A recurrent network: sizes and arithmetic, no weights. Immutable and compared by value.

    One class a cell. N is the rows of a batch, T the steps of a chunk.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def weight_spec(self) -> Spec:
        """Return the names, shapes and places of the weights."""

    @property
    @abstractmethod
    def state_spec(self) -> Spec:
        """Return the names and shapes of the state of one row."""

    @property
    @abstractmethod
    def input(self) -> Real:
        """Return what an input is."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Return the number of features of an output."""

    @abstractmethod
    def init(self, rng: np.random.Generator, dtype: DTypeLike) -> Weights:
        """Draw first weights."""

    @abstractmethod
    def prepare(self, weights: Weights) -> Prepared:
        """Return weights, of `weight_spec`, in the form that the passes take; nothing is copied twice."""

    @abstractmethod
    def forward(self, prepared: Prepared, inputs: Array, state: State, *, keep: bool) -> Step:
        """Run over one chunk.

        Args:
            prepared: The weights, from `prepare`.
            inputs: Shape (N, T, D), T >= 1, as `input` says.
            state: The state before the chunk, N rows.
            keep: Whether a backward pass will need the tape.

        Raises:
            ShapeError: If the sizes disagree, or N or T is 0.
            DTypeError: If an array has another type than the weights.
        """

    @abstractmethod
    def forward_many(
        self, prepared: Prepared, inputs: Sequence[Array], states: Sequence[State]
    ) -> list[Step]:
        """Run over many chunks at once, of any N and T, each from its own state; no tapes are kept.

        The result of each is that of `forward` up to rounding. Outputs may be views of one buffer: copy what
        outlives the others.

        Raises:
            ShapeError: If the sizes inside a chunk disagree, or the two lists' lengths do.
            DTypeError: If an array has another type than the weights.
        """

    @abstractmethod
    def backward(
        self, prepared: Prepared, tape: Any, d_outputs: Array, d_state: State | None = None
    ) -> tuple[Grads, Array | None, State]:
        """Propagate gradients back through one chunk.

        Args:
            prepared: The weights that the tape was made with.
            tape: From `forward`.
            d_outputs: Gradient of the loss with respect to the outputs, shape (N, T, output_size).
            d_state: Gradient that arrives at the last state from later chunks; None: zero.

        Returns:
            The gradients of the weights, of the inputs (None where inputs are not numbers) and of the state
            before the chunk, in memory of their own.

        Raises:
            ShapeError: If the sizes disagree, or N or T is 0.
            DTypeError: If an array has another type than the weights.
        """

    @abstractmethod
    def last_output(self, state: State) -> Array:
        """Return the output of the step that left a state, (N, output_size), as the state holds it."""

    @abstractmethod
    def work(self, n: int, t: int) -> int:
        """Return the multiply-adds of a forward pass over N rows and T steps, roughly."""
