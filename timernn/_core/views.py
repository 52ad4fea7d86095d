"""What both kinds of session show without a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timernn._core.session import SessionCore
    from timernn.types import Array, Gradients, UpdateResult, Version


class SessionView:
    """A session's numbers and last results, as of the last answer."""

    _core: SessionCore

    @property
    def session_id(self) -> str:
        """The session's name."""
        return self._core.state.session_id

    @property
    def model_id(self) -> str:
        """The model it runs."""
        return self._core.state.model.model_id

    @property
    def batch_size(self) -> int:
        """The number N of batch rows."""
        return self._core.state.batch_size

    @property
    def epoch(self) -> int:
        """Grows at each reset_state and set_state."""
        return self._core.state.epoch

    @property
    def chunk_seq(self) -> int:
        """The last chunk answered in this epoch."""
        return self._core.state.chunk_seq

    @property
    def resumed(self) -> bool:
        """Whether opening it went on with a live session; False: it began anew."""
        return self._core.state.resumed

    @property
    def version(self) -> Version | None:
        """The weights version that the last forward used or the last update made."""
        return self._core.state.version

    @property
    def h(self) -> Array:
        """The hidden state as of the last answer, shape (N, H); no call is made."""
        return self._core.state.h

    @property
    def dh(self) -> Array | None:
        """The gradient of the state before the last backward's chunk, shape (N, H)."""
        return self._core.state.dh

    @property
    def gradients(self) -> Gradients | None:
        """The weights' gradients of the last backward, if it asked for them."""
        return self._core.state.gradients

    @property
    def gradient_norm(self) -> float | None:
        """The global norm of the weights' gradients of the last backward.

        None before the first, and after one that was split along T and did not ask for them.
        """
        return self._core.state.gradient_norm

    @property
    def last_update(self) -> UpdateResult | None:
        """What the last step over this session did."""
        return self._core.state.last_update

    @property
    def in_doubt(self) -> bool:
        """Whether the outcome of the last call is unknown; the next call finds out first."""
        return self._core.doubts.is_any

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.session_id!r} of {self.model_id!r}: "
            f"epoch {self.epoch}, chunk {self.chunk_seq}>"
        )
