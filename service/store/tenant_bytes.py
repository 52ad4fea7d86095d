"""What a tenant keeps in all: the bytes of its tapes, or of its gradients, that wait.

They are counted in the tenant's slot, since no script sees the slots of all its sessions and models: before something
is written, and until it was dropped or is gone by itself. So never less is counted than there is. If a replica dies
before it has said that something was dropped, that counts until it would have gone by itself.

Only tenants that have a bound are counted: it costs a round trip each time.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from service.domain.refusals import STORE_FAILURES
from service.store.scripts import ScriptCall, load_script

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.store.scripts import Argument, ScriptRunner

_RESERVE_BYTES = load_script("reserve_bytes")
_RELEASE_BYTES = load_script("release_bytes")

NAME_BYTES = 32  # session, epoch, chunk_seq: layouts.contribution_name


class Counted(Enum):
    """Whether a value is counted now."""

    UNBOUNDED = "UNBOUNDED"  # its tenant has no bound
    NEW = "NEW"
    KNOWN = "KNOWN"  # it was before
    FULL = "FULL"  # it is not, and must not be written


@dataclass(frozen=True, slots=True)
class Value:
    """What is about to be written for a tenant.

    Attributes:
        tenant: Whose it is.
        name: Names it among those of the tenant.
        size_bytes: How large it is.
        lasts_ms: For how long it is kept at most.
    """

    tenant: str
    name: bytes
    size_bytes: int
    lasts_ms: int


class TenantBytes:
    """Counts the values of one kind."""

    def __init__(
        self,
        runner: ScriptRunner,
        keys_of: Callable[[str], tuple[bytes, bytes]],
        most_of: Callable[[str], int | None],
    ) -> None:
        """Keep what is asked.

        Args:
            runner: Runs the scripts.
            keys_of: Returns where a tenant's values are counted.
            most_of: Returns how many bytes a tenant may keep now; None: as many as it likes.
        """
        self._runner = runner
        self._keys_of = keys_of
        self._most_of = most_of

    def is_bounded(self, tenant: str) -> bool:
        """Return whether a tenant's values are counted."""
        return self._most_of(tenant) is not None

    async def reserve(self, values: Sequence[Value]) -> list[Counted | Exception]:
        """Count values before they are written, those of each tenant in their order; a failure stands in their place."""
        counted: list[Counted | Exception] = [Counted.UNBOUNDED] * len(values)
        places: dict[str, list[int]] = {}
        for place, value in enumerate(values):
            if self.is_bounded(value.tenant):
                places.setdefault(value.tenant, []).append(place)
        if not places:
            return counted
        calls = [
            self._reserve_call(tenant, [values[i] for i in some]) for tenant, some in places.items()
        ]
        runs = await self._runner.run_many(calls)
        for some, ran in zip(places.values(), runs, strict=True):
            for number, place in enumerate(some):
                failed = isinstance(ran.answer, Exception)
                counted[place] = ran.answer if failed else Counted(ran.answer[number].decode())
        return counted

    async def release(self, tenant: str, names: bytes) -> None:
        """Count values no longer that were dropped, or not written; if the store fails they count until they end.

        Args:
            tenant: Whose they were.
            names: Theirs, one after another.
        """
        if not names or not self.is_bounded(tenant):
            return
        arguments = [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]
        with suppress(*STORE_FAILURES):
            await self._runner.run(ScriptCall(_RELEASE_BYTES, self._keys_of(tenant), arguments))

    def _reserve_call(self, tenant: str, values: Sequence[Value]) -> ScriptCall:
        most = self._most_of(tenant)
        assert most is not None  # noqa: S101 - asked for right before
        arguments: list[Argument] = [most]
        for value in values:
            arguments += (value.name, value.size_bytes, value.lasts_ms)
        return ScriptCall(_RESERVE_BYTES, self._keys_of(tenant), arguments)
