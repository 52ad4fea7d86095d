#!/usr/bin/env bash
# Build the wheel of this release and keep it where the upgrade tests find it, in tests/upgrade/wheels.
# Equal files give equal bits, whenever and wherever it is built: the files are those that git has in its
# index, the build backend is locked, and all files bear the date that CHANGELOG.md gives the release
# (today's while it gives none). That is checked by a second build.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
kept=$PWD/tests/upgrade/wheels

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git checkout-index --all --prefix="$work/source/"

cd "$work/source"
SOURCE_DATE_EPOCH=$("$python" - <<'PY'
import datetime, pathlib, re, tomllib

version = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["version"]
heading = rf"^## \[{re.escape(version)}\] - (\S+)$"
found = re.search(heading, pathlib.Path("CHANGELOG.md").read_text(), re.MULTILINE)
now = datetime.datetime.now(datetime.UTC)
day = datetime.date.fromisoformat(found[1]) if found else now.date()
print(int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp()))
PY
)
export SOURCE_DATE_EPOCH

build() {
  local output
  output=$("$python" -P -m hatchling build --target wheel --directory "$1" 2>&1) || {
    echo "$output" >&2
    return 1
  }
}
build "$work/once"
find . -exec touch {} + # as another checkout would have them
build "$work/again"
wheel=$(cd "$work/once" && echo *.whl)
cmp "$work/once/$wheel" "$work/again/$wheel"

mkdir -p "$kept"
cp "$work/once/$wheel" "$kept/$wheel"
cd "$kept"
sha256sum "$wheel"
