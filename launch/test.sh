#!/usr/bin/env bash
# Lint, types and tests from a fresh clone. --fast: only what takes seconds. Other arguments go to pytest.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

fast=false
if [ "${1:-}" = --fast ]; then
    fast=true
    shift
fi
arguments=("$@")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false

summary=()
failed=0

check() { # name, command ...
    local name="$1" started=$SECONDS verdict=ok
    shift
    echo "== $name"
    "$@" || { verdict=FAILED; failed=1; }
    summary+=("$(printf '%-20s %-7s %4d s' "$name" "$verdict" $((SECONDS - started)))")
}

types() { # of mypy, which works beside the tests
    local code
    wait "$mypy"
    code=$?
    cat "$mypy_log"
    return "$code"
}

suite() { # name, arguments for pytest besides the user's; a choice of tests (-k) may have none in this suite
    local code name="$1"
    shift
    "$VENV/bin/python" -m pytest -q --timeout=900 "tests/$name" "$@" "${arguments[@]}"
    code=$?
    [ "$code" = 5 ] && [ "${#arguments[@]}" -gt 0 ] && return 0
    return "$code"
}

mypy_log="$(mktemp)"
"$VENV/bin/python" -m mypy >"$mypy_log" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null; rm -f "$mypy_log"' EXIT
check ruff "$VENV/bin/python" -m ruff check .
cores=$(nproc)
check tests/unit suite unit -n $((cores < 4 ? cores : 4)) # each process loads torch: a big node need not hold a hundred
if [ "$fast" = false ]; then
    check tests/distributed suite distributed -n 2 --dist loadfile
    check tests/cluster suite cluster # by itself: beside tests/e2e on two cores, starts came too late for both
    check tests/e2e suite e2e -n 2 --dist loadfile # a file's tests go on from each other
    if nvidia-smi >/dev/null 2>&1; then check tests/gpu suite gpu; fi
fi
check mypy types

echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
