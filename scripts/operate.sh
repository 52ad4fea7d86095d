#!/usr/bin/env bash
# Install what checks the files of a deployment and run those checks; `make test` skips what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh operate

# Install Debian packages unless the programs that they bring are there.
need() {
  local packages=$1 missing=() program
  shift
  for program in "$@"; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  if [[ ${#missing[@]} == 0 ]]; then
    return
  fi
  if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    apt-get update -qq
    # RUNLEVEL=1: no package starts a server of its own.
    # shellcheck disable=SC2086 # several packages
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
  else
    echo "operate: ${missing[*]} not on PATH; what needs that is skipped" >&2
  fi
}

need prometheus prometheus promtool
need "chromium chromium-driver fonts-dejavu-core" chromium chromedriver
.venv/bin/python -m pytest tests/deployment tests/page/test_browser.py "$@"
