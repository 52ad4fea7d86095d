#!/usr/bin/env bash
# Fail when timernn/v1 is not what proto/ generates today.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/proto.sh "$fresh"
if ! diff -r -q -x __pycache__ -x __init__.py "$fresh/timernn/v1" timernn/v1; then
  echo "timernn/v1 differs from what proto/ generates: run 'make proto' and commit." >&2
  exit 1
fi
