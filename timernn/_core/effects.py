"""What the core asks of the outside world, and the two ports that carry it out."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from timernn._core.contract import Rpc
    from timernn._core.credentials import Credentials

R = TypeVar("R")
Headers: TypeAlias = "tuple[tuple[str, str], ...]"
"""What goes along with one call beside the client's own metadata."""


@dataclass(frozen=True, slots=True)
class RpcCall:
    """Send one request, wait for one response; an `Error` is thrown in when it fails."""

    rpc: Rpc[Any, Any]
    request: Any
    address: int
    timeout_s: float
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Download:
    """Send one request, wait for all its responses, as a list."""

    rpc: Rpc[Any, Any]
    request: Any
    address: int
    timeout_s: float
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Upload:
    """Send several requests, wait for one response."""

    rpc: Rpc[Any, Any]
    requests: Sequence[Any]
    address: int
    timeout_s: float
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Begin a bidirectional call that may last for the given time; its outcome is a `StreamHandle`."""

    rpc: Rpc[Any, Any]
    address: int
    timeout_s: float
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Write:
    """Send a message on a stream."""

    stream: StreamHandle
    message: Any


@dataclass(frozen=True, slots=True)
class Read:
    """Wait for a stream's next message; None at its end; an `Error` is thrown in when it breaks."""

    stream: StreamHandle


@dataclass(frozen=True, slots=True)
class Pull:
    """Take the caller's next item: `END` when there is none, `NOT_YET` when none is ready.

    Without `block` it may still wait where the source is an iterator that cannot be asked.
    """

    source: Any
    block: bool


@dataclass(frozen=True, slots=True)
class AskToken:
    """Ask the caller's callable for a token, unless another call has done so meanwhile."""

    credentials: Credentials


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class InTurn:
    """Carry out an operation while no other call holds the lock; its outcome is the operation's."""

    lock: Any
    op: Op[Any]


class StreamHandle(Protocol):
    """An open bidirectional call."""

    def close(self) -> None:
        """Cancel the call; never waits, may be repeated."""


class Mark(Generic[R]):
    """A value that no item of the caller can be."""


END: Mark[Any] = Mark()
NOT_YET: Mark[Any] = Mark()

Effect = RpcCall | Download | Upload | OpenStream | Write | Read | Pull | AskToken | Sleep | InTurn
Op: TypeAlias = Generator[Effect, Any, R]
"""A piece of the client's logic that ends in an R."""
