"""The output of a run: a picture and a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from examples.charlm.training import History

SMOOTHING_STEPS = 50


def draw_loss(history: History, path: Path) -> None:
    """Write the loss curve with the restart marked, as a PNG.

    Args:
        history: The training.
        path: Where to; its folder exists.
    """
    figure, axes = plt.subplots(figsize=(8, 4), dpi=110, layout="constrained")
    steps = np.arange(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color="#9db8d2", linewidth=0.6, label="each step")
    window = min(SMOOTHING_STEPS, len(steps))
    smooth = np.convolve(history.losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color="#1f4e79", label=f"mean of {window}")
    axes.axvline(history.crash_step, color="#c0392b", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"kill -9, back after {history.down_s:.1f} s",
        (history.crash_step, 0.72),
        xycoords=("data", "axes fraction"),
        xytext=(8, 0),
        textcoords="offset points",
        color="#c0392b",
    )
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy, nats a character")
    axes.set_title("A language model learns through a server that is killed half way")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return the rows as two aligned columns."""
    lines = list(rows)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines)
