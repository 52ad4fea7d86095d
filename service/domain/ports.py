"""The ports through which the domain uses a store, and the values that pass through them.

How a value is laid out as bytes is the store's affair. Each method reads or decides atomically, in one
hash slot. Of a store's own failures a method raises these alone: ResourceExhausted (STORE_FULL),
Unavailable (STORE_DOWN) and UnsupportedLayout where nothing was decided, and Unavailable
(UNKNOWN_OUTCOME) where it is not known whether something was. A store that takes no writes still decides
what needs none: it answers replays, and refuses what is late, fenced or another writer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.domain.blob import Blob
    from service.domain.types import (
        Checkpoint,
        ChunkKey,
        ContributionKey,
        ModelKey,
        RequestDigest,
        Selector,
        SessionKey,
        Version,
        WaitingTape,
    )

Bytes = bytes | memoryview


@dataclass(slots=True)  # not frozen: one is made for each chunk
class StoredState:
    """A state that the ring holds: what made it, and its rows as bytes."""

    chunk_seq: int
    digest: bytes
    token: bytes
    version: Version
    state: bytes


@dataclass(frozen=True, slots=True)
class SessionHead:
    """The numbers of a session's record."""

    model_id: str
    incarnation: bytes
    dtype: str
    batch_size: int
    epoch: int
    chunk_seq: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class SessionSnapshot:
    """A snapshot of a session; `before` and `at` are the states around the chunk that was asked for."""

    head: SessionHead
    expire_time_ms: int
    last: StoredState
    before: StoredState | None = None
    at: StoredState | None = None


class Absence(Enum):
    """Why a session is not there."""

    NEVER = "SESSION_NOT_FOUND"
    EXPIRED = "SESSION_EXPIRED"
    CLOSED = "SESSION_CLOSED"


@dataclass(frozen=True, slots=True)
class AbsentSession:
    """A session that is not there, its last epoch, and when it had expired at the latest (0: unknown)."""

    why: Absence
    epoch: int = 0
    expired_at_ms: int = 0


class EpochMode(Enum):
    """What beginning an epoch does with a session that is live, or is not.

    All but LIVE are the OnExists of an Open. LIVE gives a live session its next epoch.
    """

    FAIL = "fail"
    RESUME = "resume"
    RESET = "reset"
    MUST_EXIST = "must_exist"
    LIVE = "live"


class EpochOutcome(Enum):
    """What came of beginning an epoch."""

    BEGUN = "BEGUN"
    REPLAYED = "REPLAYED"  # this request began it before
    REUSED = "REUSED"  # the request id was used before, for other content
    RESUMED = "RESUMED"
    EXISTS = "EXISTS"
    FENCED = "FENCED"  # the epoch is not the expected one
    GAP = "GAP"  # the last chunk is not the expected one


@dataclass(frozen=True, slots=True)
class EpochStart:
    """An epoch to begin.

    Attributes:
        mode: What to do with a session that is live, or is not.
        head: What the session is like; its epoch and chunk_seq are not used.
        first: The state before the first chunk.
        request: The request that begins it.
        expected_epoch: The epoch that LIVE may replace; 0 if it may be any.
        expected_chunk_seq: The last chunk of that epoch; None if it may be any.
        restored_epoch: The number that the client knows as the session's last epoch, to begin it again
            after the store has lost it; 0 if the number is the store's to choose.
    """

    mode: EpochMode
    head: SessionHead
    first: StoredState
    request: RequestDigest
    expected_epoch: int = 0
    expected_chunk_seq: int | None = None
    restored_epoch: int = 0


@dataclass(frozen=True, slots=True)
class EpochDecision:
    """What the store decided about the beginning of an epoch.

    Attributes:
        outcome: What came of it.
        epoch: The epoch in force, or the last one of a session that is not live; 0 with GAP.
        chunk_seq: With GAP the last chunk of the epoch in force, else 0.
    """

    outcome: EpochOutcome
    epoch: int = 0
    chunk_seq: int = 0


class CloseOutcome(Enum):
    """What came of closing a session that was live."""

    CLOSED = "CLOSED"
    FENCED = "FENCED"  # the epoch is not the expected one


@dataclass(frozen=True, slots=True)
class CloseDecision:
    """What came of closing a live session, and its epoch."""

    outcome: CloseOutcome
    epoch: int


