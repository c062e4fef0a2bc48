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

logs="$(mktemp -d)"
declare -A running=()
summary=()
failed=0

check() { # name, command ...
    local name="$1" started=$SECONDS verdict=ok
    shift
    echo "== $name"
    "$@" || { verdict=FAILED; failed=1; }
    summary+=("$(printf '%-20s %-7s %4d s' "$name" "$verdict" $((SECONDS - started)))")
}

begin() { # name, command ...: works beside what follows, in a process group of its own
    local name="$1"
    shift
    set -m
    "$@" >"$logs/$name" 2>&1 </dev/null &
    set +m
    running[$name]=$!
}

ended() { # name: wait for it, and show what it said
    local code
    wait "${running[$1]}"
    code=$?
    unset "running[$1]"
    cat "$logs/$1"
    return "$code"
}

end_all() { # as Ctrl-C would: tests stop what they started
    local name
    for name in "${!running[@]}"; do
        kill -INT -- "-${running[$name]}" 2>/dev/null && wait "${running[$name]}"
    done
    rm -rf "$logs"
}
trap end_all EXIT

suite() { # name, arguments for pytest besides the user's; a choice of tests (-k) may have none in this suite
    local code name="$1"
    shift
    "$VENV/bin/python" -m pytest -q --timeout=900 "tests/$name" "$@" "${arguments[@]}"
    code=$?
    [ "$code" = 5 ] && [ "${#arguments[@]}" -gt 0 ] && return 0
    return "$code"
}

begin mypy "$VENV/bin/python" -m mypy
check ruff "$VENV/bin/python" -m ruff check .
check tests/unit suite unit -n 2
if [ "$fast" = false ]; then
    begin cluster suite cluster # waits for actors more than it computes
    check tests/distributed suite distributed
    check tests/e2e suite e2e -n 2 --dist loadfile # a file's tests go on from each other
    check tests/cluster ended cluster
    if nvidia-smi >/dev/null 2>&1; then check tests/gpu suite gpu; fi
fi
check mypy ended mypy

echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
