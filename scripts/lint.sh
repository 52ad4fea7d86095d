#!/usr/bin/env bash
# Run every static check, all of them even when one fails, and name the ones that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH

dirs=()
for dir in rnn_engine service timernn tests benchmarks examples; do
  [[ -d $dir ]] && dirs+=("$dir")
done
outputs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$outputs"' EXIT
names=() commands=() pids=() failed=()

# Begin a check. All run at the same time: mypy takes longer than the others together.
check() {
  local name=$1
  shift
  "$@" >"$outputs/$name" 2>&1 &
  names+=("$name") commands+=("$*") pids+=($!)
}

check "ruff check" ruff check --no-fix "${dirs[@]}"
check "ruff format" ruff format --check --diff "${dirs[@]}"
check "mypy" mypy "${dirs[@]}"
check "lua" python tests/support/lua_lint.py
check "import-linter" lint-imports --no-cache
check "words" pytest -q tests/architecture/test_words.py
check "tables" pytest -q tests/architecture/test_operations_page.py
check "buf lint" buf lint
# What the last release promised to its clients; `make release-proto` renews it.
if [[ -f proto/released.binpb ]]; then
  check "buf breaking" buf breaking --against proto/released.binpb
fi
check "stubs" scripts/check_stubs.sh

for i in "${!names[@]}"; do
  if wait "${pids[i]}"; then
    printf '  %-14s ok\n' "${names[i]}"
  else
    printf '  %-14s FAILED: %s\n%s\n' "${names[i]}" "${commands[i]}" "$(<"$outputs/${names[i]}")"
    failed+=("${names[i]}")
  fi
done
if ((${#failed[@]})); then
  printf 'lint: %d of the checks failed: %s\n' "${#failed[@]}" "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