class ChunkOutcome(Enum):
    """What came of a chunk's commit."""

    OK = "OK"
    TOUCH = "TOUCH"  # OK, and the session's entry in the tenant's list has to be extended
    STALE = "STALE"
    QUOTA = "QUOTA"  # of the session
    TENANT_QUOTA = "TENANT_QUOTA"  # bytes of all tapes of the tenant


@dataclass(slots=True)  # not frozen: one is made for each chunk
class ChunkCommit:
    """A chunk to apply to the state that `base_token` names; `tape` only for a TRAIN chunk."""

    key: SessionKey
    epoch: int
    base_token: bytes
    state: StoredState
    acknowledged_seq: int
    tape: bytes | None = None
    ttl_ms: int = 0  # of the session; its tape is kept no longer


@dataclass(frozen=True, slots=True)
class TapeSnapshot:
    """A tape, or only its first byte, with where its session stands; without a tape the token is empty."""

    session: SessionHead | AbsentSession
    token: bytes
    data: bytes | None
    expires_ms: int  # by the store's clock; 0 without a tape


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model's record; `spec` is the stored form of its specification, whose layout governs the rest."""

    incarnation: bytes
    spec: bytes
    head: Version
    create_time_ms: int
    waiting_bytes: int
    waiting_count: int


@dataclass(frozen=True, slots=True)
class NewVersion:
    """Weights and moments to be written under a version's name."""

    version: Version
    weights: Blob
    moments: Blob


class WaitingContribution(NamedTuple):
    """A contribution that waits for an Update, and 16 bytes that stand for what it was computed from."""

    key: ContributionKey
    digest: bytes


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """What a step answers, and what is remembered of it with its request.

    Attributes:
        version: The version that the step made.
        gradient_norm: The norm of the joined gradient, before clipping.
        clipped: Whether the gradient was clipped.
        contribution_count: How many contributions it took.
        replayed: Whether an earlier try of the request made the step; the store does not keep this.
    """

    version: Version
    gradient_norm: float
    clipped: bool
    contribution_count: int
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is remembered of a request id.

    Attributes:
        content: 16 bytes that stand for the content of its request.
        answer: What a step answered; None if the request created the model.
    """

    content: bytes
    answer: StepAnswer | None


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model to create: its incarnation, the stored form of its specification, its first version."""

    incarnation: bytes
    spec: bytes
    first: NewVersion
    request: RequestDigest


@dataclass(frozen=True, slots=True)
class UpdateInputs:
    """What a step starts from, as one atomic read found it.

    Attributes:
        incarnation: The incarnation of the model.
        spec: The stored form of its specification.
        head: The version in force.
        remembered: What is remembered of the request id; None if nothing.
        waiting: The contributions that wait and that were asked for, sorted.
    """

    incarnation: bytes
    spec: bytes
    head: Version
    remembered: Remembered | None
    waiting: tuple[WaitingContribution, ...]


@dataclass(frozen=True, slots=True)
class Publication:
    """A new head made from an older one and from contributions, which it consumes."""

    incarnation: bytes
    base: Version
    new: NewVersion
    request: RequestDigest
    answer: StepAnswer
    contributions: Sequence[ContributionKey] = ()


class PublishOutcome(Enum):
    """What came of a head's publication."""

    PUBLISHED = "PUBLISHED"
    REPLAYED = "REPLAYED"
    REUSED = "REUSED"
    STALE = "STALE"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class Contribution:
    """A gradient to record.

    It is recorded only before its tape expires. Its key is remembered for as long again after that, so
    that a second recording is always recognized.

    Attributes:
        incarnation: The incarnation of the model.
        key: Which contribution it is.
        digest: 16 bytes that stand for what it was computed from.
        gradient: The gradient as the store keeps it.
        tape_expires_ms: When the tape expires, by the store's clock.
    """

    incarnation: bytes
    key: ContributionKey
    digest: bytes
    gradient: Blob
    tape_expires_ms: int

    @property
    def waiting(self) -> WaitingContribution:
        """The contribution as a read finds it while it waits."""
        return WaitingContribution(self.key, self.digest)


class RecordOutcome(Enum):
    """The outcome of recording a contribution."""

    RECORDED = "RECORDED"
    REPLAYED = "REPLAYED"  # recorded before, and it waits
    CONSUMED = "CONSUMED"  # recorded before, and it waits no more
    REUSED = "REUSED"
    GONE = "GONE"
    EXPIRED = "EXPIRED"  # its tape, meanwhile
    QUOTA = "QUOTA"  # of the model
    TENANT_QUOTA = "TENANT_QUOTA"  # bytes of all gradients of the tenant
    FULL = "FULL"


