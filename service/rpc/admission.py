"""How much work one replica takes at once, of everybody and of each tenant; what is beyond is refused.

The tenants share what the replica can do. So that one that asks for too much slows nobody else, each can have bounds
of its own, which are smaller: on what it has in work, and on how much comes a second.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Final, Self

from service.rpc.errors import overloaded
from service.rpc.holding import Holding

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from service.domain.errors import DomainError
    from service.rpc.auth import Principal
    from service.tenants import TenantRates

BUSY_RETRY_S: Final = 0.1  # when something that is in work may have ended
BURST_S: Final = 1.0  # what a tenant may save up of its rate, and send at once
REFUSALS_PER_S: Final = 50.0  # of a tenant; a refused call costs gRPC as much as one that is served
LONGEST_HOLD_S: Final = 1.0


class Admission:
    """Counts what is in work or waiting, of this process or of one tenant; a `Share` takes from it and gives back.

    Attributes:
        operations: Operations in work.
        request_bytes: Bytes of requests and of the answers to come, and of uploads and downloads
            under way.
        max_operations: The bound of the first.
        max_bytes: The bound of the second. Something larger is let in while nobody else holds any
            bytes, so that no size within the limits is refused for ever.
        owner: Whose bounds they are, for refusals.
        when_released: Each is called once, when something was given back.
    """

    __slots__ = (
        "max_bytes",
        "max_operations",
        "operations",
        "owner",
        "request_bytes",
        "when_released",
    )

    def __init__(self, max_operations: int, max_bytes: int, owner: str = "this replica") -> None:
        self.max_operations = max_operations
        self.max_bytes = max_bytes
        self.operations = 0
        self.request_bytes = 0
        self.owner = owner
        self.when_released: set[Callable[[], None]] = set()

    def check(self, size_bytes: int, operations: int, held_bytes: int) -> None:
        """Return if so much more would be let in, or raise OVERLOADED.

        Args:
            size_bytes: Bytes to hold.
            operations: Operations to hold.
            held_bytes: What the asker holds already; who holds all that is held gets any size.
        """
        if operations and self.operations >= self.max_operations:
            raise self.full("operations_in_flight", self.max_operations)
        total_bytes = self.request_bytes
        if total_bytes > held_bytes and total_bytes + size_bytes > self.max_bytes:
            raise self.full("request_bytes_in_flight", self.max_bytes)

    def has_room(self, size_bytes: int) -> bool:
        """Return whether so many bytes more would be let in."""
        return self.request_bytes + size_bytes <= self.max_bytes

    def released(self) -> None:
        """Call those that wait for something to be given back."""
        calls, self.when_released = self.when_released, set()
        for call in calls:
            call()

    def full(self, bound: str, limit: int) -> DomainError:
        """Make the refusal of what would be beyond a bound."""
        state = f"is at its limit of {limit}"
        return overloaded(bound, state, owner=self.owner, retry_after_s=BUSY_RETRY_S, limit=limit)


class TokenBucket:
    """How much of a rate is left: it fills as time passes, and each operation takes from it.

    An operation may take more than there is. The bucket then owes it, and the next one waits for longer, so that no
    size is refused for ever.

    Attributes:
        rate: What it fills by a second.
    """

    __slots__ = ("_clock", "_filled_at", "_level", "rate")

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self.rate = rate
        self._clock = clock
        self._filled_at = clock()
        self._level = self._capacity()

    def wait_s(self) -> float:
        """Return how long it takes until the bucket holds one; 0 if it does."""
        now = self._clock()
        self._level += (now - self._filled_at) * self.rate
        self._level = min(self._level, self._capacity())
        self._filled_at = now
        return max(0.0, (1.0 - self._level) / self.rate)

    def take(self, amount: float) -> None:
        """Take an amount, whether it is there or not; a negative one is put back."""
        self._level -= amount

    def _capacity(self) -> float:
        return max(1.0, self.rate * BURST_S)


class TenantAdmission(Admission):
    """The bounds of one tenant on this process: what it has in work, and what comes a second.

    Attributes:
        operation_bucket: Bounds the operations a second; None: nothing does.
        byte_bucket: Bounds the bytes of requests a second; None: nothing does.
        held: Its refusals that are held back.
    """

    __slots__ = ("_clock", "_refusals", "byte_bucket", "held", "operation_bucket")

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(sys.maxsize, sys.maxsize, "this tenant on this replica")
        self._clock = clock
        self.operation_bucket: TokenBucket | None = None
        self.byte_bucket: TokenBucket | None = None
        self._refusals = TokenBucket(REFUSALS_PER_S, clock)
        self.held = Holding()

    def set(self, rates: TenantRates, parts: int) -> None:
        """Let other bounds hold from now on.

        Args:
            rates: The bounds.
            parts: Of how many processes, that divide the bounds among them, this is one.
        """
        self.max_operations = _part(rates.operations_in_flight, parts)
        self.max_bytes = _part(rates.request_bytes_in_flight, parts)
        self.operation_bucket = self._bucket(
            self.operation_bucket, rates.operations_per_second, parts
        )
        self.byte_bucket = self._bucket(self.byte_bucket, rates.bytes_per_second, parts)

    def check(self, size_bytes: int, operations: int, held_bytes: int) -> None:
        """Return if so much more would be let in and, of operations, if they do not come too fast."""
        super().check(size_bytes, operations, held_bytes)
        if not operations:
            return
        for bound, bucket in (
            ("operations_per_second", self.operation_bucket),
            ("bytes_per_second", self.byte_bucket),
        ):
            if bucket is not None and (wait_s := bucket.wait_s()):
                raise self._too_fast(bound, bucket, wait_s)

    def count(self, operations: int, size_bytes: int) -> None:
        """Take operations and bytes of requests from the rates, or give back with negative numbers."""
        if self.operation_bucket is not None:
            self.operation_bucket.take(operations)
        if self.byte_bucket is not None:
            self.byte_bucket.take(size_bytes)

    def refusal_delay_s(self) -> float:
        """Count a refusal and return after how many seconds its caller may send more."""
        delay_s = min(self._refusals.wait_s(), LONGEST_HOLD_S)
        if delay_s < LONGEST_HOLD_S:
            self._refusals.take(1)
        return delay_s

    async def hold_refusal(self, time_left_s: float | None) -> None:
        """Hold a refused call back while more of the tenant's are refused than may be in a second.

        So a tenant that does not wait when it is refused waits for the refusal. Whoever is refused
        now and then hears so at once.

        Args:
            time_left_s: Until the caller's deadline, before which it has to know; None: it has none.
        """
        longest_s = LONGEST_HOLD_S if time_left_s is None else time_left_s / 2
        await self.held.hold(min(self.refusal_delay_s(), longest_s))

    def _too_fast(self, bound: str, bucket: TokenBucket, wait_s: float) -> DomainError:
        state = f"has reached its limit of {bucket.rate:g}"
        wait_s = (
            math.ceil(1000 * wait_s) / 1000
        )  # a client that waits so long does not come too soon
        return overloaded(bound, state, owner=self.owner, retry_after_s=wait_s, limit=bucket.rate)

    def _bucket(
        self, bucket: TokenBucket | None, rate: int | None, parts: int
    ) -> TokenBucket | None:
        """Return the bucket of a rate: the one that is there, so that a reload fills none."""
        if rate is None:
            return None
        if bucket is None:
            return TokenBucket(rate / parts, self._clock)
        bucket.rate = rate / parts
        return bucket


class TenantAdmissions:
    """The bounds of all tenants on this process."""

    def __init__(
        self,
        rates_of: Callable[[str], TenantRates],
        *,
        parts: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing in work.

        Args:
            rates_of: Returns the bounds of a tenant as they are now.
            parts: Of how many processes, that divide the bounds among them, this is one.
            clock: Monotonic seconds.
        """
        self._rates_of = rates_of
        self._parts = parts
        self._clock = clock
        self._of: dict[str, TenantAdmission] = {}

    def of(self, tenant: str) -> TenantAdmission:
        """Return what counts for one tenant."""
        found = self._of.get(tenant)
        if found is None:
            found = self._of[tenant] = TenantAdmission(self._clock)
            found.set(self._rates_of(tenant), self._parts)
        return found

    def renew(self) -> None:
        """Let the bounds hold as they are now, for open streams as well."""
        for tenant, each in self._of.items():
            each.set(self._rates_of(tenant), self._parts)


