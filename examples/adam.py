"""The optimizer for what a client keeps to itself; the server has its own for the recurrent layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Adam:
    """Adam (Kingma and Ba, 2015) over a list of arrays, in place.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
    p -= lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + 1e-8).
    """

    def __init__(self, params: list[Floats], beta1: float = 0.9, beta2: float = 0.999) -> None:
        self._params = params
        self._beta1, self._beta2 = beta1, beta2
        self._m = [np.zeros_like(p) for p in params]
        self._v = [np.zeros_like(p) for p in params]
        self._t = 0

    def update(self, grads: list[Floats], lr: float) -> None:
        """Make one step against grads, which have the shapes of the parameters."""
        self._t += 1
        m_scale, v_scale = 1 - self._beta1**self._t, 1 - self._beta2**self._t
        for p, g, m, v in zip(self._params, grads, self._m, self._v, strict=True):
            m[...] += (1 - self._beta1) * (g - m)
            v[...] += (1 - self._beta2) * (g * g - v)
            p[...] -= lr * (m / m_scale) / (np.sqrt(v / v_scale) + 1e-8)