class ContributionState(Enum):
    """What has become of a contribution that was recorded."""

    WAITING = "WAITING"
    CONSUMED = "CONSUMED"  # an Update took it, or it was discarded


class CreateOutcome(Enum):
    """What came of a model's creation."""

    CREATED = "CREATED"
    REPLAYED = "REPLAYED"
    EXISTS = "EXISTS"
    REUSED = "REUSED"
    STALE = "STALE"
    QUOTA = "QUOTA"


class CheckpointOutcome(Enum):
    """What came of a checkpoint's creation."""

    CREATED = "CREATED"
    KNOWN = "KNOWN"
    EXISTS = "EXISTS"
    VERSION_GONE = "VERSION_GONE"
    FORKED = "FORKED"
    QUOTA = "QUOTA"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class ReplicaBeat:
    """What a replica said of itself last.

    Attributes:
        replica_id: Its name.
        age_ms: How long ago.
        figures: What it said; None if it is of a release that says it in another form.
    """

    replica_id: str
    age_ms: int
    figures: Mapping[str, Any] | None


class SessionStore(Protocol):
    """Sessions, their tapes, and each tenant's list of them."""

    async def read_session(
        self, key: SessionKey, chunk_seq: int = 0
    ) -> SessionSnapshot | AbsentSession:
        """Read a session, with the states around a chunk when one is named."""

    async def begin_epoch(
        self, key: SessionKey, start: EpochStart
    ) -> EpochDecision | AbsentSession:
        """Begin an epoch; AbsentSession if the mode needs a live session and there is none."""

    def queue_of(self, commit: ChunkCommit) -> object:
        """Return what a commit shares with those that it should share a round trip with."""

    async def commit_chunks(self, commits: Sequence[ChunkCommit]) -> list[ChunkOutcome | Exception]:
        """Apply chunks of different sessions, each by itself, in one round trip."""

    async def extend_session(self, key: SessionKey, epoch: int) -> ChunkOutcome:
        """Let the time to live start again; STALE when the epoch is not there any more."""

    async def close_session(
        self, key: SessionKey, expected_epoch: int
    ) -> CloseDecision | AbsentSession:
        """End a session, unless an epoch is expected (not 0) and it has another."""

    async def read_tape(self, chunk: ChunkKey, *, with_data: bool = True) -> TapeSnapshot:
        """Read one tape, or only its first byte, with where its session stands."""

    async def mark_tape_consumed(self, chunk: ChunkKey, token: bytes) -> None:
        """Note that the contribution of a tape was recorded, so that it does not count as waiting."""

    async def discard_tapes(self, key: SessionKey, epoch: int, chunk_seqs: Sequence[int]) -> int:
        """Drop tapes that wait for their Backward; epoch 0: any, no chunks: all."""

    async def list_tapes(
        self, key: SessionKey
    ) -> tuple[SessionHead | AbsentSession, list[WaitingTape]]:
        """Read which tapes wait for their Backward, in order, with where the session stands."""

    async def reserve_session(self, key: SessionKey, ttl_ms: int) -> int | None:
        """List a session among its tenant's; return the end of its entry in ms, None if the list is full."""

    async def find_listing(self, key: SessionKey) -> int | None:
        """Return the end in ms of a session's entry in the tenant's list; None if it is not listed."""

    async def release_listing(
        self, key: SessionKey, listed_end: int, live: SessionSnapshot | None
    ) -> None:
        """Remove a session's entry if its end is still the one given; a live session gets its own end back."""

    async def touch_session(self, key: SessionKey, ttl_ms: int) -> None:
        """Move the end of a session's entry in the tenant's list to what a chunk has made it."""

    async def count_sessions(self, tenant: str) -> int:
        """Return the length of the tenant's list, entries whose session has just ended included."""

    async def list_sessions(
        self, tenant: str, after: tuple[str, str] | None, page_size: int
    ) -> list[tuple[str, str]]:
        """Read a page of (session_id, position) of the tenant's list."""


