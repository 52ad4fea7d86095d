"""The values that pass between rpc, domain and store.

Letters as in the engine: N rows, T steps, D inputs, H hidden units. Arrays are C-ordered and have
the model's dtype. A state is one array here, (N, state size): of each row all numbers of the network's
state side by side, as `Spec.join_rows` puts them. For the tanh layer both the state and the last output are h.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rnn_engine import Array, Grads, Moments, Network, Weights
    from rnn_engine.optimizers import Optimizer

DIGEST_BYTES = 16
NO_TOKEN = b""


# Keys and versions are hashed for each chunk, which a dataclass does in Python and a tuple in C.
class SessionKey(NamedTuple):
    """Which session: a tenant, and the session's name among the tenant's sessions."""

    tenant: str
    session_id: str


class ChunkKey(NamedTuple):
    """Which chunk of a session; it names the chunk's tape and its contribution too."""

    session: SessionKey
    epoch: int
    chunk_seq: int


class ModelKey(NamedTuple):
    """Which model: a tenant, and the model's name among the tenant's models."""

    tenant: str
    model_id: str


class ContributionKey(NamedTuple):
    """Which contribution of a model: that of one chunk. Keys sort by session, epoch and chunk.

    Attributes:
        session: 16 bytes that stand for the session; the slot of a model does not hold its name.
        epoch: The chunk's epoch.
        chunk_seq: The chunk.
    """

    session: bytes
    epoch: int
    chunk_seq: int


class RequestDigest(NamedTuple):
    """What a store remembers of a request; one with the same name and other content is refused.

    Attributes:
        name: 16 bytes that stand for the request id, or random ones without an id.
        content: 16 bytes that stand for all else that was asked for.
    """

    name: bytes
    content: bytes


class Version(NamedTuple):
    """The name of immutable weights; an empty digest in a request means any content."""

    number: int
    digest: bytes = b""

    def names(self, other: Version) -> bool:
        """Return whether this name, which may lack a digest, is that of the other version."""
        return self.number == other.number and self.digest in (b"", other.digest)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model is, apart from its weights.

    Attributes:
        model_id: Its name.
        network: Its cell and sizes; which class it is of says which cell.
        dtype: "float32" or "float64".
        optimizer: What makes its steps.
    """

    model_id: str
    network: Network
    dtype: str
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model as it stands."""

    spec: ModelSpec
    head: Version
    incarnation: str
    create_time_ms: int
    waiting_count: int
    waiting_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A version kept under a name."""

    checkpoint_id: str
    version: Version
    create_time_ms: int


class OnExists(Enum):
    """What opening does when the session is live, or is not."""

    FAIL = "fail"
    RESUME = "resume"
    RESET = "reset"
    MUST_EXIST = "must_exist"


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as it stands, without its state."""

    session_id: str
    model_id: str
    epoch: int
    chunk_seq: int
    token: bytes
    batch_size: int
    ttl_ms: int
    expire_time_ms: int
    version: Version | None


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Open, resume or reset a session; `initial_state` is (N, H) or None for zero."""

    model_id: str
    session_id: str
    batch_size: int
    initial_state: Array | None
    ttl_ms: int | None  # None: the default
    on_exists: OnExists
    request_id: str
    restored_epoch: int  # 0: a new one


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """What opening or forking gave; `state` is (N, H)."""

    session: SessionView
    state: Array
    resumed: bool
    replayed: bool


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Begin a new epoch of a live session; `state` is (N, H) or None for zero."""

    session_id: str
    state: Array | None
    expected_epoch: int  # 0: any
    expected_chunk_seq: int | None
    request_id: str
    restored_epoch: int  # 0: a new one


@dataclass(frozen=True, slots=True)
class ForkSession:
    """Open another session from this one's present state."""

    session_id: str
    new_session_id: str
    ttl_ms: int | None  # None: the source's
    request_id: str


class ReturnHs(IntEnum):
    """Which hidden states a Forward returns."""

    ALL = 1
    LAST = 2
    NONE = 3


# One of the next two is made for each chunk. A frozen dataclass takes several times as long to make, so
# these are not, though nobody changes one.
@dataclass(slots=True)
class Forward:
    """Apply one chunk, xs (N, T, D); without a session_id run it from `state`, one row for each row of xs."""

    session_id: str
    epoch: int
    chunk_seq: int
    previous_token: bytes
    xs: Array
    train: bool = False
    pinned: Version | None = None
    minimum: Version | None = None
    return_hs: ReturnHs = ReturnHs.ALL
    acknowledged_seq: int = 0
    model_id: str = ""
    state: Array | None = None


@dataclass(slots=True)
class ForwardResult:
    """A chunk applied.

    Attributes:
        outputs: (N, T, output size), (N, 1, output size) or None.
        state: The state after it, (N, state size).
    """

    session_id: str
    epoch: int
    chunk_seq: int
    outputs: Array | None
    state: Array
    version: Version
    token: bytes
    replayed: bool


@dataclass(frozen=True, slots=True)
class Backward:
    """Compute one contribution.

    Attributes:
        d_outputs: Gradient of the loss with respect to the outputs, (N, T, output size).
        d_state: Gradient that arrives at the last state from later chunks, (N, state size); None: zero.
    """

    session_id: str
    epoch: int
    chunk_seq: int
    token: bytes
    d_outputs: Array
    d_state: Array | None = None
    return_d_inputs: bool = False
    return_gradients: bool = False
    update: Update | None = None
    resent: bool = False


@dataclass(frozen=True, slots=True)
class BackwardResult:
    """The gradients of a chunk.

    Attributes:
        d_inputs: Of its inputs, (N, T, D), or None.
        d_state: Of the state before it, (N, state size).
    """

    session_id: str
    epoch: int
    chunk_seq: int
    d_inputs: Array | None
    d_state: Array
    grads: Grads | None
    gradient_norm: float
    version: Version
    replayed: bool
    update: UpdateResult | None = None


class Reduction(Enum):
    """How contributions are joined."""

    SUM = "sum"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Selector:
    """Contributions of one session: of any epoch (0), of one, or exactly these chunks of it."""

    session_id: str
    epoch: int = 0
    chunk_seqs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Update:
    """Make one optimizer step from the contributions named, or from all that wait."""

    model_id: str
    selectors: tuple[Selector, ...]
    reduction: Reduction
    learning_rate: float | None
    clip_norm: float  # 0: off
    expected: Version | None
    request_id: str


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The step made."""

    model_id: str
    version: Version
    gradient_norm: float
    clipped: bool
    contribution_count: int
    replayed: bool


@dataclass(frozen=True, slots=True)
class DiscardGradients:
    """Drop waiting contributions, and the waiting tapes of the sessions named."""

    model_id: str
    selectors: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class DiscardResult:
    """How many were dropped."""

    contribution_count: int
    tape_count: int


@dataclass(frozen=True, slots=True)
class WaitingTape:
    """A TRAIN chunk whose Backward has not come, with the token that the Backward names."""

    epoch: int
    chunk_seq: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits of one session: tapes in order of their chunks, contributions by epoch."""

    tapes: tuple[WaitingTape, ...]
    contributions: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Where a new model's weights come from: given, or drawn from the seed."""

    seed: int = 0
    given: Weights | None = field(default=None)
    moments: Moments | None = field(
        default=None
    )  # of the given ones; None: the optimizer starts anew
