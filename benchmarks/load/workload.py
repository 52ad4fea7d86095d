"""What is asked of every server: the sizes, the weights, the inputs, and what the answers must be."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SEED = 20


@dataclass(frozen=True)
class Sizes:
    """The sizes of one chunk of one sequence (N = 1).

    Attributes:
        steps: T, time steps a chunk.
        inputs: D, input size.
        hidden: H, hidden size.
    """

    steps: int = 16
    inputs: int = 32
    hidden: int = 64

    @property
    def request_bytes(self) -> int:
        """Size of xs (T, D) as float32, bytes."""
        return 4 * self.steps * self.inputs

    @property
    def answer_bytes(self) -> int:
        """Size of hs (T, H) as float32, bytes."""
        return 4 * self.steps * self.hidden

    def __str__(self) -> str:
        """Name the sizes as the tables do."""
        return f"T{self.steps} D{self.inputs} H{self.hidden}"


SMALL = Sizes()
COMPUTE_BOUND = Sizes(steps=64, inputs=256, hidden=1024)


def make_weights(sizes: Sizes) -> dict[str, Array]:
    """Draw the weights that every server gets.

    Returns:
        Wx (D, H), Wh (H, H) and b (H,), float32, small enough that tanh does not saturate.
    """
    rng = np.random.default_rng(SEED)
    d, h = sizes.inputs, sizes.hidden
    return {
        "Wx": (rng.standard_normal((d, h)) / np.sqrt(d)).astype(np.float32),
        "Wh": (rng.standard_normal((h, h)) / np.sqrt(h)).astype(np.float32),
        "b": (0.1 * rng.standard_normal(h)).astype(np.float32),
    }


def save_weights(sizes: Sizes, folder: Path) -> Path:
    """Write the weights where a peer's process can read them.

    Returns:
        The path of an npz file.
    """
    path = folder / f"weights-{sizes.steps}-{sizes.inputs}-{sizes.hidden}.npz"
    # The stubs of savez know no keyword but its own.
    np.savez(path, **make_weights(sizes))  # type: ignore[arg-type]
    return path


def make_chunk(sizes: Sizes) -> Array:
    """Draw the chunk that every client sends.

    Returns:
        xs of shape (T, D), float32.
    """
    rng = np.random.default_rng(SEED + 1)
    return rng.standard_normal((sizes.steps, sizes.inputs)).astype(np.float32)


def expected_outputs(sizes: Sizes, chunk_count: int) -> list[Array]:
    """Compute what a server must answer to the same chunk sent again and again.

    Plain NumPy in float64, so that it favours no server's rounding.

    Returns:
        For each chunk hs of shape (T, H), float32.
    """
    weights = {name: value.astype(np.float64) for name, value in make_weights(sizes).items()}
    xs = make_chunk(sizes).astype(np.float64)
    h = np.zeros(sizes.hidden)
    answers = []
    for _ in range(chunk_count):
        hs = []
        for x in xs:
            h = np.tanh(x @ weights["Wx"] + h @ weights["Wh"] + weights["b"])
            hs.append(h)
        answers.append(np.array(hs, dtype=np.float32))
    return answers
