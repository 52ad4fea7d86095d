"""Trying again: with the same content, on the next address, within a deadline and a budget."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from timernn import errors
from timernn._core.arguments import positive_number, rate, refusal
from timernn._core.credentials import Credentials
from timernn._core.effects import AskToken, RpcCall, Sleep
from timernn._core.refusals import Proof, proof_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from timernn._core.contract import Rpc
    from timernn._core.effects import Effect, Op

Q = TypeVar("Q")
A = TypeVar("A")
# A stream is left for a new one after this time at the latest, so that a replica that hangs is
# noticed without a watcher for each stream: reopening costs one round trip.
STREAM_TIMEOUT_S = 60.0
_NO_CONNECTION = (errors.NoServer, errors.TlsFailed)
_ABOVE_ZERO = ("attempt_timeout_s", "budget_per_s")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How failed calls are tried again.

    Attributes:
        initial_backoff_s: Wait before the first retry.
        multiplier: Each further wait is this much longer.
        max_backoff_s: The longest wait.
        jitter: Share of each wait that is left to chance, so that clients do not come in step.
        attempt_timeout_s: How long one attempt may take before the next address is tried; doubled
            after each attempt that took so long.
        budget: Retries that may be made in a burst over the whole client.
        budget_per_s: Retries that may be made per second for long; beyond that they wait.
    """

    initial_backoff_s: float = 0.05
    multiplier: float = 2.0
    max_backoff_s: float = 2.0
    jitter: float = 0.5
    attempt_timeout_s: float = 15.0
    budget: float = 100.0
    budget_per_s: float = 20.0

    def __post_init__(self) -> None:
        """Refuse what cannot be waited or counted.

        Raises:
            BadField: If a value is no number, or outside its range.
        """
        for field in fields(self):
            name, value = f"retry.{field.name}", getattr(self, field.name)
            check = positive_number if field.name in _ABOVE_ZERO else rate
            check(name, value)
        if self.jitter > 1 or self.multiplier < 1:
            raise refusal("retry", "jitter up to 1 and a multiplier of at least 1", self)

    def backoff_s(self, retries: int, chance: float) -> float:
        """Return the wait before retry number `retries`, counted from 0, in seconds."""
        # The exponent is capped: 2.0 ** 1100 is an OverflowError, not a long wait.
        longest = self.initial_backoff_s * self.multiplier ** min(retries, 60)
        return min(self.max_backoff_s, longest) * (1.0 - self.jitter * chance)


def is_worth_retrying(error: errors.Error) -> bool:
    """Return whether the same request may succeed when it is simply sent again."""
    if isinstance(error, errors.Unavailable | errors.DeadlineExceeded | errors.Cancelled):
        return True
    # An ABORTED without a reason of ours asks for the same again; with one, it decides.
    return isinstance(error, errors.Overloaded) or (
        isinstance(error, errors.Aborted) and not error.reason
    )


class Attempt(NamedTuple):
    """Where a request is sent, and with which token.

    Attributes:
        address: The number of the target.
        token: The number of the token.
    """

    address: int
    token: int


class Budget:
    """A bucket of retries for the whole client: it drains with each retry and fills with time."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self._tokens, self._filled = policy.budget, clock()

    def spend(self) -> float:
        """Take one retry; return how long to wait until it is covered, in seconds."""
        now = self._clock()
        gained = (now - self._filled) * self._policy.budget_per_s
        self._tokens = min(self._policy.budget, self._tokens + gained) - 1.0
        self._filled = now
        return max(0.0, -self._tokens / self._policy.budget_per_s)


class Caller:
    """Makes calls that survive lost replies, restarts and moves to another replica.

    The address in use is kept until it fails: a replica that knows a session answers faster.

    Args:
        addresses: Targets by name; effects name them by index.
        policy: How to retry.
        timeout_s: Seconds for a whole call with all its attempts.
        connect_timeout_s: The same until something has answered for the first time, so that a
            mistyped address is reported soon.
        credentials: What each call carries.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        addresses: list[str],
        policy: RetryPolicy,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        credentials: Credentials | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.addresses, self.policy, self.clock = addresses, policy, clock
        self.credentials = Credentials() if credentials is None else credentials
        self.timeout_s = timeout_s
        self.address = 0
        self._connect_timeout_s = connect_timeout_s
        self._has_answered = False
        self._budget = Budget(policy, clock)
        # Jitter only: nothing here has to be unpredictable.
        self._random = random.Random()  # noqa: S311

    def deadline(self) -> float:
        """Return when a call that begins now has to be over, on the clock."""
        return self.clock() + self.timeout_s

    def call(self, rpc: Rpc[Q, A], request: Q, deadline: float | None = None) -> Op[A]:
        """Make a unary call; raises the last attempt's error."""
        return self.attempts(
            lambda address, timeout: RpcCall(rpc, request, address, timeout), deadline
        )

    def attempts(
        self, effect: Callable[[int, float], Effect], deadline: float | None = None
    ) -> Op[Any]:
        """Carry out an effect, given its address and timeout, until it answers or time is over."""
        patience = Patience(self, deadline)
        while True:
            attempt = Attempt(self.address, self.credentials.number)
            try:
                attempt = yield from self.begin()
                answer = yield effect(attempt.address, patience.attempt_timeout_s())
            except errors.Error as error:
                yield from patience.after(error, attempt)
            else:
                self._has_answered = True
                return answer

    def begin(self) -> Op[Attempt]:
        """Return where the next attempt goes, once there is a token to send with it.

        Raises:
            NoCredentials: If the callable has none.
        """
        if self.credentials.is_due:
            yield AskToken(self.credentials)
        return Attempt(self.address, self.credentials.number)

    def is_worth_retrying(self, error: errors.Error) -> bool:
        """Return whether the same request may succeed when it is sent again, with another token."""
        return is_worth_retrying(error) or self.wants_token(error)

    def wants_token(self, error: errors.Error) -> bool:
        """Return whether the server refuses a token in whose place there may be another."""
        is_refused = isinstance(error, errors.Unauthenticated)
        is_without = isinstance(error, errors.NoCredentials)
        return self.credentials.can_renew and is_refused and not is_without

    def move_on(self, failed: int) -> None:
        """Turn to the next address unless another call has done so already."""
        if self.address == failed:
            self.address = (failed + 1) % len(self.addresses)

    def delay_s(self, retries: int, error: errors.Error) -> float:
        """Return how long to wait before a retry, in seconds, and charge the budget."""
        wait = self.policy.backoff_s(retries, self._random.random())
        return max(wait, error.retry_after_s or 0.0, self._budget.spend())

    def note(self, error: errors.Error) -> None:
        """Take a typed answer as a sign of life."""
        self._has_answered = self._has_answered or _is_answer(error)

    def latest(self, deadline: float, started: float, *, is_nobody_there: bool = False) -> float:
        """Return the deadline that counts while nothing has answered yet.

        A third of the time is enough to find that nothing listens; a server that is known may be
        about to come back.
        """
        if self._has_answered:
            return deadline
        share = 1 / 3 if is_nobody_there else 1.0
        return min(deadline, started + share * self._connect_timeout_s)


