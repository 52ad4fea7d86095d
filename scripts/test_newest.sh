#!/usr/bin/env bash
# Run the tests with the newest versions that pyproject.toml admits, as a plain `pip install` would take them
# today, and the RPC tests beside another gRPC client whose stubs ask for protobuf 6.
# The lock files stay as they are; the environments are made anew in .venv-newest and .venv-beside.
# Usage: scripts/test_newest.sh [PYTEST_ARGS ...]
set -euo pipefail
cd "$(dirname "$0")/.."

environment() {
  local venv=$1
  shift
  rm -rf "$venv"
  .venv/bin/python -m venv --without-pip "$venv"
  # Hashes and pins are for the lock files: here the resolver decides.
  VIRTUAL_ENV=$PWD/$venv UV_SYSTEM_CERTS=1 .venv/bin/uv pip install --quiet --resolution highest "$@"
  "$venv/bin/python" - <<'PY'
from importlib.metadata import version

names = ("numpy", "grpcio", "protobuf", "grpcio-health-checking", "redis", "safetensors")
print("  " + ", ".join(f"{name} {version(name)}" for name in names), flush=True)
PY
}

echo "the newest versions that pyproject.toml admits:"
environment .venv-newest --editable '.[server,demo,test]'
# How the code is written (tests/architecture) does not depend on what is installed, and needs the linters.
.venv-newest/bin/python -m pytest -m "not torch" --ignore=tests/architecture "$@"

echo "beside tritonclient[grpc], whose stubs ask for protobuf 6:"
environment .venv-beside --editable '.[server,test]' 'tritonclient[grpc]>=2.70'
.venv-beside/bin/python -c 'import tritonclient.grpc, timernn, service.app'
.venv-beside/bin/python -m pytest tests/rpc "$@"
