"""Earlier releases, each from its wheel, beside the code of this checkout."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from releases import ROOT, WHEELS, Release
from scenes.fleet import start_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from instruments.processes import ServiceProcess


@pytest.fixture(scope="session", params=WHEELS, ids=lambda wheel: wheel.name.split("-py3")[0])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """An earlier release."""
    return Release.of_wheel(request.param, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="session")
def new() -> Release:
    """The code of this checkout."""
    return Release(ROOT)


@pytest.fixture(scope="session")
def servers(old: Release, new: Release, store_url: str) -> Iterator[dict[str, ServiceProcess]]:
    """A server of each release, on one store."""
    made = {"old": old.server(store_url), "new": new.server(store_url)}
    with ExitStack() as stack:
        for server in made.values():
            stack.callback(server.close)
        start_all(list(made.values()))
        yield made


@pytest.fixture
def model_id() -> str:
    """A model's name that no other test has used."""
    return f"m{uuid.uuid4().hex}"
