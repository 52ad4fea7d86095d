"""What the loops know of a server: how a chunk is sent, and how an answer is read.

There is one adapter per server. All use the raw stubs, with no client library in between, and build each
request again, as a client with new data would.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
import numpy as np

from benchmarks.load.workload import Array, Sizes, make_chunk

MAX_MESSAGE_BYTES = 64 << 20
# In place of a session's index, where answers come in order.
ANY_SESSION = -1
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Channels of one process to one address share a connection otherwise, and with it a worker.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(slots=True)
class Session:
    """One sequence as its client sees it.

    Attributes:
        session_id: Its name on the server.
        index: Its place among the sessions of this process, used as the tag on a stream.
        epoch: Of the session, where the server has epochs.
        seq: Number of the last chunk sent.
        acknowledged_seq: Number of the last chunk answered.
        token: State token of the last answer, where the server has tokens.
    """

    session_id: str
    index: int
    epoch: int = 0
    seq: int = 0
    acknowledged_seq: int = 0
    token: bytes = b""


@dataclass(frozen=True)
class Login:
    """How a client gets in.

    Attributes:
        authority: PEM of who signed the server's certificate; empty: plaintext.
        token: For each call; empty: none.
    """

    authority: bytes = b""
    token: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what each call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


class Adapter(ABC):
    """How one server is called.

    Attributes:
        ordered_stream: Whether one stream carries one answer a message, in the order of the requests;
            otherwise the loop asks `parts` for the answers in a message and whose each is.
        has_state: Whether the server computes; False for the echo.
        sizes: Of each chunk.
        payload: The bytes of xs (T, D), float32, that each request carries.
    """

    ordered_stream: ClassVar[bool] = True
    has_state: ClassVar[bool] = True

    def __init__(self, sizes: Sizes) -> None:
        """Prepare the payload."""
        self.sizes = sizes
        self.payload = make_chunk(sizes).tobytes()

    @abstractmethod
    async def close(self) -> None:
        """Give the connection back."""

    async def open(self, prefix: str, count: int) -> list[Session]:
        """Make sessions; a server that needs no opening is asked nothing."""
        return [Session(f"{prefix}-{index}", index) for index in range(count)]

    @abstractmethod
    async def unary(self, session: Session) -> Any:
        """Send the session's next chunk as a unary call."""

    def open_stream(self) -> Any:
        """Begin a bidirectional stream: an object with write, read and done_writing."""
        raise NotImplementedError(f"{type(self).__name__} has no stream")

    def stream_request(self, session: Session) -> Any:
        """Make the message that carries the session's next chunk."""
        raise NotImplementedError(f"{type(self).__name__} has no stream")

    @abstractmethod
    def outputs(self, answer: Any) -> bytes:
        """Return hs (T, H), float32, of an answer, as bytes; raise where it is an error."""

    def accept(self, session: Session, answer: Any) -> None:
        """Take note of an answer and check that it is one.

        Raises:
            ValueError: If the answer is not hs of the expected size.
        """
        del session
        size = len(self.outputs(answer))
        if size != self.sizes.answer_bytes:
            raise ValueError(f"expected an answer of {self.sizes.answer_bytes} bytes, got {size}")

    def parts(self, message: Any) -> Sequence[tuple[int, Any]]:
        """Split a message into answers, each with its session's index."""
        return [(ANY_SESSION, message)]

    def frame_request(self, sessions: Sequence[Session]) -> Any:
        """Make one stream message that carries a chunk of each session, where the server can."""
        raise NotImplementedError(f"{type(self).__name__} has no frames")

    def output_array(self, answer: Any) -> Array:
        """Return hs of shape (T, H)."""
        return np.frombuffer(self.outputs(answer), np.float32).reshape(-1, self.sizes.hidden)


class GrpcAdapter(Adapter):
    """An adapter with a channel of its own."""

    def __init__(self, target: str, sizes: Sizes, authority: bytes = b"") -> None:
        """Open the channel; with an authority over TLS."""
        super().__init__(sizes)
        if authority:
            trust = grpc.ssl_channel_credentials(authority)
            self.channel = grpc.aio.secure_channel(target, trust, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()
