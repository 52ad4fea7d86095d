#!/usr/bin/env bash
# Make .venv ready: the locked dependencies and this package, editable.
# Does nothing, within milliseconds, when pyproject.toml, the lock files and the interpreter are unchanged.
# Usage: scripts/setup.sh [LOCK]   LOCK: dev (default), or bench or operate, which add to dev.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=${1:-dev}
venv=.venv

# Two runs at once would install over each other.
if command -v flock >/dev/null; then
  exec 9>"${TMPDIR:-/tmp}/timernn-setup-$(id -u)-$(pwd | cksum | cut -d' ' -f1).lock"
  flock 9
fi

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if suitable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  echo "make setup: no Python >= 3.11 found; name one with PYTHON=/path/to/python3" >&2
  return 1
}

if [[ ! -x $venv/bin/python ]] || ! suitable "$venv/bin/python"; then
  python=$(find_python)
  rm -rf "$venv"
  echo "Creating $venv with $("$python" --version)" >&2
  "$python" -m venv "$venv" || {
    echo "make setup: '$python -m venv' failed; on Debian: apt-get install python3-venv" >&2
    exit 1
  }
fi

stamp=$venv/.setup-$lock
state=$({
  "$venv/bin/python" --version
  cat pyproject.toml requirements/*.lock scripts/setup.sh
  pwd
} | cksum)
[[ -f $stamp && $(<"$stamp") == "$state" ]] && exit 0

echo "Installing requirements/$lock.lock into $venv" >&2
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
# uv takes seconds where pip takes a minute; pip is the way out where uv has no wheel or no route.
install() {
  # The machine's own certificates, the same that pip is configured to use behind a company's proxy.
  VIRTUAL_ENV=$PWD/$venv UV_SYSTEM_CERTS=1 "$venv/bin/uv" pip install --quiet "$@" 2>/dev/null ||
    "${pip[@]}" install "$@"
}
"${pip[@]}" install --require-hashes -r requirements/bootstrap.lock
install --require-hashes -r "requirements/$lock.lock"
install --no-deps --no-build-isolation --editable .
echo "$state" >"$stamp"
