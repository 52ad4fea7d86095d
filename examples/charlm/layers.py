"""What stays on the client: the embedding below the recurrent layer, the softmax above it.

| letter | meaning |
| --- | --- |
| N, T | parallel streams, time steps of a chunk |
| D, H, V | size of an embedding, of a hidden state, of the alphabet |
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from examples.adam import Adam

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Embedding:
    """A table with one row of D numbers for each of V characters, learned with the rest."""

    def __init__(self, rng: np.random.Generator, V: int, D: int) -> None:
        self.table = rng.normal(0.0, 0.5, (V, D)).astype(np.float32)
        self._optimizer = Adam([self.table])

    def forward(self, ids: Ids) -> Floats:
        """Look characters up: (N, T) to (N, T, D)."""
        return self.table[ids]

    def learn(self, ids: Ids, dxs: Floats, lr: float) -> None:
        """Make a step, given the gradient dxs (N, T, D) of what forward returned for ids."""
        gradient = np.zeros_like(self.table)
        np.add.at(gradient, ids.ravel(), dxs.reshape(ids.size, -1))
        self._optimizer.update([gradient], lr)


class SoftmaxHead:
    """An affine map from H hidden units to V scores, and the cross-entropy of their softmax."""

    def __init__(self, rng: np.random.Generator, H: int, V: int) -> None:
        self.W = (rng.normal(0.0, 1.0, (H, V)) / np.sqrt(H)).astype(np.float32)
        self.b = np.zeros(V, np.float32)
        self._optimizer = Adam([self.W, self.b])

    def log_probabilities(self, hs: Floats) -> Floats:
        """Return the logarithm of each next character's probability: (N, T, H) to (N*T, V)."""
        scores: Floats = hs.reshape(-1, hs.shape[-1]) @ self.W + self.b
        scores -= scores.max(axis=1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return scores

    def loss(self, hs: Floats, targets: Ids) -> float:
        """Return the mean cross-entropy, in nats a character, of hs (N, T, H) for targets (N, T)."""
        log_p = self.log_probabilities(hs)
        return float(-log_p[np.arange(targets.size), targets.ravel()].mean())

    def learn(self, hs: Floats, targets: Ids, lr: float) -> tuple[float, Floats]:
        """Make a step and return the loss with its gradient for the layer below.

        Args:
            hs: Hidden states, shape (N, T, H).
            targets: The characters that really followed, shape (N, T).
            lr: Learning rate.

        Returns:
            The mean cross-entropy in nats a character, and dhs of shape (N, T, H).
        """
        rows = np.arange(targets.size)
        log_p = self.log_probabilities(hs)
        loss = float(-log_p[rows, targets.ravel()].mean())
        dscores = np.exp(log_p)
        dscores[rows, targets.ravel()] -= 1
        dscores /= targets.size
        dhs = (dscores @ self.W.T).reshape(hs.shape)
        self._optimizer.update([hs.reshape(-1, hs.shape[-1]).T @ dscores, dscores.sum(axis=0)], lr)
        return loss, dhs
