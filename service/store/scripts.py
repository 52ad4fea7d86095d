"""Loads and runs the Lua scripts: one file each in `lua/`, named as the method that calls it.

What several scripts need stands once in `lua/lib/`; a script gets only the files that its head names.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from service.deadlines import Deadlines
from service.domain.errors import Unavailable
from service.store.cluster import ClusterRouter
from service.store.failures import (
    RETRY_AFTER_S,
    as_domain_error,
    is_lost_connection,
    is_missing_script,
    is_refused,
    is_refused_by_primary,
    is_unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.store.links import Command, StoreClient

WAIT_MARK = b"timernn-wait"  # the key that is written so that WAIT has something to wait for
# A script, because a full store takes a write from one that says so: there too replays are covered.
_WRITE_MARK = "#!lua flags=allow-oom\nredis.call('SET', KEYS[1], 1)"
_READS_ONLY = "flags=no-writes"
_LIBRARY = re.compile(r"^-- Library: (.+)$", re.MULTILINE)
_FUNCTION = re.compile(r"^local function (\w+)", re.MULTILINE)
_CONSTANT = re.compile(r"^local ([A-Z]\w*) <const> = ('[^']*'|\d+)[^\n]*\n", re.MULTILINE)
_TOKEN = re.compile(r"--[^\n]*|'(?:\\.|[^'\\])*'|\b\w+\b")

Argument = bytes | memoryview | str | int


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text and the digest by which the server knows it.

    Attributes:
        reader: The same as one that may not write, if it may: the server runs it where it refuses
            writes, and lets it come as far as it gets by reading.
    """

    name: str
    text: str
    sha: str
    reader: Script | None = None


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One call of a script; `first` is sent right before it, whenever it is sent."""

    script: Script
    keys: Sequence[bytes]
    arguments: Sequence[Argument]
    first: Sequence[Command] = ()

    @property
    def by_digest(self) -> Command:
        """The command that names the script by its digest."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)

    @property
    def by_text(self) -> Command:
        """The command that carries the script."""
        return ("EVAL", self.script.text, len(self.keys), *self.keys, *self.arguments)


def load_script(name: str) -> Script:
    """Read a script of this package, complete with what it uses of the library."""
    text = with_library(_read(f"{name}.lua"))
    first, _, rest = text.partition("\n")
    if _READS_ONLY in first:
        return _script(name, text)
    return _script(name, text, _script(name, f"#!lua {_READS_ONLY}\n{rest}"))


def with_library(text: str) -> str:
    """Complete a script with the functions that it uses of the library files that its head names.

    A run makes every function and every variable of a script anew. So functions that it does not use
    are left out, and a constant (`local NAME <const> = value`) becomes its value where it is used.
    """
    first, _, body = text.partition("\n")
    library = library_of(text)
    for block in reversed([block for file in library.values() for block in file.split("\n\n")]):
        function = _FUNCTION.search(block)
        if function and re.search(rf"\b{function[1]}\b", body):
            body = f"{block.strip()}\n\n{body}"
    values = dict(_CONSTANT.findall("\n".join([*library.values(), text])))
    body = _CONSTANT.sub("", body)
    folded = _TOKEN.sub(lambda token: values.get(token[0], token[0]), body)
    return f"{first}\n{folded}"


def library_of(text: str) -> dict[str, str]:
    """Return the library files that a Lua file names, and before each those that it names itself."""
    found: dict[str, str] = {}
    for names in _LIBRARY.findall(text):
        for name in names.split(", "):
            file = _read(f"lib/{name}.lua")
            found |= library_of(file) | {name: file}
    return found


def _read(path: str) -> str:
    return resources.files("service.store").joinpath("lua", path).read_text("utf-8")


def _script(name: str, text: str, reader: Script | None = None) -> Script:
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(name, text, sha, reader)


class Ran(NamedTuple):
    """What came of a call: its script's answer, and those to what was sent before; or failures."""

    answer: Any
    first: Sequence[Any]


