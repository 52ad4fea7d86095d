"""Sessions in Redis: each method is one script or one command in one hash slot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from service.domain.ports import (
    Absence,
    ChunkOutcome,
    CloseDecision,
    CloseOutcome,
    EpochDecision,
    EpochOutcome,
    SessionSnapshot,
    TapeSnapshot,
)
from service.domain.types import SessionKey
from service.settings import DAY_MS
from service.store import keys, layouts
from service.store.failures import as_domain_error, is_refusal
from service.store.scripts import ScriptCall, load_script

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from service.domain.limits_policy import LimitsPolicy
    from service.domain.ports import (
        AbsentSession,
        ChunkCommit,
        EpochStart,
        SessionHead,
    )
    from service.domain.types import ChunkKey, WaitingTape
    from service.settings import Limits
    from service.store.links import Command
    from service.store.scripts import Argument, Ran, ScriptRunner

ORPHAN_MS = 60_000  # a tape whose commit never came lives so long
MARKER_MS = DAY_MS  # how much longer than its session a marker lives

_READ_SESSION = load_script("read_session")
_READ_EXPIRY = load_script("read_expiry")
_BEGIN_EPOCH = load_script("begin_epoch")
_COMMIT_CHUNKS = load_script("commit_chunks")
_EXTEND_SESSION = load_script("extend_session")
_CLOSE_SESSION = load_script("close_session")
_READ_TAPE = load_script("read_tape")
_MARK_TAPE_CONSUMED = load_script("mark_tape_consumed")
_DISCARD_TAPES = load_script("discard_tapes")
_LIST_TAPES = load_script("list_tapes")
_RESERVE_SESSION = load_script("reserve_session")
_RELEASE_LISTING = load_script("release_listing")
_LIST_SESSIONS = load_script("list_sessions")

_CHUNK_OUTCOMES = {outcome.value.encode(): outcome for outcome in ChunkOutcome}


_ANY_CHUNK = -1  # begin_epoch.lua: the last chunk may be any


ERASED_A_TRIP = 200  # sessions in one round trip of an erasure


class CorruptRecordError(Exception):
    """A session's record does not hold its own last state."""


