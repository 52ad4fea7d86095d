"""What one model's training does when asked one thing at a time.

Contributions are counted once, an Update takes them once and moves the head by one, and a request
id is remembered. Digests of versions that nobody has seen yet are None and are learned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from instruments.history import Refused

# What the session's side may refuse; it changes nothing on the model's.
_OF_THE_SESSION = (
    "EPOCH_FENCED",
    "SEQ_GAP",
    "HISTORY_FORKED",
    "TAPE_MISSING",
    "SESSION_CLOSED",
    "SESSION_NOT_FOUND",
    "VERSION_GONE",
)


class Version(NamedTuple):
    """A weights version: its number and the digest of its content."""

    number: int
    digest: str


@dataclass(frozen=True, slots=True)
class Contribute:
    """Send a Backward.

    Attributes:
        name: Names the contribution: session, epoch and chunk.
        digest: Fingerprint of `dhs` and options.
        version: The version that the Forward's answer named.
        resent: Whether the caller resends by itself.
    """

    name: str
    digest: str
    version: Version
    resent: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """Make one optimizer step.

    Attributes:
        request_id: Names the request.
        names: The contributions to take; None takes all that wait.
        expected: The head that must be there; None is any.
        options: Fingerprint of the hyperparameters.
        resent: Whether the caller resends by itself.
    """

    request_id: str
    names: frozenset[str] | None = None
    expected: Version | None = None
    options: str = ""
    resent: bool = False


@dataclass(frozen=True, slots=True)
class Discard:
    """Throw away the contributions named, or all that wait."""

    names: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class ReadHead:
    """Read the head of the model."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A gradient: the version it was made with and its fingerprint."""

    version: Version
    gradient: str
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Updated:
    """The new head and how many contributions went into it."""

    version: Version
    count: int
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Discarded:
    """The contributions are gone."""


@dataclass(frozen=True, slots=True)
class HeadAt:
    """The head of the model."""

    version: Version


TrainingAsk = Contribute | Update | Discard | ReadHead
TrainingAnswer = Counted | Updated | Discarded | HeadAt | Refused


@dataclass(frozen=True, slots=True)
class _Contribution:
    name: str
    digest: str
    gradient: str | None


