"""Models in Redis: weights under immutable names, small scripts that decide.

Weights, moments and gradients are written before the script that publishes or records them. Until then they
carry a time to live, so that what a dead writer left goes by itself.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from service.domain.errors import ResourceExhausted, Unavailable
from service.domain.ports import (
    CheckpointOutcome,
    CreateOutcome,
    ModelRecord,
    PublishOutcome,
    RecordOutcome,
    UpdateInputs,
)
from service.domain.refusals import STORE_FAILURES
from service.domain.types import Version
from service.settings import MIB, MINUTE_MS
from service.store import keys, layouts
from service.store.failures import RETRY_AFTER_S
from service.store.scripts import ScriptCall, load_script
from service.store.tenant_bytes import NAME_BYTES, Counted, TenantBytes, Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.domain.blob import Blob
    from service.domain.limits_policy import LimitsPolicy
    from service.domain.ports import (
        Bytes,
        Contribution,
        ContributionState,
        NewModel,
        NewVersion,
        Publication,
        StepAnswer,
        WaitingContribution,
    )
    from service.domain.types import Checkpoint, ContributionKey, ModelKey, RequestDigest, Selector
    from service.settings import Limits
    from service.store.layouts import VersionEntry
    from service.store.links import Command
    from service.store.scripts import Argument, ScriptRunner

PART_BYTES = (
    4 * MIB
)  # a larger single value would hold up everybody's commands; the scripts know it
TRIP_BYTES = 8 * MIB  # of parts in one round trip, which ends well within the store's time limit
ORPHAN_MS = 10 * MINUTE_MS  # how long a version's parts wait for the script that publishes them

_CREATE_MODEL = load_script("create_model")
_DELETE_MODEL = load_script("delete_model")
_RECORD_CONTRIBUTION = load_script("record_contribution")
_READ_UPDATE_INPUTS = load_script("read_update_inputs")
_PUBLISH_VERSION = load_script("publish_version")
_DISCARD_CONTRIBUTIONS = load_script("discard_contributions")
_CREATE_CHECKPOINT = load_script("create_checkpoint")
_DELETE_CHECKPOINT = load_script("delete_checkpoint")
_RESERVE_MODEL = load_script("reserve_model")


class RedisModelStore:
    """The ModelStore port over a Redis or Valkey server."""

    def __init__(self, runner: ScriptRunner, limits: Limits, policy: LimitsPolicy) -> None:
        """Keep the runner, and the limits and quotas that the scripts get as arguments."""
        self._runner = runner
        self._limits = limits
        self._policy = policy
        self._gradient_bytes = TenantBytes(
            runner,
            keys.gradient_sizes_keys,
            lambda tenant: policy.of(tenant).contribution_bytes_per_tenant,
        )

    async def create_model(
        self,
        key: ModelKey,
        new: NewModel,
    ) -> CreateOutcome:
        """Create a model with its first version."""
        tag = keys.model_tag(key)
        slot = (
            keys.model_key(tag),
            keys.versions_key(tag),
            keys.requests_key(tag),
            keys.request_times_key(tag),
        )
        arguments = (
            new.incarnation,
            new.spec,
            layouts.version_to_bytes(new.first.version),
            new.request.name,
            new.request.content,
            _version_entry(new.first),
            keys.weights_prefix(tag, new.incarnation),
            keys.moments_prefix(tag, new.incarnation),
        )
        create = ScriptCall(_CREATE_MODEL, slot, arguments)
        answer = await self._runner.run(create)
        if answer == b"STALE":  # the name is free; where it is taken nothing needs to be written
            names = keys.tenant_models_key(key.tenant)
            most = self._policy.of(key.tenant).models_per_tenant
            reserve = ScriptCall(_RESERVE_MODEL, (names,), (key.model_id, most))
            if await self._runner.run(reserve) == b"FULL":
                return CreateOutcome.QUOTA
            try:
                await self._write_parts(_version_parts(tag, new.incarnation, new.first))
                answer = await self._runner.run(create)
            except ResourceExhausted:
                await self._give_back_name(key)
                raise
            # Another creation of this name, refused, may have released the entry meanwhile. The model is
            # there whatever becomes of this.
            with suppress(*STORE_FAILURES):
                await self._runner.run_commands([("ZADD", names, 0, key.model_id)])
        return CreateOutcome(answer.decode())

    async def read_model(self, key: ModelKey) -> ModelRecord | None:
        """Read a model's record."""
        tag = keys.model_tag(key)
        found, count = await self._runner.run_commands(
            [
                ("HMGET", keys.model_key(tag), *layouts.MODEL_FIELDS),
                ("ZCARD", keys.waiting_key(tag)),
            ]
        )
        incarnation, spec, head, created, waiting = found
        if incarnation is None:
            return None
        if None in found:
            named = zip(layouts.MODEL_FIELDS, found, strict=True)
            raise layouts.fields_missing([name for name, value in named if value is None])
        version = layouts.version_from_bytes(head)
        return ModelRecord(incarnation, spec, version, int(created), int(waiting), int(count))

    async def list_models(self, tenant: str, after: str, page_size: int) -> list[str]:
        """Read a page of model names, sorted, after the one named."""
        start = f"({after}" if after else "-"
        (names,) = await self._runner.run_commands(
            [("ZRANGEBYLEX", keys.tenant_models_key(tenant), start, "+", "LIMIT", 0, page_size)]
        )
        return [name.decode() for name in names]

    async def _give_back_name(self, key: ModelKey) -> None:
        """Take a name that no model has off the tenant's list."""
        with suppress(Unavailable):
            if await self.read_model(key) is None:
                await self.forget_model_name(key)

    async def forget_model_name(self, key: ModelKey) -> None:
        """Take a name off the tenant's list of models."""
        await self._runner.run_commands(
            [("ZREM", keys.tenant_models_key(key.tenant), key.model_id)]
        )

    async def delete_model(self, key: ModelKey, incarnation: bytes) -> bool:
        """Delete a model with everything in its slot."""
        tag = keys.model_tag(key)
        slot = (
            keys.model_key(tag),
            keys.versions_key(tag),
            keys.superseded_key(tag),
            keys.checkpoints_key(tag),
            keys.contributions_key(tag),
            keys.waiting_key(tag),
            keys.expiry_key(tag),
            keys.requests_key(tag),
            keys.request_times_key(tag),
        )
        prefixes = (
            keys.weights_prefix(tag, incarnation),
            keys.moments_prefix(tag, incarnation),
            keys.gradient_prefix(tag),
        )
        answer, *names = await self._runner.run(
            ScriptCall(_DELETE_MODEL, slot, (incarnation, *prefixes))
        )
        if names:
            await self._gradient_bytes.release(key.tenant, names[0])
        # The model is deleted even if its name stays listed: then the name counts against the tenant's
        # limit until it is used or deleted again.
        with suppress(*STORE_FAILURES):
            await self.forget_model_name(key)
        return bool(answer == b"DELETED")

    async def forget_sizes(self, tenant: str) -> None:
        """Drop what is counted of the gradients of a tenant that is erased."""
        await self._runner.run_commands([("UNLINK", *keys.gradient_sizes_keys(tenant))])

    async def find_version(self, key: ModelKey, number: int) -> Version | None:
        """Return the version stored under a number."""
        return next(iter(await self.find_versions(key, [number])), None)

    async def find_versions(self, key: ModelKey, numbers: Sequence[int]) -> list[Version]:
        """Return those of the versions of these numbers that are kept, in this order."""
        versions = keys.versions_key(keys.model_tag(key))
        names = [number.to_bytes(8, "big") for number in numbers]
        (entries,) = await self._runner.run_commands([("HMGET", versions, *names)])
        found = zip(numbers, entries, strict=True)
        return [
            Version(number, layouts.version_entry_from_bytes(entry).digest)
            for number, entry in found
            if entry
        ]

    async def read_weights(
        self, key: ModelKey, incarnation: bytes, version: Version
    ) -> Bytes | None:
        """Read a version's weights."""
        tag = keys.model_tag(key)
        entry = await self._read_version_entry(tag, version)
        if entry is None:
            return None
        name = keys.weights_prefix(tag, incarnation) + _name(version)
        return await self._read_parts(name, entry.weights_parts)

    async def read_moments(
        self, key: ModelKey, incarnation: bytes, version: Version
    ) -> Bytes | None:
        """Read a version's moments."""
        tag = keys.model_tag(key)
        entry = await self._read_version_entry(tag, version)
        if entry is None:
            return None
        name = keys.moments_prefix(tag, incarnation) + _name(version)
        return await self._read_parts(name, entry.moments_parts)

    async def record_contribution(self, key: ModelKey, contribution: Contribution) -> RecordOutcome:
        """Count a contribution once."""
        outcome, _ = await self._record(key, contribution)
        return outcome

    async def record_and_read(
        self,
        key: ModelKey,
        contribution: Contribution,
        *,
        request: RequestDigest,
        selectors: Sequence[Selector],
    ) -> tuple[RecordOutcome, UpdateInputs | Exception | None]:
        """Count a contribution once and, mostly after that, read what an Update decides from."""
        recorded, (inputs,) = await self._record(
            key, contribution, _inputs_call(key, request, selectors)
        )
        return recorded, inputs if isinstance(inputs, Exception) else _update_inputs(inputs)

    async def _record(
        self, key: ModelKey, contribution: Contribution, *others: ScriptCall
    ) -> tuple[RecordOutcome, list[Any]]:
        """Record a contribution if its tenant has room, and run other scripts right after; return all answers.

        If another fails, its error takes the place of its answer; the contribution stays recorded.
        """
        name = layouts.contribution_name(contribution.key)
        size, lasts_ms = contribution.gradient.nbytes, self._limits.contribution_ttl_ms
        (counted,) = await self._gradient_bytes.reserve([Value(key.tenant, name, size, lasts_ms)])
        # Without room the script is asked all the same: it knows whether the gradient was recorded before.
        has_room = isinstance(counted, Counted) and counted is not Counted.FULL
        answer, *rest = await self._write_and_record(
            key, contribution, (self._record_call(key, contribution, has_room=has_room), *others)
        )
        outcome = RecordOutcome(answer.decode())
        if outcome is RecordOutcome.QUOTA and isinstance(counted, Exception):
            raise counted
        if outcome is RecordOutcome.QUOTA and not has_room:
            outcome = RecordOutcome.TENANT_QUOTA
        is_waiting = outcome in (RecordOutcome.RECORDED, RecordOutcome.REPLAYED)
        if counted is Counted.NEW and not is_waiting:
            await self._gradient_bytes.release(key.tenant, name)
        return outcome, rest

    async def _write_and_record(
        self, key: ModelKey, contribution: Contribution, calls: Sequence[ScriptCall]
    ) -> list[Any]:
        """Run the calls, of which the first records; again once the parts of a large gradient are written."""
        answers = await self._run_first(calls)
        if answers[0] == b"MISSING":  # it is new and large: only now its parts have to be written
            name = keys.gradient_prefix(keys.model_tag(key)) + layouts.waiting_to_bytes(
                contribution.waiting
            )
            await self._write_parts(_parts(name, contribution.gradient))
            answers = await self._run_first(calls)
        if answers[0] == b"MISSING":
            raise parts_expired()
        return answers

    async def _run_first(self, calls: Sequence[ScriptCall]) -> list[Any]:
        answers = [ran.answer for ran in await self._runner.run_many(calls)]
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers

    def _record_call(
        self, key: ModelKey, contribution: Contribution, *, has_room: bool
    ) -> ScriptCall:
        tag, gradient = keys.model_tag(key), contribution.gradient
        limits, quotas = self._limits, self._policy.of(key.tenant)
        slot = (
            keys.model_key(tag),
            keys.contributions_key(tag),
            keys.waiting_key(tag),
            keys.expiry_key(tag),
        )
        arguments = (
            contribution.incarnation,
            layouts.contribution_name(contribution.key),
            contribution.digest,
            gradient.joined() if gradient.nbytes <= PART_BYTES else b"",
            limits.contribution_ttl_ms,
            quotas.contributions_per_model if has_room else 0,
            quotas.contribution_bytes_per_model,
            limits.remembered_contributions_per_model,
            keys.gradient_prefix(tag),
            gradient.nbytes,
            contribution.tape_expires_ms,
        )
        return ScriptCall(_RECORD_CONTRIBUTION, slot, arguments)

    async def find_contribution(
        self, key: ModelKey, contribution: ContributionKey
    ) -> ContributionState | None:
        """Return what has become of a contribution; None if it was never recorded."""
        tag = keys.model_tag(key)
        name = layouts.contribution_name(contribution)
        (entry,) = await self._runner.run_commands([("HGET", keys.contributions_key(tag), name)])
        return layouts.contribution_state_from_bytes(entry) if entry else None

    async def read_update_inputs(
        self, key: ModelKey, request: RequestDigest | None, selectors: Sequence[Selector] | None
    ) -> UpdateInputs | None:
        """Read what a step starts from, in one atomic read."""
        return _update_inputs(await self._runner.run(_inputs_call(key, request, selectors)))

    async def read_gradients(
        self, key: ModelKey, waiting: Sequence[WaitingContribution], size: int
    ) -> Sequence[Bytes] | None:
        """Read the gradients of waiting contributions, `size` bytes each; None when one has gone."""
        prefix = keys.gradient_prefix(keys.model_tag(key))
        if size <= PART_BYTES:
            return await self._read_values(
                [prefix + layouts.contribution_name(one.key) for one in waiting], size
            )
        found: list[Bytes] = []
        for one in waiting:
            named = _part_keys(prefix + layouts.waiting_to_bytes(one), -(-size // PART_BYTES))
            gradient = await self._read_whole(named, size)
            if gradient is None:
                return None
            found.append(gradient)
        return found

    async def publish_version(
        self, key: ModelKey, publication: Publication
    ) -> tuple[PublishOutcome, StepAnswer | None]:
        """Write a version and make it the head; REPLAYED comes with the remembered answer."""
        tag, limits = keys.model_tag(key), self._limits
        parts = _version_parts(tag, publication.incarnation, publication.new)
        is_small = publication.new.weights.nbytes + publication.new.moments.nbytes <= TRIP_BYTES
        if not is_small:
            await self._write_parts(parts)
        slot = (
            keys.model_key(tag),
            keys.versions_key(tag),
            keys.superseded_key(tag),
            keys.contributions_key(tag),
            keys.waiting_key(tag),
            keys.expiry_key(tag),
            keys.requests_key(tag),
            keys.request_times_key(tag),
        )
        arguments = (
            publication.incarnation,
            layouts.version_to_bytes(publication.base),
            layouts.version_to_bytes(publication.new.version),
            publication.request.name,
            publication.request.content + layouts.step_answer_to_bytes(publication.answer),
            b"".join(map(layouts.contribution_name, publication.contributions)),
            _version_entry(publication.new),
            keys.weights_prefix(tag, publication.incarnation),
            keys.moments_prefix(tag, publication.incarnation),
            keys.gradient_prefix(tag),
            2 * limits.tape_ttl_ms,
            limits.tape_ttl_ms,
            self._policy.of(key.tenant).superseded_bytes_per_model,
            limits.remembered_requests_per_model,
        )
        first = _writes(parts) if is_small else ()
        (ran,) = await self._runner.run_many([ScriptCall(_PUBLISH_VERSION, slot, arguments, first)])
        if isinstance(ran.answer, Exception):
            raise ran.answer
        outcome, *answer = ran.answer
        if outcome == b"MISSING":
            for refused in (part for part in ran.first if isinstance(part, Exception)):
                raise refused
            return PublishOutcome.STALE, None  # the parts have expired: it is all made again
        if outcome == b"PUBLISHED":
            names = b"".join(map(layouts.contribution_name, publication.contributions))
            await self._gradient_bytes.release(key.tenant, names)
        remembered = layouts.step_answer_from_bytes(answer[0]) if answer else None
        return PublishOutcome(outcome.decode()), remembered

    async def discard_contributions(
        self, key: ModelKey, incarnation: bytes, selectors: Sequence[Selector]
    ) -> int | None:
        """Drop waiting contributions, without selectors all; None when the model has gone."""
        tag = keys.model_tag(key)
        slot = (
            keys.model_key(tag),
            keys.contributions_key(tag),
            keys.waiting_key(tag),
            keys.expiry_key(tag),
        )
        remembered_ms = 2 * self._limits.tape_ttl_ms
        prefix = keys.gradient_prefix(tag)
        named = layouts.selectors_to_bytes(key.tenant, selectors)
        arguments: list[Argument] = [incarnation, prefix, remembered_ms, *named]
        names = await self._runner.run(ScriptCall(_DISCARD_CONTRIBUTIONS, slot, arguments))
        if isinstance(names, int):
            return None
        await self._gradient_bytes.release(key.tenant, names)
        return len(names) // NAME_BYTES

    async def create_checkpoint(
        self,
        key: ModelKey,
        incarnation: bytes,
        checkpoint_id: str,
        *,
        version: Version | None,
    ) -> tuple[CheckpointOutcome, Checkpoint | None]:
        """Keep a version under a name; None for the head."""
        tag = keys.model_tag(key)
        slot = (
            keys.model_key(tag),
            keys.versions_key(tag),
            keys.superseded_key(tag),
            keys.checkpoints_key(tag),
        )
        named = layouts.version_to_bytes(version) if version else b""
        arguments = (
            incarnation,
            checkpoint_id,
            named,
            self._policy.of(key.tenant).checkpoints_per_model,
        )
        outcome, *entry = await self._runner.run(ScriptCall(_CREATE_CHECKPOINT, slot, arguments))
        kept = layouts.checkpoint_from_bytes(checkpoint_id, entry[0]) if entry else None
        return CheckpointOutcome(outcome.decode()), kept

    async def list_checkpoints(self, key: ModelKey) -> list[Checkpoint]:
        """Read a model's checkpoints, sorted by name."""
        tag = keys.model_tag(key)
        (flat,) = await self._runner.run_commands([("HGETALL", keys.checkpoints_key(tag))])
        entries = (
            flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        )
        return [
            layouts.checkpoint_from_bytes(name.decode(), entry) for name, entry in sorted(entries)
        ]

    async def delete_checkpoint(
        self, key: ModelKey, incarnation: bytes, checkpoint_id: str
    ) -> bool:
        """Take a checkpoint's name away."""
        tag = keys.model_tag(key)
        slot = (
            keys.model_key(tag),
            keys.versions_key(tag),
            keys.superseded_key(tag),
            keys.checkpoints_key(tag),
        )
        arguments = (incarnation, checkpoint_id, keys.moments_prefix(tag, incarnation))
        answer = await self._runner.run(ScriptCall(_DELETE_CHECKPOINT, slot, arguments))
        return bool(answer == b"DELETED")

    async def _write_parts(self, parts: Sequence[tuple[bytes, Bytes]]) -> None:
        """Write what is not there yet: a call that is sent again goes on where the last one was cut."""
        per_trip = TRIP_BYTES // PART_BYTES
        if len(parts) > per_trip:
            asked: list[Command] = [("PEXPIRE", key, ORPHAN_MS, "GT") for key, _ in parts]
            await self._runner.run_commands(asked)
            sizes = await self._runner.run_commands([("STRLEN", key) for key, _ in parts])
            parts = [part for part, size in zip(parts, sizes, strict=True) if size != len(part[1])]
        for i in range(0, len(parts), per_trip):
            await self._runner.run_commands(_writes(parts[i : i + per_trip]))

    async def _read_values(self, names: Sequence[bytes], size: int) -> list[bytes] | None:
        """Read values of up to `size` bytes each; None when one is not there."""
        per_trip = max(1, TRIP_BYTES // max(1, size))
        found: list[bytes] = []
        for i in range(0, len(names), per_trip):
            some = [("GET", name) for name in names[i : i + per_trip]]
            # One of them comes in the usual time, and may be far smaller.
            more = size * (len(some) - 1)
            found += await self._runner.run_commands(some, answer_bytes=more)
        return None if None in found else found

    async def _read_whole(self, names: Sequence[bytes], size: int) -> Bytes | None:
        """Read one value of `size` bytes from its parts; None when one of them is not there."""
        if len(names) == 1:
            parts = await self._read_values(names, PART_BYTES)
            return None if parts is None else parts[0]
        whole = memoryview(bytearray(size))
        per_trip, at = TRIP_BYTES // PART_BYTES, 0
        for i in range(0, len(names), per_trip):
            parts = await self._read_values(names[i : i + per_trip], PART_BYTES)
            if parts is None:
                return None
            for part in parts:
                whole[at : at + len(part)] = part
                at += len(part)
        return whole.toreadonly()[:at]

    async def _read_version_entry(self, tag: bytes, version: Version) -> VersionEntry | None:
        """Read the entry of a version; None if it is not kept, or its number has other content."""
        number = version.number.to_bytes(8, "big")
        (entry,) = await self._runner.run_commands([("HGET", keys.versions_key(tag), number)])
        found = layouts.version_entry_from_bytes(entry) if entry else None
        return found if found is not None and found.digest == version.digest else None

    async def _read_parts(self, name: bytes, count: int) -> Bytes | None:
        """Read what was written in parts; None when one of them is not there."""
        return await self._read_whole(_part_keys(name, count), count * PART_BYTES)


def _inputs_call(
    key: ModelKey, request: RequestDigest | None, selectors: Sequence[Selector] | None
) -> ScriptCall:
    tag = keys.model_tag(key)
    slot = (
        keys.model_key(tag),
        keys.contributions_key(tag),
        keys.waiting_key(tag),
        keys.requests_key(tag),
    )
    name = request.name if request else b""
    named = [] if selectors is None else layouts.selectors_to_bytes(key.tenant, selectors)
    return ScriptCall(_READ_UPDATE_INPUTS, slot, (name, *named))


def _update_inputs(answer: list[bytes]) -> UpdateInputs | None:
    if not answer:
        return None
    incarnation, spec, head, remembered, *found = answer
    version = layouts.version_from_bytes(head)
    waiting = map(layouts.waiting_from_bytes, sorted(set(found)))
    known = layouts.remembered_from_bytes(remembered)
    return UpdateInputs(incarnation, spec, version, known, tuple(waiting))


def parts_expired() -> Unavailable:
    """Make the answer to a call whose parts did not live until their script came."""
    text = "writing took too long; send the same call again"
    return Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=RETRY_AFTER_S)


def _parts(name: bytes, data: Blob) -> list[tuple[bytes, Bytes]]:
    starts = range(0, data.nbytes, PART_BYTES)
    named = _part_keys(name, len(starts))
    return [(key, data.part(at, PART_BYTES)) for key, at in zip(named, starts, strict=True)]


def _version_parts(tag: bytes, incarnation: bytes, new: NewVersion) -> list[tuple[bytes, Bytes]]:
    version = new.version
    return [
        *_parts(keys.weights_prefix(tag, incarnation) + _name(version), new.weights),
        *_parts(keys.moments_prefix(tag, incarnation) + _name(version), new.moments),
    ]


def _writes(parts: Sequence[tuple[bytes, Bytes]]) -> list[Command]:
    """Return commands that write what is not there yet; a name always has the same content."""
    return [("SET", key, part, "PX", ORPHAN_MS, "NX") for key, part in parts]


def _part_keys(name: bytes, count: int) -> list[bytes]:
    return [name + part.to_bytes(2, "big") for part in range(count)]


def _name(version: Version) -> bytes:
    return version.digest + version.number.to_bytes(8, "big")


def _part_count(data: Blob) -> int:
    return -(-data.nbytes // PART_BYTES)


def _version_entry(new: NewVersion) -> bytes:
    parts, moment_parts = _part_count(new.weights), _part_count(new.moments)
    # What a superseded version costs: its moments go when it is superseded.
    size = new.weights.nbytes
    return layouts.VERSION_ENTRY.pack(new.version.digest, size, parts, moment_parts, 0)