class Share:
    """What one call, or one stream, holds of the replica; given back when its `with` block ends.

    Attributes:
        principal: For whom.
        tenant: The bounds of its tenant, which count what it holds as well; None: it has none of its own.
        operations: Operations held.
        held_bytes: Bytes held.
    """

    __slots__ = ("_admissions", "_counted", "held_bytes", "operations", "principal", "tenant")

    def __init__(
        self, admission: Admission, principal: Principal, tenant: TenantAdmission | None = None
    ) -> None:
        self._admissions = (admission,) if tenant is None else (tenant, admission)
        self.principal = principal
        self.tenant = tenant
        self.operations = 0
        self.held_bytes = 0
        self._counted = (0, 0)  # operations and bytes, in the tenant's rates

    def take(self, size_bytes: int, operations: int = 0, request_bytes: int = 0) -> None:
        """Hold more, or raise OVERLOADED and hold what was held before.

        Operations are taken from the tenant's rates last: what has no room uses up none of them.

        Args:
            size_bytes: Bytes to hold.
            operations: Operations to hold.
            request_bytes: Bytes of their requests, for the rates.
        """
        held_bytes = self.held_bytes
        for each in self._admissions:
            each.check(size_bytes, operations, held_bytes)
        for each in self._admissions:
            each.request_bytes += size_bytes
            each.operations += operations
        self.held_bytes = held_bytes + size_bytes
        self.operations += operations
        if operations:
            self._count(operations, request_bytes)

    def take_transfer(self, size_bytes: int) -> None:
        """Hold a request, an upload or a download of an operation that is held, or raise OVERLOADED."""
        self.take(size_bytes)
        self._count(0, size_bytes)

    def uncount(self) -> None:
        """Give back to the tenant's rates what was taken from them."""
        operations, size_bytes = self._counted
        self._count(-operations, -size_bytes)

    def _count(self, operations: int, size_bytes: int) -> None:
        if self.tenant is not None:
            self.tenant.count(operations, size_bytes)
            counted_operations, counted_bytes = self._counted
            self._counted = counted_operations + operations, counted_bytes + size_bytes

    def has_room(self, size_bytes: int) -> bool:
        """Return whether the replica has room for so many bytes more, or others hold none of it."""
        admission = self._admissions[-1]
        return admission.request_bytes == self.held_bytes or admission.has_room(size_bytes)

    def call_when_released(self, call: Callable[[], None]) -> None:
        """Have something called once, when the replica has given something back."""
        self._admissions[-1].when_released.add(call)

    def give_back(self, size_bytes: int, operations: int = 0) -> None:
        """Release some of the held bytes and operations."""
        for each in self._admissions:
            each.request_bytes -= size_bytes
            each.operations -= operations
            if each.when_released:
                each.released()
        self.held_bytes -= size_bytes
        self.operations -= operations

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.give_back(self.held_bytes, self.operations)


def _part(limit: int | None, parts: int) -> int:
    return sys.maxsize if limit is None else max(1, limit // parts)