class Patience:
    """How long and how often one request is tried: the memory of a retry loop.

    Attributes:
        may_be_carried_out: Whether the outcome of an attempt so far is unknown.
    """

    def __init__(self, caller: Caller, deadline: float | None = None) -> None:
        self._caller = caller
        self._started = caller.clock()
        self._deadline = caller.deadline() if deadline is None else deadline
        self._attempt_s = caller.policy.attempt_timeout_s
        self.may_be_carried_out = False
        self._failures = 0
        self._retries = 0
        self._clearest: errors.Error | None = None
        self._refused: dict[int, errors.Error] | None = {}
        self._has_new_token = False

    def attempt_timeout_s(self) -> float:
        """Return how long the next attempt may take, in seconds."""
        left = self._caller.latest(self._deadline, self._started) - self._caller.clock()
        return max(0.001, min(left, self._attempt_s))

    def after(self, error: errors.Error, attempt: Attempt) -> Op[None]:
        """Wait before the next attempt elsewhere, or raise the error when there is to be none.

        A token that is refused is left for a new one, once, and without a wait.
        """
        caller = self._caller
        caller.note(error)
        self._failures += 1
        proof = proof_of(error)
        self.may_be_carried_out |= error.is_outcome_unknown or proof is Proof.NOTHING
        error.attempts = self._failures
        error._had_unknown_attempt = self.may_be_carried_out  # noqa: SLF001  # one package
        error.is_outcome_unknown = self.may_be_carried_out and proof is not Proof.REQUEST
        if caller.wants_token(error) and not self._has_new_token:
            self._has_new_token = True
            caller.credentials.refuse(attempt.token)
            return
        if not is_worth_retrying(error):
            raise error
        if isinstance(error, errors.DeadlineExceeded):
            self._attempt_s *= 2
        if self._is_clearer(error):
            self._clearest = error
        wait = caller.delay_s(self._retries, error)
        is_nobody_there = self._is_nobody_there(error, attempt.address)
        latest = caller.latest(self._deadline, self._started, is_nobody_there=is_nobody_there)
        if caller.clock() + wait >= latest:
            raise self._clearest_error(error, is_nobody_there=is_nobody_there)
        caller.move_on(attempt.address)
        self._retries += 1
        yield Sleep(wait)

    def _is_nobody_there(self, error: errors.Error, address: int) -> bool:
        """Return whether every address has been tried and no connection was made to any."""
        if not isinstance(error, _NO_CONNECTION):
            self._refused = None
        elif self._refused is not None:
            self._refused[address] = error
        return self._refused is not None and len(self._refused) == len(self._caller.addresses)

    def _no_server(self) -> str:
        tries = "1 try" if self._failures == 1 else f"{self._failures} tries"
        addresses = self._caller.addresses
        text = f"no server at {', '.join(addresses)} after {tries}"
        refused = (self._refused or {}).values()
        hosts = [error.metadata["host"] for error in refused if "host" in error.metadata]
        if hosts:
            names = list(dict.fromkeys(hosts))
            text += f": the name{'s' * (len(names) > 1)} {' and '.join(names)} cannot be resolved"
        return text if len(hosts) == len(addresses) else f"{text}; is `timernn serve` running?"

    def _is_clearer(self, error: errors.Error) -> bool:
        """Return whether an error is to be raised rather than those before it.

        What a server answers and TLS that failed name what is wrong. TLS that failed is also the reason where a
        later connection was refused or not made in time, and any other failure says more than that time is over.
        """
        before = self._clearest
        if before is None or isinstance(error, errors.TlsFailed) or _is_answer(error):
            return True
        return not isinstance(error, errors.DeadlineExceeded) and not isinstance(
            before, errors.TlsFailed
        )

    def _clearest_error(self, last: errors.Error, *, is_nobody_there: bool) -> errors.Error:
        """Return the error to raise, with what is known after the last."""
        error = self._clearest or last
        error.attempts, error.is_outcome_unknown = last.attempts, last.is_outcome_unknown
        if is_nobody_there and isinstance(error, errors.NoServer):
            error.message = self._no_server()
        return error


def _is_answer(error: errors.Error) -> bool:
    return bool(error.reason) and not isinstance(error, _NO_CONNECTION)
