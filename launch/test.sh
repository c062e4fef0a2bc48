#!/usr/bin/env bash
# Lint, types and tests from a fresh clone. --fast: only what takes seconds. Other arguments go to pytest.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

suites=(unit distributed cluster e2e)
if nvidia-smi >/dev/null 2>&1; then suites+=(gpu); fi
if [ "${1:-}" = --fast ]; then
    suites=(unit)
    shift
fi
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
    wait "$mypy"
    local code=$?
    cat "$mypy_log"
    return "$code"
}

mypy_log="$(mktemp)"
"$VENV/bin/python" -m mypy >"$mypy_log" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null; rm -f "$mypy_log"' EXIT
check ruff "$VENV/bin/python" -m ruff check .
for suite in "${suites[@]}"; do
    if compgen -G "tests/$suite/test_*.py" >/dev/null; then
        spread=()
        [ "$suite" = unit ] && spread=(-n 2)
        [ "$suite" = e2e ] && spread=(-n 2 --dist loadfile) # a file's tests go on from each other
        check "tests/$suite" "$VENV/bin/python" -m pytest -q --timeout=900 "${spread[@]}" "tests/$suite" "$@"
    fi
done
check mypy types

echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
