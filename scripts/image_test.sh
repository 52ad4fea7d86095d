#!/usr/bin/env bash
# Build the image, run it as it is meant to be run, ask for its health, send it a Forward, stop it, also in
# its first moment: with docker or podman where a daemon or a kernel allows, else with buildah. ENGINE names
# one of the three; buildah takes BUILDAH_ARGS (e.g. "--storage-driver vfs"), BUILD_ARGS for its build, and
# BUILDAH_ISOLATION=chroot without namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."
image=timernn:image-test
base=$(sed -nE 's/^FROM ([^ ]+) AS build$/\1/p' docker/Dockerfile)
largest_mb=150 # beside the base

fail() {
  echo "image-test: $1" >&2
  exit 1
}

# What a client inside the container finds; the list of packages is the image's SBOM.
check='
import json
import os
import pathlib
import numpy as np
import timernn
with timernn.connect(os.environ["TIMERNN_LISTEN"]) as client:
    client.create_model("m", input_size=2, hidden_size=3)
    with client.session("m") as session:
        assert session.forward(np.ones((1, 4, 2))).shape == (1, 4, 3)
listed = {each["name"] for each in json.loads(pathlib.Path("/opt/timernn/sbom.cdx.json").read_text())["components"]}
assert {"grpcio", "numpy", "redis"} <= listed, listed
assert not list(pathlib.Path("/opt/timernn").rglob("pip"))
'

# What a health check costs: user and system seconds of the processor.
cost='TIMEFORMAT="image-test: a health check takes %U s + %S s of processor time"; time python -m service.probe'

check_size() {
  local bytes=$1 base_bytes=$2
  local mb=$(((bytes - base_bytes) / 1000000))
  echo "image-test: $mb MB beside $base"
  ((mb <= largest_mb)) || fail "that is more than $largest_mb MB"
}

with_engine() {
  local code began revision
  engine=$1 container= # not local: the trap needs them at the end
  revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
  "$engine" build --quiet --file docker/Dockerfile --build-arg "REVISION=$revision" --tag "$image" . >/dev/null
  [[ $("$engine" image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$image") == \
    "$revision" ]] || fail "its label is not revision $revision"
  start() {
    "$engine" run --detach --read-only --tmpfs /tmp --tmpfs /data:uid=10001,gid=10001,mode=0700 \
      --cap-drop ALL --security-opt no-new-privileges --env TIMERNN_LISTEN=127.0.0.1:50051 "$image"
  }
  stop() { # CONTAINER: stop it within 30 s, with exit code 0, and remove it
    began=$SECONDS
    "$engine" stop --time 40 "$1" >/dev/null
    code=$("$engine" inspect --format '{{.State.ExitCode}}' "$1")
    [[ $code == 0 ]] || fail "the server ended with exit code $code after SIGTERM"
    ((SECONDS - began < 30)) || fail "the server took $((SECONDS - began)) s to stop"
    "$engine" rm "$1" >/dev/null
  }
  container=$(start)
  trap '"$engine" rm --force "$container" >/dev/null 2>&1 || true' EXIT
  for attempt in $(seq 60); do
    "$engine" exec "$container" python -m service.probe 2>/dev/null && break
    [[ $attempt != 60 ]] || { "$engine" logs "$container" >&2; fail "the server is not ready after a minute"; }
    sleep 1
  done
  "$engine" exec "$container" python -c "$check"
  [[ $("$engine" exec "$container" id -u) == 10001 ]] || fail "the server is not user 10001"
  "$engine" exec "$container" bash -c "$cost"
  stop "$container"
  for pause in 0 0.1 0.3 0.6; do # it must not lose a signal that comes while it starts
    container=$(start)
    sleep "$pause"
    stop "$container"
  done
  check_size "$("$engine" image inspect --format '{{.Size}}' "$image")" \
    "$("$engine" image inspect --format '{{.Size}}' "$base")"
}

# What runs inside the container when there is no engine to run it detached. It has the network of this machine, where
# 50051 may be taken.
inside='
set -eu
test "$(id -u)" = 10001
! command -v pip >/dev/null
export TIMERNN_LISTEN=unix:/tmp/timernn.sock TIMERNN_DATA_DIR=/tmp/data
env --block-signal=TERM timernn serve > /tmp/ready & server=$!
for _ in $(seq 60); do python -m service.probe 2>/dev/null && break; sleep 1; done
python -c "$1"
kill -TERM "$server"
wait "$server"
env --block-signal=TERM timernn serve > /tmp/ready & server=$!
until [ "$(cat "/proc/$server/comm")" = timernn ]; do :; done # the signal is blocked from here on
kill -TERM "$server"
wait "$server"
'

with_buildah() {
  local container buildah build_args
  read -ra buildah <<<"buildah ${BUILDAH_ARGS:-}"
  read -ra build_args <<<"${BUILD_ARGS:-}"
  "${buildah[@]}" bud --format docker --network host --file docker/Dockerfile --tag "$image" \
    "${build_args[@]}" . >/dev/null
  container=$("${buildah[@]}" from --pull-never "$image")
  # shellcheck disable=SC2064
  trap "${buildah[*]} rm $container >/dev/null" EXIT
  "${buildah[@]}" run --network host "$container" -- sh -c "$inside" sh "$check"
}

for engine in docker podman; do
  if [[ ${ENGINE:-$engine} == "$engine" ]] && command -v "$engine" >/dev/null && "$engine" info >/dev/null 2>&1; then
    with_engine "$engine"
    echo "image-test: $image built and answered under $engine"
    exit 0
  fi
done
if [[ ${ENGINE:-buildah} == buildah ]] && command -v buildah >/dev/null; then
  with_buildah
  echo "image-test: $image built and answered under buildah"
  exit 0
fi
echo "image-test: skipped, none of docker, podman and buildah works here"
