#!/usr/bin/env bash
# The tests against hostile input at length; `make test` runs them with fewer calls. FUZZ_SEED=N tries other ones.
set -euo pipefail
cd "$(dirname "$0")/.."

export FUZZ_CALLS=${FUZZ_CALLS:-100000} FUZZ_WIRE_CALLS=${FUZZ_WIRE_CALLS:-5000}
export FUZZ_ROUNDS=${FUZZ_ROUNDS:-10000} STREAM_MESSAGES=${STREAM_MESSAGES:-10000}
export WIRE_RESETS=${WIRE_RESETS:-5000} WIRE_SOCKETS=${WIRE_SOCKETS:-1000} WIRE_GARBLED=${WIRE_GARBLED:-2000}
.venv/bin/python -m pytest tests/rpc/test_fuzz.py tests/rpc/test_fuzz_calls.py tests/rpc/test_hostile.py \
  tests/rpc/test_hostile_wire.py tests/rpc/test_limit_edges.py tests/system/test_repeated_lines.py "$@"
exec .venv/bin/python -m pytest tests/faults/test_open_network.py -m "not soak" --timeout=7200 "$@"