@dataclass(frozen=True, slots=True)
class _Made:
    terms: Update
    number: int
    count: int


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A model: digests of its versions from `first` on, contributions, requests that were done."""

    first: int
    digests: tuple[str | None, ...]
    counted: frozenset[_Contribution] = frozenset()
    waiting: frozenset[str] = frozenset()
    made: frozenset[_Made] = frozenset()

    @property
    def head(self) -> int:
        """Number of the newest version."""
        return self.first + len(self.digests) - 1

    def learn(self, version: Version) -> "TrainingState | None":
        """Return the state with what was seen of a version; None where that contradicts."""
        at = version.number - self.first
        if not 0 <= at < len(self.digests) or self.digests[at] not in (None, version.digest):
            return None
        seen = (*self.digests[:at], version.digest, *self.digests[at + 1 :])
        return replace(self, digests=seen)


class ModelModel:
    """One contribution a Backward, one step an Update, for one model."""

    def __init__(self, start: Version) -> None:
        """Start with a model whose head is `start` and that nothing waits for."""
        self._start = TrainingState(start.number, (start.digest,))

    def initial(self) -> TrainingState:
        """Return the model as it was made."""
        return self._start

    def step(
        self, state: TrainingState, ask: TrainingAsk, answer: TrainingAnswer | None
    ) -> Iterator[TrainingState]:
        """Yield the states after `ask` was answered `answer`."""
        if isinstance(ask, Contribute):
            yield from _contribute(state, ask, answer)
        elif isinstance(ask, Update):
            yield from _update(state, ask, answer)
        elif isinstance(ask, Discard):
            if answer is None or isinstance(answer, Discarded):
                gone = state.waiting if ask.names is None else ask.names
                yield replace(state, waiting=state.waiting - gone)
        elif answer is None:
            yield state
        elif isinstance(answer, HeadAt) and answer.version.number == state.head:
            yield from _if_any(state.learn(answer.version))


def _contribute(
    state: TrainingState, ask: Contribute, answer: TrainingAnswer | None
) -> Iterator[TrainingState]:
    """Count a contribution, or answer again without counting."""
    known = next((c for c in state.counted if c.name == ask.name), None)
    if isinstance(answer, Refused) and answer.reason in _OF_THE_SESSION:
        if known or not answer.counted:
            yield state
    elif known is not None and known.digest != ask.digest:
        yield from _refused(state, answer, "SEQ_REUSED")
    elif answer is None:
        yield state if known else _count(state, ask, None)
    elif isinstance(answer, Counted) and answer.version == ask.version:
        seen = state.learn(ask.version)
        if seen is not None and known is None and (ask.resent or not answer.replayed):
            yield _count(seen, ask, answer.gradient)
        if seen is not None and known is not None and answer.replayed:
            yield from _recount(seen, known, answer.gradient)


def _count(state: TrainingState, ask: Contribute, gradient: str | None) -> TrainingState:
    new = _Contribution(ask.name, ask.digest, gradient)
    return replace(state, counted=state.counted | {new}, waiting=state.waiting | {ask.name})


def _recount(state: TrainingState, known: _Contribution, gradient: str) -> Iterator[TrainingState]:
    """Give the same gradient again, which is learned if nobody had seen it."""
    if known.gradient in (None, gradient):
        seen = replace(known, gradient=gradient)
        yield replace(state, counted=state.counted - {known} | {seen})


def _update(
    state: TrainingState, ask: Update, answer: TrainingAnswer | None
) -> Iterator[TrainingState]:
    """Make one step, or answer again a request that was done."""
    made = next((m for m in state.made if m.terms.request_id == ask.request_id), None)
    if made is not None:
        yield from _update_again(state, made, ask, answer)
        return
    names = state.waiting if ask.names is None else ask.names
    are_there = bool(names) and names <= state.waiting
    if not are_there:
        yield from _refused(state, answer, "NO_GRADIENTS")
    base: TrainingState | None = state
    if ask.expected is not None:
        if ask.expected != (state.head, state.digests[-1]):
            yield from _refused(state, answer, "VERSION_CONFLICT")
        base = state.learn(ask.expected) if ask.expected.number == state.head else None
    if are_there and base is not None:
        yield from _step(base, names, ask, answer)


def _step(
    state: TrainingState, names: frozenset[str], ask: Update, answer: TrainingAnswer | None
) -> Iterator[TrainingState]:
    """Take the contributions and move the head by one."""
    number, digest = state.head + 1, None
    if answer is not None:
        if not isinstance(answer, Updated) or (answer.replayed and not ask.resent):
            return
        if (answer.version.number, answer.count) != (number, len(names)):
            return
        digest = answer.version.digest
    yield replace(
        state,
        digests=(*state.digests, digest),
        waiting=state.waiting - names,
        made=state.made | {_Made(replace(ask, resent=False), number, len(names))},
    )


def _update_again(
    state: TrainingState, made: _Made, ask: Update, answer: TrainingAnswer | None
) -> Iterator[TrainingState]:
    if made.terms != replace(ask, resent=False):
        yield from _refused(state, answer, "REQUEST_ID_REUSED")
    elif answer is None:
        yield state
    elif (
        isinstance(answer, Updated)
        and answer.replayed
        and (answer.version.number, answer.count) == (made.number, made.count)
    ):
        yield from _if_any(state.learn(answer.version))


def _refused(
    state: TrainingState, answer: TrainingAnswer | None, *reasons: str
) -> Iterator[TrainingState]:
    if answer is None or (isinstance(answer, Refused) and answer.reason in reasons):
        yield state


def _if_any(state: TrainingState | None) -> Iterator[TrainingState]:
    if state is not None:
        yield state
