#!/usr/bin/env bash
# Resolve the lock files anew: requirements/*.lock from pyproject.toml and requirements/*.in.
# Each is universal (every Python >= 3.11, every platform) and carries hashes. PyTorch stays out, see
# docs/adr/0011. Usage: scripts/lock.sh [--upgrade]
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
  local lock=$1
  shift
  .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
    --constraints requirements/constraints.txt --output-file "requirements/$lock.lock" "$@" >/dev/null
  echo "requirements/$lock.lock"
}

compile bootstrap "$@" requirements/bootstrap.in
compile build "$@" requirements/build.in
compile sbom "$@" requirements/sbom.in
compile server "$@" --extra server pyproject.toml
compile dev "$@" --extra server --extra demo --extra test --extra lint \
  --constraints requirements/server.lock --constraints requirements/build.lock pyproject.toml requirements/build.in
compile operate "$@" --constraints requirements/dev.lock requirements/operate.in
compile bench "$@" --extra bench --constraints requirements/dev.lock pyproject.toml
