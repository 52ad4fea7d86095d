#!/usr/bin/env bash
# Build the image, run it as it is meant to be run, ping it, stop it: with docker or podman where a
# daemon or a kernel allows, else with buildah. ENGINE names one of the three; buildah takes BUILDAH_ARGS
# (e.g. "--storage-driver vfs"), BUILD_ARGS for its build, and BUILDAH_ISOLATION=chroot without namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."
image=timernn:image-test

fail() {
  echo "image-test: $1" >&2
  exit 1
}

with_engine() {
  local engine=$1 container code
  "$engine" build --quiet --file docker/Dockerfile --tag "$image" . >/dev/null
  container=$("$engine" run --detach --read-only --tmpfs /tmp --tmpfs /data:uid=10001,gid=10001,mode=0700 \
    --cap-drop ALL --security-opt no-new-privileges "$image")
  # shellcheck disable=SC2064 - the container's name is known now
  trap "$engine rm --force $container >/dev/null" EXIT
  for _ in $(seq 60); do
    if "$engine" exec "$container" timernn ping; then
      "$engine" stop --time 30 "$container" >/dev/null
      code=$("$engine" inspect --format '{{.State.ExitCode}}' "$container")
      [[ $code == 0 ]] || fail "the server ended with exit code $code after SIGTERM"
      return
    fi
    sleep 1
  done
  "$engine" logs "$container" >&2
  fail "the server did not answer within a minute"
}

# What runs inside the container when there is no engine to run it detached.
inside='
set -eu
test "$(id -u)" = 10001
! command -v pip >/dev/null
export TIMERNN_LISTEN=127.0.0.1:50951
timernn serve > /tmp/ready & server=$!
for _ in $(seq 60); do grep -q "timernn ready on" /tmp/ready && break; sleep 1; done
timernn ping --server "$TIMERNN_LISTEN"
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
  "${buildah[@]}" run --network host "$container" -- sh -c "$inside"
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
