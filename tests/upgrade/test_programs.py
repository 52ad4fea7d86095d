"""A program gets the same bits from every release, whichever clients and servers meet or follow each other."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from instruments.processes import ServiceProcess
    from releases import Program, Release

    Digests: TypeAlias = dict[str, str]

PARTS = 3
MODULES = ("rnn_engine", "service", "timernn")


def do_part(programs: Sequence[Program]) -> list[Digests]:
    """Let several programs do their next part at the same time."""
    for program in programs:
        program.begin_part()
    return [program.end_part() for program in programs]


def replace(server: ServiceProcess, release: Release) -> None:
    """Stop a server and start another release at the same address, on the same store."""
    assert server.terminate() == 0
    server.env = release.env
    server.start()


@pytest.fixture(scope="module")
def got(
    old: Release, new: Release, servers: dict[str, ServiceProcess]
) -> dict[tuple[str, str], list[Digests]]:
    """What a program got in each part, by the releases of its client and of its server."""
    clients = {"old": old, "new": new}
    pairs = [("new", "new"), ("old", "new"), ("new", "old")]
    with ExitStack() as stack:
        programs = [
            stack.enter_context(
                clients[client].program(servers[server].address, f"m{uuid.uuid4().hex}")
            )
            for client, server in pairs
        ]
        parts = [do_part(programs) for _ in range(PARTS)]
    return dict(zip(pairs, map(list, zip(*parts, strict=True)), strict=True))


def test_each_release_runs_its_own_code(old: Release, new: Release) -> None:
    """All three packages come from the wheel, or from this checkout."""
    code = "\n".join(f"import {name}; print({name}.__file__)" for name in MODULES)
    for release in (old, new):
        expected = [str(release.folder / name / "__init__.py") for name in MODULES]
        assert release.run("-c", code).split() == expected


@pytest.mark.parametrize(("client", "server"), [("old", "new"), ("new", "old")])
def test_a_client_at_a_server_of_another_release_gets_the_same(
    got: dict[tuple[str, str], list[Digests]], client: str, server: str
) -> None:
    """All that a program gets equals, bit for bit, what this release's client gets from its server."""
    assert got[client, server] == got["new", "new"]


def test_a_server_that_is_replaced_goes_on_with_all_that_the_other_left(
    old: Release, new: Release, got: dict[tuple[str, str], list[Digests]]
) -> None:
    """Upgrade and rollback of a server with its store, under clients of both releases.

    The last program begins after the upgrade, so that what it has made goes back to the old release.
    """
    expected = got["new", "new"]
    with ExitStack() as stack:
        server = stack.enter_context(old.server(""))
        programs = [
            stack.enter_context(release.program(server.address, f"m{uuid.uuid4().hex}"))
            for release in (old, new, new)
        ]
        assert do_part(programs[:2]) == [expected[0]] * 2
        replace(server, new)
        assert do_part(programs) == [expected[1], expected[1], expected[0]]
        replace(server, old)
        assert do_part(programs) == [expected[2], expected[2], expected[1]]
