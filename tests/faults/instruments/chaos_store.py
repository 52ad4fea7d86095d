"""Make a store's client fail before or after the real call, with a probability, by a seed.

Before: nothing happened. After: it took effect and the caller got no answer. A caller cannot tell them apart,
which is the cheapest way there is to find out whether it relies on being able to.
"""

import functools
import inspect
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast

import redis

T = TypeVar("T")
P = ParamSpec("P")

REDIS_ERRORS: tuple[type[Exception], ...] = (redis.ConnectionError, redis.TimeoutError)


class Chaos:
    """The dice, and the count of what they did."""

    def __init__(
        self,
        *,
        seed: int,
        probability: float = 0.25,
        errors: Iterable[Callable[[str], Exception]] = REDIS_ERRORS,
    ) -> None:
        """Prepare.

        Args:
            seed: Decides every draw.
            probability: That a call is hit; before and after are equally likely.
            errors: What to raise; one is drawn each time.
        """
        self.probability = probability
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._errors = tuple(errors)

    @property
    def fault_count(self) -> int:
        """How many calls were hit."""
        return self.counts["before"] + self.counts["after"]

    async def around(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make the call, or fail before it, or after it."""
        self.counts["calls"] += 1
        # Drawn before the call, so that its order among concurrent calls does not matter.
        hit = self._rng.random() < self.probability
        when = self._rng.choice(("before", "after")) if hit else "never"
        error = self._rng.choice(self._errors)(f"injected {when} the call")
        if when == "before":
            self.counts["before"] += 1
            raise error
        result = await call(*args, **kwargs)
        if when == "after":
            self.counts["after"] += 1
            raise error
        return result


def disturb_client(client: T, chaos: Chaos) -> T:
    """Hit every command and every round trip of the store's client, which is changed in place.

    A round trip is one call: it is hit as a whole.
    """
    target = cast("Any", client)
    target.execute_command = functools.partial(chaos.around, target.execute_command)
    target.round_trip = functools.partial(chaos.around, target.round_trip)
    return client


def disturb_calls(target: T, chaos: Chaos, *names: str) -> T:
    """Return a stand-in for any object whose coroutine methods fail by the dice.

    Args:
        target: A store, say; it stays as it is.
        chaos: The dice.
        names: The methods that are hit; all public ones by default.
    """
    return cast("T", _Disturbed(target, chaos, frozenset(names)))


class _Disturbed:
    """Passes everything on, coroutine methods by way of the dice."""

    def __init__(self, target: object, chaos: Chaos, names: frozenset[str]) -> None:
        self._target, self._chaos, self._names = target, chaos, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        is_meant = name in self._names or not (self._names or name.startswith("_"))
        if is_meant and inspect.iscoroutinefunction(found):
            return functools.partial(self._chaos.around, found)
        return found
