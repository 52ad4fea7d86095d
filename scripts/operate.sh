#!/usr/bin/env bash
# Install what checks the files of a deployment and run those checks; `make test` skips what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh operate
if ! command -v prometheus >/dev/null || ! command -v promtool >/dev/null; then
  if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    # RUNLEVEL=1: the package starts no server of its own.
    apt-get update -qq
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null
  else
    echo "operate: prometheus and promtool are not on PATH; what needs them is skipped" >&2
  fi
fi
.venv/bin/python -m pytest tests/deployment "$@"
