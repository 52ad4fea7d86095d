#!/usr/bin/env bash
# Generate the Python stubs of proto/timernn into DIRECTORY (default: here), where they import as timernn.v1.
# google/rpc comes installed with googleapis-common-protos, so nothing is generated for it.
# Usage: scripts/proto.sh [DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
mkdir -p "$out"
PATH=$PWD/.venv/bin:$PATH
find proto/timernn -name '*.proto' -print0 | sort -z | xargs -0 python -m grpc_tools.protoc -Iproto \
  --python_out="$out" --grpc_python_out="$out" \
  --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out"