class ModelStore(Protocol):
    """Models, their versions, contributions, checkpoints and remembered requests."""

    async def create_model(
        self,
        key: ModelKey,
        new: NewModel,
    ) -> CreateOutcome:
        """Create a model with its first version."""

    async def read_model(self, key: ModelKey) -> ModelRecord | None:
        """Read a model's record."""

    async def list_models(self, tenant: str, after: str, page_size: int) -> list[str]:
        """Read a page of model names, sorted, after the one named."""

    async def delete_model(self, key: ModelKey, incarnation: bytes) -> bool:
        """Delete a model with everything in its slot."""

    async def find_version(self, key: ModelKey, number: int) -> Version | None:
        """Return the version stored under a number."""

    async def find_versions(self, key: ModelKey, numbers: Sequence[int]) -> list[Version]:
        """Return those of the versions of these numbers that are kept, in this order."""

    async def read_weights(
        self, key: ModelKey, incarnation: bytes, version: Version
    ) -> Bytes | None:
        """Read a version's weights."""

    async def read_moments(
        self, key: ModelKey, incarnation: bytes, version: Version
    ) -> Bytes | None:
        """Read a version's moments."""

    async def record_contribution(self, key: ModelKey, contribution: Contribution) -> RecordOutcome:
        """Record a contribution once."""

    async def record_and_read(
        self,
        key: ModelKey,
        contribution: Contribution,
        *,
        request: RequestDigest,
        selectors: Sequence[Selector],
    ) -> tuple[RecordOutcome, UpdateInputs | Exception | None]:
        """Record a contribution once and read the inputs of a step, in one round trip.

        If one of the two had to be sent again, the inputs may have been read before the contribution was
        recorded. If only the read fails, its error takes the place of the inputs.
        """

    async def find_contribution(
        self, key: ModelKey, contribution: ContributionKey
    ) -> ContributionState | None:
        """Return what has become of a contribution; None if it was never recorded."""

    async def read_update_inputs(
        self, key: ModelKey, request: RequestDigest | None, selectors: Sequence[Selector] | None
    ) -> UpdateInputs | None:
        """Read what a step starts from, in one atomic read.

        Args:
            key: The model.
            request: The request that may be remembered; None if there is none.
            selectors: The contributions to list: () for all that wait, None for none.
        """

    async def read_gradients(
        self, key: ModelKey, waiting: Sequence[WaitingContribution], size: int
    ) -> Sequence[Bytes] | None:
        """Read the gradients of waiting contributions, `size` bytes each; None when one has gone."""

    async def publish_version(
        self, key: ModelKey, publication: Publication
    ) -> tuple[PublishOutcome, StepAnswer | None]:
        """Write a version and make it the head; REPLAYED comes with the remembered answer."""

    async def discard_contributions(
        self, key: ModelKey, incarnation: bytes, selectors: Sequence[Selector]
    ) -> int | None:
        """Drop waiting contributions, without selectors all; None when the model has gone."""

    async def create_checkpoint(
        self,
        key: ModelKey,
        incarnation: bytes,
        checkpoint_id: str,
        *,
        version: Version | None,
    ) -> tuple[CheckpointOutcome, Checkpoint | None]:
        """Keep a version under a name; None for the head."""

    async def list_checkpoints(self, key: ModelKey) -> list[Checkpoint]:
        """Read a model's checkpoints, sorted by name."""

    async def delete_checkpoint(
        self, key: ModelKey, incarnation: bytes, checkpoint_id: str
    ) -> bool:
        """Take a checkpoint's name away."""


class ReplicaStore(Protocol):
    """The replicas that run: each says so again and again, or is forgotten."""

    async def beat(self, replica_id: str, figures: Mapping[str, Any], secret: bytes) -> bytes:
        """Note that a replica runs; return the secret that all of them share.

        Args:
            replica_id: Its name.
            figures: What it says of itself, made of what JSON knows.
            secret: Becomes the shared one if there is none.
        """

    async def list_replicas(self) -> list[ReplicaBeat]:
        """Read who has beaten lately, by name."""

    async def count_ended_logins(self, token_id: str) -> int:
        """Return how often the logins of a token on the page were ended."""

    async def end_logins(self, token_id: str, ended_before: int, ttl_ms: int) -> None:
        """End the logins of a token that were made when they had been ended so often, or less often.

        Args:
            token_id: The token's id.
            ended_before: How often they had been ended when the login was made that ends now.
            ttl_ms: For how long any of them would count.
        """
