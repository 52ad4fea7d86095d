"""What this process does that no request may make it do, by Python's audit events."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

HARM: Final = frozenset(
    {
        "open", "os.listdir", "os.remove", "os.rename", "os.mkdir", "os.system", "subprocess.Popen", "socket.bind",
        "pickle.find_class", "marshal.loads", "exec", "compile", "ctypes.dlopen", "shutil.copyfile", "urllib.Request",
    }
)  # fmt: skip
CONNECT: Final = "socket.connect"


class Watch:
    """Notes harmful events, and where connections go; a library that reads its own files does no harm.

    Attributes:
        harm: What was done.
        peers: The addresses that were connected to.
    """

    def __init__(self) -> None:
        """Begin when asked to; a hook can never be taken away."""
        self.harm: list[str] = []
        self.peers: set[str] = set()
        self._is_on = False
        sys.addaudithook(self._on_event)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch for as long as this lasts."""
        self.harm.clear()
        self.peers.clear()
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def _on_event(self, event: str, arguments: Any) -> None:
        if not self._is_on:
            return
        if event == CONNECT:
            self.peers.add(str(arguments[1]))
        elif event in HARM and not str(arguments[0]).startswith((sys.prefix, sys.base_prefix)):
            self.harm.append(f"{event} {arguments!r:.200}")
