"""The message for a command that needs a package which a client's installation does not have."""

from __future__ import annotations

from typing import Final

_OWN: Final = ("rnn_engine", "service", "timernn")


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Return the line that says how to install a missing package; None if a module of ours is missing."""
    package = (error.name or "").partition(".")[0]
    if not package or package in _OWN:
        return None
    return f"the command needs the package {package}: pip install 'timernn[server]'"
