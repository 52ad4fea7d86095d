"""What the server reports of its work while it works, for metrics and traces to be made from.

`build_server` makes one `Observer` and hands it to whatever does something worth seeing. Each method is called on the
event loop, right when what it names has ended: something that took `duration_s` began so long before. asyncio copies
contextvars into the callbacks and tasks that an operation starts, so an observer that keeps a trace in one finds
it again in a batch and in a round trip: that of the first operation in them.

Durations are in seconds, as Prometheus has them, measured by `time.perf_counter`; sizes are in bytes. Every name is one of a
small fixed set, fit for a label: no session, tenant or model, nothing that a client wrote.

A lone streamed chunk makes five calls: that its operation began, its batch, its round trip, that it was applied, that its
operation ended. What a method costs is paid there. That is why caches do not call for each lookup: they count in integers of their own, which an observer
reads when it is asked for figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclass(slots=True)
class CacheCounts:
    """What a cache counts of itself, from the start of the process.

    Attributes:
        hits: Lookups that found what they looked for.
        misses: Lookups that did not.
        size_bytes: What its values weigh now; 0 where a cache is not bounded in bytes.
    """

    hits: int = 0
    misses: int = 0
    size_bytes: int = 0


class Observer:
    """Sees what happens, and ignores it: a subclass takes what it is interested in. No method may raise or block."""

    def rpc_started(
        self, method: str, metadata: Callable[[], Iterable[tuple[str, str | bytes]] | None]
    ) -> None:
        """See a call begin, as gRPC counts calls: a Stream is one, however many operations it carries.

        Args:
            method: Its path, such as "/timernn.v1.TimeRnnService/Stream".
            metadata: Returns what came with it, which may hold where its trace began, and secrets.
        """

    def rpc_ended(self, method: str, *, code: str, duration_s: float) -> None:
        """See a call end.

        Args:
            method: Its path.
            code: The name of its status code, such as "OK" or "UNAVAILABLE".
            duration_s: From when the server was given it.
        """

    def operation_started(
        self, kind: str, headers: Callable[[], Iterable[tuple[str, str]]]
    ) -> None:
        """See an operation of a Stream begin, in a context of its own; one that is a call begins with the call.

        Args:
            kind: The method that it stands for, in snake case: "forward".
            headers: Returns what came with it as metadata comes with a call: where its trace began.
        """

    def operation_ended(
        self,
        kind: str,
        *,
        outcome: str,
        code: str,
        duration_s: float,
        request_bytes: int,
        answer_bytes: int,
    ) -> None:
        """See an operation end: a unary call, an upload or download, or one operation of a Stream.

        Called in the context of its call, and before its end if it is one; of a Stream's, in its own.

        Args:
            kind: The method that it is or stands for, in snake case: "forward", "open_session".
            outcome: "OK", or the reason of the refusal or failure, such as "SEQ_GAP".
            code: The name of its status code, such as "OK" or "ABORTED".
            duration_s: From when it was read, or on a Stream started: after those before it of its session.
            request_bytes: Its message, or its part of a message of many.
            answer_bytes: What it is answered with; 0 for a refusal.
        """

    def chunk_applied(self, *, tape_bytes: int) -> None:
        """See that a chunk was committed, whether or not somebody still waits for its answer.

        Args:
            tape_bytes: Written with it for its Backward; 0 in INFER mode.
        """

    def chunk_replayed(self) -> None:
        """See that a chunk which had been applied before was answered again."""

    def contribution_recorded(self, *, gradient_bytes: int) -> None:
        """See that a Backward left a contribution, for the first time.

        Args:
            gradient_bytes: Written for it.
        """

    def version_published(self, *, contributions: int, version_bytes: int) -> None:
        """See that a model has a new head.

        Args:
            contributions: Taken by the optimizer step that made it; 0 if it was uploaded or restored.
            version_bytes: Weights and moments, written for it.
        """

    def batch_computed(
        self, *, chunks: int, rows: int, work: int, wait_s: float, duration_s: float
    ) -> None:
        """See that chunks were computed together.

        Args:
            chunks: How many.
            rows: Of all of them.
            work: Multiply-adds, roughly.
            wait_s: Between when the first of them was queued and the start of the computation.
            duration_s: The computation.
        """

    def round_trip_ended(
        self,
        name: str,
        *,
        commands: int,
        duration_s: float,
        sent_bytes: int,
        received_bytes: int,
        is_lost: bool,
    ) -> None:
        """See that commands were sent to one server of the store, and answered or not.

        Args:
            name: The script that was run, the first if there were several, else the first command.
            commands: How many were sent.
            duration_s: From when a connection was asked for.
            sent_bytes: On the wire.
            received_bytes: Of the values in the answers, without what frames them.
            is_lost: Whether the connection broke or no answer came in time.
        """

    def cache_added(self, name: str, counts: CacheCounts) -> None:
        """Learn of a cache, once, before it is used.

        Args:
            name: What it holds: "sessions", "heads", "weights", "moments", "tapes", "gradients".
            counts: Read by the observer at any later time.
        """


class Observers(Observer):
    """Shows everything to several observers, one after another."""

    def __init__(self, *observers: Observer) -> None:
        """Keep them; each method of `Observer` becomes one that calls theirs."""
        for name in vars(Observer):
            if not name.startswith("_"):
                setattr(self, name, _each([getattr(observer, name) for observer in observers]))


def _each(methods: Sequence[Callable[..., None]]) -> Callable[..., None]:
    def call(*arguments: Any, **values: Any) -> None:
        for method in methods:
            method(*arguments, **values)

    return call


NULL_OBSERVER: Final = Observer()