class RedisSessionStore:
    """The SessionStore port over a Redis or Valkey server."""

    def __init__(self, runner: ScriptRunner, limits: Limits, policy: LimitsPolicy) -> None:
        """Keep the runner, and the limits and quotas that the scripts get as arguments."""
        self._runner = runner
        self._limits = limits
        self._policy = policy

    async def read_session(
        self, key: SessionKey, chunk_seq: int = 0
    ) -> SessionSnapshot | AbsentSession:
        """Read a session, with the states around a chunk when one is named."""
        tag = keys.session_tag(key)
        call = ScriptCall(_READ_SESSION, (keys.record_key(tag), keys.marker_key(tag)), (chunk_seq,))
        answer = await self._runner.run(call)
        if len(answer) == 1:
            return await self._absent(tag, answer[0])
        head, expires, last, before, at = answer
        stored = layouts.state_from_bytes(last)
        if stored is None:
            raise CorruptRecordError(key.session_id)
        return SessionSnapshot(
            head=layouts.head_from_bytes(head),
            expire_time_ms=int(expires),
            last=stored,
            before=layouts.state_from_bytes(before),
            at=layouts.state_from_bytes(at),
        )

    async def begin_epoch(
        self, key: SessionKey, start: EpochStart
    ) -> EpochDecision | AbsentSession:
        """Begin an epoch; AbsentSession if the mode needs a live session and there is none."""
        tag = keys.session_tag(key)
        arguments = (
            start.mode.value,
            start.expected_epoch,
            _ANY_CHUNK if start.expected_chunk_seq is None else start.expected_chunk_seq,
            start.restored_epoch,
            layouts.epoch_request_to_bytes(start.request),
            start.head.ttl_ms,
            MARKER_MS,
            layouts.epoch_tail_to_bytes(start),
            layouts.state_to_bytes(start.first),
            len(start.head.model_id.encode()),
        )
        slot = (keys.record_key(tag), keys.marker_key(tag), keys.tape_index_key(tag))
        outcome, detail = await self._runner.run(ScriptCall(_BEGIN_EPOCH, slot, arguments))
        if outcome == b"ABSENT":
            return await self._absent(tag, detail)
        decided = EpochOutcome(outcome.decode())
        if decided is EpochOutcome.GAP:
            return EpochDecision(decided, chunk_seq=int(detail))
        return EpochDecision(decided, epoch=int(detail))

    def node_of(self, key: SessionKey) -> object:
        """Return the node that serves a session as far as is known, None where the store is one server."""
        return self._runner.node_of(keys.session_tag(key))

    async def commit_chunks(
        self, commits: Sequence[ChunkCommit], *, in_one_call: bool = True
    ) -> list[ChunkOutcome | Exception]:
        """Apply chunks of different sessions, each by itself, in one round trip.

        They are one call of the script, unless a script may see one slot only, or each is to be asked
        for by itself.
        """
        is_joined = in_one_call and not self._runner.is_cluster
        groups = [commits] if is_joined else [[commit] for commit in commits]
        runs = await self._runner.run_many([self._commit_call(some) for some in groups])
        answers: list[ChunkOutcome | Exception] = []
        for some, ran in zip(groups, runs, strict=True):
            if not isinstance(ran.answer, Exception):
                answers += _chunk_outcomes(some, ran)
            elif len(some) > 1 and is_refusal(ran.answer):
                # None of them was applied now. Which of them an earlier call applied, or a rival
                # overtook, each has to be asked for by itself.
                answers += await self.commit_chunks(some, in_one_call=False)
            else:
                answers += [ran.answer] * len(some)
        return answers

    async def extend_session(self, key: SessionKey, epoch: int) -> ChunkOutcome:
        """Let the time to live start again; STALE when the epoch is not there any more."""
        tag = keys.session_tag(key)
        slot = (keys.record_key(tag), keys.marker_key(tag))
        answer = await self._runner.run(ScriptCall(_EXTEND_SESSION, slot, (epoch, MARKER_MS)))
        return ChunkOutcome.STALE if answer == b"ABSENT" else _CHUNK_OUTCOMES[answer]

    async def close_session(
        self, key: SessionKey, expected_epoch: int
    ) -> CloseDecision | AbsentSession:
        """End a session, unless an epoch is expected (not 0) and it has another."""
        tag = keys.session_tag(key)
        slot = (keys.record_key(tag), keys.marker_key(tag), keys.tape_index_key(tag))
        outcome, epoch, marker = await self._runner.run(
            ScriptCall(_CLOSE_SESSION, slot, (expected_epoch, MARKER_MS))
        )
        if outcome == b"ABSENT":
            return layouts.absence_from_marker(marker)
        return CloseDecision(CloseOutcome(outcome.decode()), int(epoch))

    async def read_tape(self, chunk: ChunkKey, *, with_data: bool = True) -> TapeSnapshot:
        """Read one tape, or only its first byte, with where its session stands."""
        tag, name = keys.session_tag(chunk.session), layouts.tape_name(chunk)
        slot = (
            keys.record_key(tag),
            keys.marker_key(tag),
            keys.tape_index_key(tag),
            keys.tape_key(tag, name),
        )
        head, marker, entry, tape = await self._runner.run(
            ScriptCall(_READ_TAPE, slot, (name, int(with_data)))
        )
        expires_ms, token = layouts.tape_entry_from_bytes(entry) if entry else (0, b"")
        return TapeSnapshot(
            session=layouts.head_from_bytes(head) if head else await self._absent(tag, marker),
            token=token,
            data=tape or None,
            expires_ms=expires_ms,
        )

    async def mark_tape_consumed(self, chunk: ChunkKey, token: bytes) -> None:
        """Note that the contribution of a tape was recorded, so that it does not count as waiting."""
        tag, name = keys.session_tag(chunk.session), layouts.tape_name(chunk)
        slot = (keys.record_key(tag), keys.tape_index_key(tag))
        await self._runner.run(ScriptCall(_MARK_TAPE_CONSUMED, slot, (name, token)))

    async def discard_tapes(self, key: SessionKey, epoch: int, chunk_seqs: Sequence[int]) -> int:
        """Drop tapes that wait for their Backward; epoch 0: any, no chunks: all."""
        tag = keys.session_tag(key)
        chunks = b"".join(seq.to_bytes(8, "big") for seq in chunk_seqs)
        named = epoch.to_bytes(8, "big") if epoch else b""
        slot = (keys.record_key(tag), keys.tape_index_key(tag))
        return int(await self._runner.run(ScriptCall(_DISCARD_TAPES, slot, (named, chunks))))

    async def list_tapes(
        self, key: SessionKey
    ) -> tuple[SessionHead | AbsentSession, list[WaitingTape]]:
        """Read which tapes wait for their Backward, in order, with where the session stands."""
        tag = keys.session_tag(key)
        slot = (keys.record_key(tag), keys.marker_key(tag), keys.tape_index_key(tag))
        head, marker, *tapes = await self._runner.run(ScriptCall(_LIST_TAPES, slot, ()))
        if not head:
            return await self._absent(tag, marker), []
        return layouts.head_from_bytes(head), [
            layouts.waiting_tape_from_bytes(tape) for tape in sorted(tapes)
        ]

    async def reserve_session(self, key: SessionKey, ttl_ms: int) -> int | None:
        """List a session among its tenant's; return the end of its entry in ms, None if the list is full."""
        most = self._policy.of(key.tenant).sessions_per_tenant
        arguments = (key.session_id, ttl_ms + ttl_ms // 4, most, "GT")
        call = ScriptCall(_RESERVE_SESSION, (keys.tenant_sessions_key(key.tenant),), arguments)
        answer = await self._runner.run(call)
        return None if answer == b"FULL" else int(answer)

    async def find_listing(self, key: SessionKey) -> int | None:
        """Return the end in ms of a session's entry in the tenant's list; None if it is not listed."""
        score = ("ZSCORE", keys.tenant_sessions_key(key.tenant), key.session_id)
        (end,) = await self._runner.run_commands([score])
        return int(float(end)) if end else None

    async def release_listing(
        self, key: SessionKey, listed_end: int, live: SessionSnapshot | None
    ) -> None:
        """Remove a session's entry if its end is still the one given; a live session gets its own end back."""
        end = live.expire_time_ms + live.head.ttl_ms // 4 if live else 0
        arguments = (key.session_id, listed_end, end)
        await self._runner.run(
            ScriptCall(_RELEASE_LISTING, (keys.tenant_sessions_key(key.tenant),), arguments)
        )

    async def touch_session(self, key: SessionKey, ttl_ms: int) -> None:
        """Move the end of a session's entry in the tenant's list to what a chunk has made it."""
        most = 1 << 53  # a session that lives already is never refused
        arguments = (key.session_id, ttl_ms + ttl_ms // 4, most, "CH")
        await self._runner.run(
            ScriptCall(_RESERVE_SESSION, (keys.tenant_sessions_key(key.tenant),), arguments)
        )

    async def count_sessions(self, tenant: str) -> int:
        """Return the length of the tenant's list, entries whose session has just ended included."""
        (count,) = await self._runner.run_commands([("ZCARD", keys.tenant_sessions_key(tenant))])
        return int(count)

    async def erase_sessions(self, tenant: str) -> int:
        """Erase all sessions on the tenant's list, then the list; return how many were live.

        Raises:
            UnsupportedLayout: If another release laid one out; those before it are erased.
        """
        listed = keys.tenant_sessions_key(tenant)
        (names,) = await self._runner.run_commands([("ZRANGE", listed, 0, -1)])
        live = 0
        for at in range(0, len(names), ERASED_A_TRIP):
            some = [SessionKey(tenant, name.decode()) for name in names[at : at + ERASED_A_TRIP]]
            tags = [keys.session_tag(key) for key in some]
            runs = await self._runner.run_many([_erase_call(tag) for tag in tags])
            for ran in runs:
                if isinstance(ran.answer, Exception):
                    raise ran.answer
                live += ran.answer[0] == b"CLOSED"
            # What closing leaves for late clients: that there was a session.
            await self._runner.run_commands([("UNLINK", keys.marker_key(tag)) for tag in tags])
        await self._runner.run_commands([("UNLINK", listed)])
        return live

    async def list_sessions(
        self, tenant: str, after: tuple[str, str] | None, page_size: int
    ) -> list[tuple[str, str]]:
        """Read a page of (session_id, position) of the tenant's list."""
        name, position = after or ("", "")
        call = ScriptCall(
            _LIST_SESSIONS, (keys.tenant_sessions_key(tenant),), (position, name, page_size)
        )
        flat = [part.decode() for part in await self._runner.run(call)]
        return list(zip(flat[::2], flat[1::2], strict=True))

    async def _absent(self, tag: bytes, marker: bytes) -> AbsentSession:
        """Tell from its marker why a session is not there, and since when if it has expired."""
        absent = layouts.absence_from_marker(marker)
        if absent.why is not Absence.EXPIRED:
            return absent
        expired = await self._runner.run(
            ScriptCall(_READ_EXPIRY, (keys.marker_key(tag),), (MARKER_MS,))
        )
        return replace(absent, expired_at_ms=int(expired))

    def _commit_call(self, commits: Sequence[ChunkCommit]) -> ScriptCall:
        limits = self._limits
        slot = [keys.record_key(keys.session_tag(c.key)) for c in commits]
        if self._runner.is_cluster:
            slot += _tape_keys(commits[0])
        parts: list[bytes] = []
        for commit in commits:
            parts += layouts.commit_to_parts(commit)
            if commit.tape is not None:
                parts.append(layouts.tape_limits_to_bytes(self._policy.of(commit.key.tenant)))
        arguments: tuple[Argument, ...] = (
            limits.replay_window,
            MARKER_MS,
            limits.tape_ttl_ms,
            b"".join(parts),
        )
        first = [_stage_tape(commit) for commit in commits if commit.tape is not None]
        return ScriptCall(_COMMIT_CHUNKS, slot, arguments, first)


def _erase_call(tag: bytes) -> ScriptCall:
    """Return the call that ends a session, whatever its epoch."""
    slot = (keys.record_key(tag), keys.marker_key(tag), keys.tape_index_key(tag))
    return ScriptCall(_CLOSE_SESSION, slot, (0, MARKER_MS))


def _chunk_outcomes(commits: Sequence[ChunkCommit], ran: Ran) -> Iterator[ChunkOutcome | Exception]:
    staged = iter(ran.first)
    for commit, outcome in zip(commits, ran.answer, strict=True):
        stage = next(staged) if commit.tape is not None else None
        if isinstance(outcome, Exception):
            yield as_domain_error(outcome)
        elif outcome == b"UNSTAGED":
            yield stage if isinstance(stage, Exception) else ChunkOutcome.STALE
        else:
            yield _CHUNK_OUTCOMES[outcome]


def _stage_tape(commit: ChunkCommit) -> Command:
    """Return the command that stages a tape for its commit, which renames it."""
    tag = keys.session_tag(commit.key)
    return ("SET", keys.staged_tape_key(tag, commit.state.token), commit.tape, "PX", ORPHAN_MS)


def _tape_keys(commit: ChunkCommit) -> list[bytes]:
    """Name what a chunk in TRAIN mode touches beside its session's record."""
    if commit.tape is None:
        return []
    tag = keys.session_tag(commit.key)
    name = layouts.TAPE_NAME.pack(commit.epoch, commit.state.chunk_seq)
    staged = keys.staged_tape_key(tag, commit.state.token)
    return [keys.tape_index_key(tag), keys.tape_key(tag, name), staged]
