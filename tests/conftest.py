"""What every test can ask for: a real store, a tenant of its own, seeded randomness."""

from __future__ import annotations

import importlib.util
import uuid
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.store.embedded import EmbeddedStore

_HERE = Path(__file__).parent
_FAULTS = _HERE / "faults"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """A real store server for the whole run, without a file; tests share it under own tenants."""
    from service.store.embedded import EmbeddedStore

    with EmbeddedStore(tmp_path_factory.mktemp("store"), durable=False) as running:
        yield running


@pytest.fixture(scope="session")
def store_url(store: EmbeddedStore) -> str:
    """The address of the run's store."""
    return store.url


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test and no earlier run has used."""
    return f"t{uuid.uuid4().hex}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Randomness seeded by the test's name: the same in every run and in any order."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the fault runs out unless they are named; they are minutes long, their instruments' tests are not."""
    is_fault_run = collection_path.parent == _FAULTS and collection_path.name.startswith("test_")
    is_named = any("faults" in argument for argument in config.args)
    return True if is_fault_run and not is_named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a missing PyTorch."""
    if importlib.util.find_spec("torch") is None:
        missing = pytest.mark.skip(reason="PyTorch is not installed (see CONTRIBUTING.md)")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(missing)
