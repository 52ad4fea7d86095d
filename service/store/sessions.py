"""Sessions in Redis: each method is one script or one command in one hash slot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from service.domain.digests import contribution_key, session_digest
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
from service.domain.types import ChunkKey, SessionKey
from service.settings import DAY_MS
from service.store import keys, layouts
from service.store.failures import as_domain_error, is_refusal
from service.store.scripts import ScriptCall, load_script
from service.store.tenant_bytes import Counted, TenantBytes, Value

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    from service.domain.limits_policy import LimitsPolicy
    from service.domain.ports import (
        AbsentSession,
        ChunkCommit,
        EpochStart,
        SessionHead,
    )
    from service.domain.types import WaitingTape
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


_NO_TAPES = layouts.TAPE_LIMITS.pack(0, 0, 0)
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
        self._tape_bytes = TenantBytes(
            runner, keys.tape_sizes_keys, lambda tenant: policy.of(tenant).tape_bytes_per_tenant
        )

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
        outcome, detail, *tapes = await self._runner.run(ScriptCall(_BEGIN_EPOCH, slot, arguments))
        if outcome == b"ABSENT":
            return await self._absent(tag, detail)
        decided = EpochOutcome(outcome.decode())
        if decided is EpochOutcome.GAP:
            return EpochDecision(decided, chunk_seq=int(detail))
        if tapes:
            await self._release_tapes(key, tapes[0])
        return EpochDecision(decided, epoch=int(detail))

    def queue_of(self, commit: ChunkCommit) -> object:
        """Return what a commit shares with those that it should share a round trip with.

        That is the node that serves its session, as far as is known. The tapes of a tenant with a bound take one
        round trip more, which nobody else is to wait for.
        """
        node = self._runner.node_of(keys.session_tag(commit.key))
        tenant = commit.key.tenant
        is_counted = commit.tape is not None and self._tape_bytes.is_bounded(tenant)
        return (node, tenant) if is_counted else node

    async def commit_chunks(self, commits: Sequence[ChunkCommit]) -> list[ChunkOutcome | Exception]:
        """Apply chunks of different sessions, each by itself, in one round trip; see `queue_of`."""
        taped = [commit for commit in commits if commit.tape is not None]
        if not any(self._tape_bytes.is_bounded(commit.key.tenant) for commit in taped):
            return await self._commit(commits, ())
        tapes = {commit.key: self._tape_value(commit) for commit in taped}
        counted = dict(
            zip(tapes, await self._tape_bytes.reserve(list(tapes.values())), strict=True)
        )
        # Without room the script is asked all the same: it knows whether the chunk was applied before.
        refused: dict[SessionKey, ChunkOutcome | Exception] = {
            key: one if isinstance(one, Exception) else ChunkOutcome.TENANT_QUOTA
            for key, one in counted.items()
            if one is Counted.FULL or isinstance(one, Exception)
        }
        outcomes = await self._commit(commits, refused)
        for i, commit in enumerate(commits):
            if outcomes[i] is ChunkOutcome.QUOTA:
                outcomes[i] = refused.get(commit.key, ChunkOutcome.QUOTA)
                if counted[commit.key] is Counted.NEW:
                    await self._tape_bytes.release(commit.key.tenant, tapes[commit.key].name)
        return outcomes

    def _tape_value(self, commit: ChunkCommit) -> Value:
        """Return what a commit adds to what its tenant keeps."""
        chunk = ChunkKey(commit.key, commit.epoch, commit.state.chunk_seq)
        name = layouts.contribution_name(contribution_key(chunk))
        lasts_ms = min(self._limits.tape_ttl_ms, commit.ttl_ms)
        return Value(commit.key.tenant, name, len(commit.tape or b""), lasts_ms)

    async def _commit(
        self,
        commits: Sequence[ChunkCommit],
        refused: Container[SessionKey],
        *,
        in_one_call: bool = True,
    ) -> list[ChunkOutcome | Exception]:
        """Apply chunks, but keep no tapes of the refused sessions: the answer to a chunk with one is then QUOTA or STALE.

        They are one call of the script, unless a script may see one slot only, or each is to be asked
        for by itself.
        """
        is_joined = in_one_call and not self._runner.is_cluster
        groups = [commits] if is_joined else [[commit] for commit in commits]
        runs = await self._runner.run_many([self._commit_call(some, refused) for some in groups])
        answers: list[ChunkOutcome | Exception] = []
        for some, ran in zip(groups, runs, strict=True):
            if not isinstance(ran.answer, Exception):
                answers += _chunk_outcomes(some, refused, ran)
            elif len(some) > 1 and is_refusal(ran.answer):
                # None of them was applied now. Which of them an earlier call applied, or a rival
                # overtook, each has to be asked for by itself.
                answers += await self._commit(some, refused, in_one_call=False)
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
        outcome, epoch, detail = await self._runner.run(
            ScriptCall(_CLOSE_SESSION, slot, (expected_epoch, MARKER_MS))
        )
        if outcome == b"ABSENT":
            return layouts.absence_from_marker(detail)
        if outcome == b"CLOSED":
            await self._release_tapes(key, detail)
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
        answer = await self._runner.run(ScriptCall(_MARK_TAPE_CONSUMED, slot, (name, token)))
        if answer == b"OK":
            await self._release_tapes(chunk.session, name)

    async def discard_tapes(self, key: SessionKey, epoch: int, chunk_seqs: Sequence[int]) -> int:
        """Drop tapes that wait for their Backward; epoch 0: any, no chunks: all."""
        tag = keys.session_tag(key)
        chunks = b"".join(seq.to_bytes(8, "big") for seq in chunk_seqs)
        named = epoch.to_bytes(8, "big") if epoch else b""
        slot = (keys.record_key(tag), keys.tape_index_key(tag))
        names = await self._runner.run(ScriptCall(_DISCARD_TAPES, slot, (named, chunks)))
        await self._release_tapes(key, names)
        return len(names) // layouts.TAPE_NAME.size

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
        """Erase all sessions on the tenant's list, then the list and what is counted; return how many were live.

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
        await self._runner.run_commands(
            [("UNLINK", listed), ("UNLINK", *keys.tape_sizes_keys(tenant))]
        )
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

    async def _release_tapes(self, key: SessionKey, names: bytes) -> None:
        """Count tapes of a session no longer that do not wait any more; `names` are their names, joined."""
        if names and self._tape_bytes.is_bounded(key.tenant):
            session, size = session_digest(key), layouts.TAPE_NAME.size
            each = (names[at : at + size] for at in range(0, len(names), size))
            await self._tape_bytes.release(key.tenant, b"".join(session + name for name in each))

    async def _absent(self, tag: bytes, marker: bytes) -> AbsentSession:
        """Tell from its marker why a session is not there, and since when if it has expired."""
        absent = layouts.absence_from_marker(marker)
        if absent.why is not Absence.EXPIRED:
            return absent
        expired = await self._runner.run(
            ScriptCall(_READ_EXPIRY, (keys.marker_key(tag),), (MARKER_MS,))
        )
        return replace(absent, expired_at_ms=int(expired))

    def _commit_call(
        self, commits: Sequence[ChunkCommit], refused: Container[SessionKey]
    ) -> ScriptCall:
        limits = self._limits
        slot = [keys.record_key(keys.session_tag(c.key)) for c in commits]
        if self._runner.is_cluster:
            slot += _tape_keys(commits[0])
        parts: list[bytes] = []
        for commit in commits:
            parts += layouts.commit_to_parts(commit)
            if commit.tape is not None:
                has_room = commit.key not in refused
                quotas = self._policy.of(commit.key.tenant)
                parts.append(layouts.tape_limits_to_bytes(quotas) if has_room else _NO_TAPES)
        arguments: tuple[Argument, ...] = (
            limits.replay_window,
            MARKER_MS,
            limits.tape_ttl_ms,
            b"".join(parts),
        )
        first = [_stage_tape(commit) for commit in commits if _is_staged(commit, refused)]
        return ScriptCall(_COMMIT_CHUNKS, slot, arguments, first)


def _erase_call(tag: bytes) -> ScriptCall:
    """Return the call that ends a session, whatever its epoch."""
    slot = (keys.record_key(tag), keys.marker_key(tag), keys.tape_index_key(tag))
    return ScriptCall(_CLOSE_SESSION, slot, (0, MARKER_MS))


def _is_staged(commit: ChunkCommit, refused: Container[SessionKey]) -> bool:
    return commit.tape is not None and commit.key not in refused


def _chunk_outcomes(
    commits: Sequence[ChunkCommit], refused: Container[SessionKey], ran: Ran
) -> Iterator[ChunkOutcome | Exception]:
    staged = iter(ran.first)
    for commit, outcome in zip(commits, ran.answer, strict=True):
        stage = next(staged) if _is_staged(commit, refused) else None
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
