"""What the client library hands out: plain immutable values, no protobuf messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta

    from timernn.optimizers import Optimizer

Array = npt.NDArray[Any]
ReturnHs = Literal["all", "last", "none"]
Reduction = Literal["sum", "mean"]
OnExists = Literal["resume", "fail", "reset", "must_exist"]


@dataclass(frozen=True, slots=True, order=True, repr=False)
class Version:
    """The name of an immutable set of weights.

    Attributes:
        number: Counts the model's steps from 1.
        digest: 16 bytes that stand for the content; empty means any content of this number.
    """

    number: int
    digest: bytes = b""

    def __str__(self) -> str:
        return f"{self.number}-{self.digest.hex()[:12]}" if self.digest else str(self.number)

    def __repr__(self) -> str:
        digest = f", bytes.fromhex({self.digest.hex()!r})" if self.digest else ""
        return f"Version({self.number}{digest})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Weights:
    """One weights version.

    Attributes:
        Wx: Input weights, shape (D, H).
        Wh: Recurrent weights, shape (H, H).
        b: Bias, shape (H,).
        version: Which version this is.
        moments: The optimizer's state by tensor name; empty unless asked for.
    """

    Wx: Array
    Wh: Array
    b: Array
    version: Version
    moments: Mapping[str, Array]

    def __repr__(self) -> str:
        arrays = {"Wx": self.Wx, "Wh": self.Wh, "b": self.b, **self.moments}
        return f"<Weights {self.version}: {_shapes(arrays)}>"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Gradients:
    """Gradients of the weights.

    Attributes:
        dWx: Shape (D, H).
        dWh: Shape (H, H).
        db: Shape (H,).
    """

    dWx: Array  # noqa: N815  # the field's letters
    dWh: Array  # noqa: N815
    db: Array

    @property
    def norm(self) -> float:
        """The global norm over all three."""
        return float(np.sqrt(sum(float(np.vdot(g, g)) for g in (self.dWx, self.dWh, self.db))))

    def __repr__(self) -> str:
        return f"<Gradients: {_shapes({'dWx': self.dWx, 'dWh': self.dWh, 'db': self.db})}>"


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step to make in the same call as a Backward.

    Attributes:
        lr: Learning rate of this step only; None: the optimizer's.
        clip_norm: Scale the joined gradient down to this global norm; 0: off.
        reduction: How contributions are joined.
    """

    lr: float | None = None
    clip_norm: float = 0.0
    reduction: Reduction = "sum"


@dataclass(frozen=True, slots=True)
class Contributions:
    """Names waiting contributions of one session.

    Attributes:
        session_id: The session.
        epoch: Only those of this epoch; 0: of any.
        chunk_seqs: With an epoch, exactly these chunks; empty: what waits.
    """

    session_id: str
    epoch: int = 0
    chunk_seqs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits of one chunk of a session on the server.

    Attributes:
        epoch: The chunk's epoch.
        chunk_seq: The chunk's number.
        kind: "tape": its forward was applied, and its backward is to come; "contribution": its
            backward was recorded, and its update is to come.
        token: Of a tape, 16 bytes that stand for the session's history up to this chunk.
    """

    epoch: int
    chunk_seq: int
    kind: Literal["tape", "contribution"]
    token: bytes = b""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an optimizer step did.

    Attributes:
        version: The model's new head.
        gradient_norm: Global norm of the joined gradient before clipping.
        clipped: Whether it was scaled down.
        contribution_count: Contributions taken.
    """

    version: Version
    gradient_norm: float
    clipped: bool
    contribution_count: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """What `discard_gradients` dropped.

    Attributes:
        contribution_count: Waiting contributions dropped.
        tape_count: Tapes dropped that waited for their Backward.
    """

    contribution_count: int
    tape_count: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as it stands.

    Attributes:
        model_id: Its name.
        input_size: D.
        hidden_size: H.
        dtype: Element type of weights, states and chunks.
        optimizer: What Update applies, defaults filled in.
        head: The version that Forward uses.
        incarnation: Distinguishes it from an earlier model of the same name, which was deleted.
        create_time: When it was created, UTC.
        waiting_contribution_count: Contributions that wait for an Update.
        waiting_contribution_bytes: Their size.
    """

    model_id: str
    input_size: int
    hidden_size: int
    dtype: Literal["float32", "float64"]
    optimizer: Optimizer
    head: Version
    incarnation: str
    create_time: datetime
    waiting_contribution_count: int
    waiting_contribution_bytes: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as it stands on the server.

    Attributes:
        session_id: Its name.
        model_id: The model it runs.
        epoch: Grows at each reset_state and set_state.
        chunk_seq: The last chunk applied in this epoch.
        state_token: 16 bytes that stand for the epoch's history so far.
        batch_size: N.
        ttl: Time to live after each successful operation.
        expire_time: When it expires if nothing more happens, UTC.
        version: What the last chunk used; None before the first.
    """

    session_id: str
    model_id: str
    epoch: int
    chunk_seq: int
    state_token: bytes
    batch_size: int
    ttl: timedelta
    expire_time: datetime
    version: Version | None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A weights version that is kept under a name.

    Attributes:
        checkpoint_id: The name.
        version: What it keeps.
        create_time: When it was made, UTC.
    """

    checkpoint_id: str
    version: Version
    create_time: datetime


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's description of itself.

    Attributes:
        server_version: Version of the server.
        replica_id: Names the process; another after each start.
        start_time: When it began to serve, UTC.
        durability: How answers are made durable.
        limits: The bounds in force by their name in the contract: ints, and timedeltas for spans.
        server_time: Its clock when it answered, UTC; None of a server that does not say.
    """

    server_version: str
    replica_id: str
    start_time: datetime
    durability: str
    limits: Mapping[str, int | timedelta]
    server_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Ping:
    """A server's answer to a health check.

    Attributes:
        serving: Whether it is ready for calls.
        latency_s: From the call to the answer, in seconds.
        address: Who answered.
    """

    serving: bool
    latency_s: float
    address: str


def _shapes(arrays: Mapping[str, Array]) -> str:
    """Write arrays by name, shape and type: their numbers would fill a screen."""
    return ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in arrays.items())
