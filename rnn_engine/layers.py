"""The classic interface: layers that hold their weights, gradients and state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rnn_engine.backward import rnn_backward
from rnn_engine.errors import DTypeError, EngineError, ShapeError
from rnn_engine.forward import rnn_forward
from rnn_engine.params import MATRIX_NDIM, Params

if TYPE_CHECKING:
    from rnn_engine.arrays import Array
    from rnn_engine.backward import ChunkGradients
    from rnn_engine.forward import Tape


class _Layer:
    """Weights and gradients as two lists in the order Wx, Wh, b.

    An optimizer may write into the arrays of `params`, or put others of the same shapes there. Each
    backward pass overwrites the arrays in `grads` in place, so a reference to one stays good.
    """

    def __init__(self, Wx: Array, Wh: Array, b: Array) -> None:
        Params(Wx, Wh, b)  # Refuses what does not fit together.
        self.params = [Wx, Wh, b]
        self.grads = [np.zeros_like(Wx), np.zeros_like(Wh), np.zeros_like(b)]
        self._tape: Tape | None = None

    def _run(self, xs: Array, h0: Array) -> Tape:
        self._tape = rnn_forward(Params(*self.params), xs, h0)
        return self._tape

    def _run_back(self, dhs: Array) -> ChunkGradients:
        if self._tape is None:
            raise EngineError("backward: expected a forward pass before it, got none")
        result = rnn_backward(Params(*self.params), self._tape, dhs)
        for target, gradient in zip(self.grads, result.grads, strict=True):
            target[...] = gradient
        return result


class RNN(_Layer):
    """One step of the recurrence.

    Attributes:
        params: Wx (D, H), Wh (H, H), b (H,).
        grads: dWx, dWh, db of the last backward pass, overwritten in place.
    """

    def forward(self, x: Array, h_prev: Array) -> Array:
        """Return tanh(x Wx + h_prev Wh + b).

        Args:
            x: Inputs, shape (N, D).
            h_prev: Hidden state before the step, shape (N, H); never broadcast.

        Returns:
            The next hidden state, shape (N, H).

        Raises:
            ShapeError: If N, D or H disagree.
            DTypeError: If x or h_prev has another type than the weights.
        """
        if x.ndim != MATRIX_NDIM:
            raise ShapeError("x", f"(N, {self.params[0].shape[0]})", x.shape)
        return self._run(x[:, None], h_prev).hs[:, 0]

    def backward(self, dh_next: Array) -> tuple[Array, Array]:
        """Propagate a gradient through the last step and overwrite `grads`.

        Args:
            dh_next: Gradient of the next hidden state, shape (N, H).

        Returns:
            dx of shape (N, D) and dh_prev of shape (N, H).

        Raises:
            ShapeError: If dh_next does not have the shape of the last step's state.
            EngineError: If no forward pass came before.
        """
        if dh_next.ndim != MATRIX_NDIM:
            raise ShapeError("dh_next", f"(N, {self.params[1].shape[0]})", dh_next.shape)
        result = self._run_back(dh_next[:, None])
        return result.dxs[:, 0], result.dh0


class TimeRNN(_Layer):
    """The recurrence over T steps, with a state that may outlive the call.

    Attributes:
        params: Wx (D, H), Wh (H, H), b (H,).
        grads: dWx, dWh, db of the last backward pass, overwritten in place.
        stateful: Whether a forward pass starts from the state that the one before left.
        h: State after the last step, shape (N, H); None before the first pass and after a reset.
        dh: Gradient of the state before the last chunk, shape (N, H); None before a backward pass.
    """

    def __init__(
        self,
        Wx: Array,
        Wh: Array,
        b: Array,
        stateful: bool = False,  # noqa: FBT001, FBT002 - the classic signature
    ) -> None:
        super().__init__(Wx, Wh, b)
        self.stateful = stateful
        self.h: Array | None = None
        self.dh: Array | None = None

    def forward(self, xs: Array) -> Array:
        """Run over xs from the kept state if stateful, else from zero.

        Args:
            xs: Inputs, shape (N, T, D), dtype of the weights.

        Returns:
            The hidden states, shape (N, T, H).

        Raises:
            ShapeError: If D disagrees with the weights or N with the kept state.
            DTypeError: If xs or the kept state has another type than the weights.
        """
        start = self.h if self.stateful else None
        if start is None:
            Wh = self.params[1]
            start = np.zeros((*xs.shape[:1], Wh.shape[0]), Wh.dtype)
        hs = self._run(xs, start).hs
        self.h = hs[:, -1].copy()
        return hs

    def backward(self, dhs: Array) -> Array:
        """Propagate gradients through the last chunk; overwrite `grads`, set `dh`.

        Args:
            dhs: Gradients of the hidden states, shape (N, T, H).

        Returns:
            dxs of shape (N, T, D).

        Raises:
            ShapeError: If dhs does not have the shape of the last chunk's hidden states.
            EngineError: If no forward pass came before.
        """
        result = self._run_back(dhs)
        self.dh = result.dh0
        return result.dxs

    def set_state(self, h: Array) -> None:
        """Make the next stateful pass start from a copy of h, shape (N, H).

        Raises:
            ShapeError: If h is not (N, H).
            DTypeError: If h has another type than the weights.
        """
        Wh = self.params[1]
        if h.ndim != MATRIX_NDIM or h.shape[1] != Wh.shape[0]:
            raise ShapeError("h", f"(N, {Wh.shape[0]})", h.shape)
        if h.dtype != Wh.dtype:
            raise DTypeError("h", f"{Wh.dtype} like the weights", h.dtype)
        self.h = h.copy()

    def reset_state(self) -> None:
        """Make the next pass start from zero."""
        self.h = None
