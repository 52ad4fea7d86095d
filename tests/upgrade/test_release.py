"""What a release consists of is complete; CONTRIBUTING.md lists the places."""

from __future__ import annotations

import re
import tomllib
import zipfile

import pytest

from releases import ROOT, WHEELS

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
NEWEST = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.MULTILINE)[:1]


def test_the_wheels_are_releases() -> None:
    """Each wheel is of the version that its name says."""
    assert WHEELS
    for path in WHEELS:
        version = path.name.split("-")[1]
        with zipfile.ZipFile(path) as wheel:
            metadata = wheel.read(f"timernn-{version}.dist-info/METADATA").decode()
        assert f"\nVersion: {version}\n" in metadata


@pytest.mark.parametrize("version", NEWEST)
def test_the_newest_release_is_at_all_its_places(version: str) -> None:
    """The newest section of CHANGELOG.md has its version, image, wheel and recorded store."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    for name in ("compose.yaml", "kubernetes/timernn.yaml"):
        tags = re.findall(r"image: timernn:(\S+)", (ROOT / "docker" / name).read_text())
        assert set(tags) == {version}
    assert f"ARG VERSION={version}\n" in (ROOT / "docker" / "Dockerfile").read_text()
    assert f"timernn-{version}-py3-none-any.whl" in {path.name for path in WHEELS}
    assert (ROOT / "tests" / "recorded" / f"{version}.jsonl").exists()
