#!/usr/bin/env bash
# Install the PyTorch that tests and benchmarks compare with, if a CPU build is at hand.
# On Linux a package index may offer only a CUDA build of several GB: then this says so in one line and
# succeeds, and the tests marked `torch` are skipped. TORCH_PIP_ARGS is passed to pip, e.g. the index of the
# CPU builds; TORCH=no skips the step; TORCH=any takes whatever build there is.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
requirement=$("$python" - <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    print(tomllib.load(file)["project"]["optional-dependencies"]["torch"][0])
PY
)
stamp=.venv/.torch
state="$requirement ${TORCH:-} ${TORCH_PIP_ARGS:-}"

skip() {
  echo "PyTorch ($requirement) not installed: $1. Tests marked 'torch' are skipped." >&2
  exit 0
}

# The answer is kept with the environment, also a no, so that only the first run asks.
keep() { printf '%s\n%s\n' "$state" "$1" >"$stamp"; }

if [[ -f $stamp && $(head -n 1 "$stamp") == "$state" ]]; then
  reason=$(sed -n 2p "$stamp")
  [[ -z $reason ]] && exit 0
  skip "$reason"
fi
[[ ${TORCH:-} == no ]] && skip "TORCH=no"

pip=("$python" -m pip --disable-pip-version-check -qq)
read -ra extra <<<"${TORCH_PIP_ARGS:-}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if [[ ${TORCH:-} != any ]]; then
  # --dry-run reads metadata only: nothing of a CUDA build is downloaded to find out that it is one.
  "${pip[@]}" install --dry-run --report "$log" "${extra[@]}" "$requirement" >/dev/null 2>&1 ||
    skip "no build for this Python and platform was found"
  if grep -qE '"name": *"(nvidia|cuda)-' "$log"; then
    reason="only a CUDA build of several GB was found (see CONTRIBUTING.md)"
    keep "$reason"
    skip "$reason"
  fi
fi
echo "Installing $requirement" >&2
"${pip[@]}" install "${extra[@]}" "$requirement" >"$log" 2>&1 ||
  skip "pip failed: $(tail -n 1 "$log")"
keep ""
