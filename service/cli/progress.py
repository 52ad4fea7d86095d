"""A bar on stderr for what takes a while; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show that something is running, and for how long.

    Args:
        what: What runs.
        total: The number of its steps; None where that is not known.

    Yields:
        A function that is called before each step with what it is.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    # Rich comes with Typer. Only here: it takes longer to import than most commands take to run.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        began = iter([0])

        def step(description: str) -> None:
            # The first step completes none before it.
            progress.update(task, description=description, advance=next(began, 1))

        yield step