class ScriptRunner:
    """Sends scripts to the server, one by one or many in a round trip.

    Every script decides by what it finds, so one whose answer was lost is sent once more: it finds
    its own work and says so. The server may forget scripts at any time; then the text is sent.

    A script that the primary refuses as a whole, having no room or nobody to copy it to, is sent again
    as its own reader. Whatever it says without a write, that a call is a replay, a rival's or too late,
    is its answer; where it comes to a write, nothing was decided and the refusal is the answer.

    With `wait_replicas` an answer counts only once so many replicas have what was written before it.
    WAIT asks for what its own connection wrote, so each round trip writes a mark of its own first:
    then even the answer to a call that had nothing left to write, a replay, is covered.

    Attributes:
        is_cluster: Whether a script may see one hash slot only.
    """

    def __init__(
        self,
        client: StoreClient | ClusterRouter,
        *,
        connections: int = 32,
        patience_s: float = 0.5,
        wait_replicas: int = 0,
        wait_ms: int = 0,
        resends: int = 1,
    ) -> None:
        """Use this client, whose own retries are off.

        Args:
            client: Of one server, or the router of a cluster.
            connections: Round trips to one server under way at once; not every pool of redis-py can
                wait for a connection to become free.
            patience_s: How long to wait for one of these.
            wait_replicas: How many replicas an answer waits for.
            wait_ms: How long it waits for them.
            resends: How often to send again over another connection.
        """
        self._client = client
        self.is_cluster = isinstance(client, ClusterRouter)
        self._trips = asyncio.Semaphore(connections)
        self._patience = Deadlines(patience_s)
        self._wait_replicas = wait_replicas
        self._wait_ms = wait_ms
        self._resends = resends

    def node_of(self, key: bytes) -> object:
        """Return the node that serves a key as far as is known, None where the store is one server."""
        return self._client.node_of(key) if isinstance(self._client, ClusterRouter) else None

    async def run(self, call: ScriptCall) -> Any:
        """Run one script.

        Raises:
            Unavailable: If the server cannot be reached.
            ResourceExhausted: If its memory is full.
            UnsupportedLayout: If it met what another release laid out.
        """
        (ran,) = await self.run_many([call])
        if isinstance(ran.answer, Exception):
            raise ran.answer
        return ran.answer

    async def run_many(self, calls: Sequence[ScriptCall]) -> list[Ran]:
        """Run scripts in one round trip; a failure stands in its script's place.

        One that is sent again comes after the others.
        """
        ran = await self._send_calls(calls, with_text=False)
        if not _has_failure(ran):
            return ran
        ran = await self._send_again(calls, ran)
        ran = await self._read_where_refused(calls, ran)
        return [_in_domain_words(call, one) for call, one in zip(calls, ran, strict=True)]

    async def _send_calls(self, calls: Sequence[ScriptCall], *, with_text: bool) -> list[Ran]:
        """Send scripts once, each with its text or by its digest."""
        commands: list[Command] = []
        for call in calls:
            commands += (*call.first, call.by_text if with_text else call.by_digest)
        answers = await self._send(calls[0].script.name, commands)
        # A script decides by what it finds: it says what was done, whatever became of what was sent
        # before it.
        ran, start = [], 0
        for call in calls:
            end = start + len(call.first)
            ran.append(Ran(answers[end], answers[start:end]))
            start = end + 1
        return ran

    async def _send_again(self, calls: Sequence[ScriptCall], ran: list[Ran]) -> list[Ran]:
        """Send scripts again whose answers were lost, or which the server did not know.

        What was lost once stays so if it is refused then.
        """
        ran = list(ran)
        for attempt in range(self._resends + 1):
            again = [
                i for i, one in enumerate(ran) if self._is_worth_resending(one.answer, attempt)
            ]
            if not again:
                break
            resent = await self._send_calls([calls[i] for i in again], with_text=True)
            for i, one in zip(again, resent, strict=True):
                if is_missing_script(ran[i].answer) or not is_refused(one.answer):
                    ran[i] = one
        return ran

    async def _read_where_refused(self, calls: Sequence[ScriptCall], ran: list[Ran]) -> list[Ran]:
        """Send scripts that the primary refused once more, as their own readers."""
        ran = list(ran)
        readers = {
            i: replace(call, script=call.script.reader, first=())
            for i, call in enumerate(calls)
            if call.script.reader and is_refused_by_primary(ran[i].answer)
        }
        if readers:
            some = list(readers.values())
            read = await self._send_again(some, await self._send_calls(some, with_text=False))
            for i, (answer, _) in zip(readers, read, strict=True):
                if not isinstance(answer, Exception) or is_unsupported(answer):
                    ran[i] = ran[i]._replace(answer=answer)
        return ran

    async def run_commands(
        self, commands: Sequence[Command], *, answer_bytes: int = 0
    ) -> list[Any]:
        """Run plain commands, each good to be sent twice, in one round trip.

        Args:
            commands: What to run.
            answer_bytes: How much the answers may bring: they are given time for it.

        Raises:
            Unavailable, ResourceExhausted: The first failure.
        """
        name = commands[0][0]
        answers = await self._send(name, commands, answer_bytes)
        for _ in range(self._resends):
            if any(is_lost_connection(answer) for answer in answers):
                answers = await self._send(name, commands, answer_bytes)
        for answer in answers:
            if isinstance(answer, Exception):
                raise as_domain_error(answer)
        return answers

    def _is_worth_resending(self, answer: object, attempt: int) -> bool:
        return is_missing_script(answer) or (is_lost_connection(answer) and attempt < self._resends)

    async def _send(
        self, name: str, commands: Sequence[Command], answer_bytes: int = 0
    ) -> list[Any]:
        client, sent = self._client, commands
        if isinstance(client, ClusterRouter):
            return await client.send(commands, answer_bytes, name)
        if self._wait_replicas:
            mark = ("EVAL", _WRITE_MARK, 1, WAIT_MARK)
            sent = (*commands, mark, ("WAIT", self._wait_replicas, self._wait_ms))
        try:
            if self._trips.locked():
                await self._patience.bound(self._trips.acquire())
            else:
                await self._trips.acquire()
        except TimeoutError as error:
            return [error] * len(commands)
        try:
            answers = await client.round_trip(sent, answer_bytes, name)
        except Exception as error:  # noqa: BLE001 - every failure becomes the answer of each command
            return [error] * len(commands)
        finally:
            self._trips.release()
        return self._acknowledged(answers) if self._wait_replicas else answers

    def _acknowledged(self, answers: list[Any]) -> list[Any]:
        """Take the answers as given only if enough replicas have what they stand on."""
        *given, mark, reached = answers
        is_marked = not isinstance(mark, Exception)
        if is_marked and isinstance(reached, int) and reached >= self._wait_replicas:
            return given
        text = "no replica has acknowledged in time; send the same call again"
        lost = Unavailable("UNKNOWN_OUTCOME", text, retry_after_s=RETRY_AFTER_S)
        return [a if isinstance(a, Exception) else lost for a in given]


def _has_failure(ran: Sequence[Ran]) -> bool:
    """Return whether there is an error among the answers, or among those to what was sent before."""
    for answer, first in ran:
        if isinstance(answer, Exception):
            return True
        for one in first:
            if isinstance(one, Exception):
                return True
    return False


def _in_domain_words(call: ScriptCall, ran: Ran) -> Ran:
    is_decision = call.script.reader is not None
    return Ran(
        as_domain_error(ran.answer, is_decision=is_decision)
        if isinstance(ran.answer, Exception)
        else ran.answer,
        [as_domain_error(one) if isinstance(one, Exception) else one for one in ran.first],
    )
