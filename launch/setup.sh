# Sourced by quickstart.sh and test.sh: makes $VENV (.venv) ready, or stops with one clear line. A second start takes under a second.
#
#   PYTHON   interpreter to build it with (default: python3.12, python3.11 or python3, whichever is 3.11 or 3.12)
#   VENV     an environment of your own; it is used as it is, nothing is checked or installed
#   STACK    cpu or gpu (default: gpu where nvidia-smi answers)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH="torch==2.13.0"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
NEEDED_DISK_GB=8
NEEDED_MEMORY_GB=7

fail() { echo "setup: $*" >&2; exit 2; }
step() { echo "setup: $*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
        if "$candidate" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed, found ${PYTHON:-$(python3 --version 2>/dev/null || echo none)}; set PYTHON=/path/to/python3.11"
}

check_machine() {
    local disk_gb memory_gb limit
    [ "$(uname -s)" = Linux ] || fail "Linux is needed (vLLM has no other build), this is $(uname -s)"
    case "$(uname -m)" in x86_64 | aarch64) ;; *) fail "the architecture must be x86_64 or aarch64, this is $(uname -m)" ;; esac
    disk_gb=$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1000000) }')
    [ "$disk_gb" -ge "$NEEDED_DISK_GB" ] || fail "$NEEDED_DISK_GB GB of free disk are needed in $ROOT, there are $disk_gb"
    memory_gb=$(awk '/^MemTotal/ { print int($2 / 976562 + 0.5) }' /proc/meminfo)
    limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)
    [ "$limit" = max ] || [ "$((limit / 1000000000))" -ge "$memory_gb" ] || memory_gb=$((limit / 1000000000))
    [ "$memory_gb" -ge "$NEEDED_MEMORY_GB" ] || fail "$NEEDED_MEMORY_GB GB of memory are needed, there are $memory_gb"
}

check_compiler() { # torch compiles small kernels while it runs
    local compiler="${CXX:-g++}" include
    include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    echo '#include <Python.h>
#include <vector>' | "$compiler" -x c++ -fsyntax-only -I"$include" - 2>/dev/null ||
        fail "a C++ compiler and Python's headers are needed ($compiler, $include/Python.h), e.g. apt-get install g++ python3-dev"
}

choose_stack() {
    case "${STACK:-}" in
        cpu | gpu) echo "$STACK" ;;
        "") choose_stack_of_this_machine ;;
        *) fail "STACK must be cpu or gpu, got $STACK" ;;
    esac
}

choose_stack_of_this_machine() {
    if nvidia-smi >/dev/null 2>&1; then echo gpu; else echo cpu; fi
}

quiet_pip() { # what is done, then pip's arguments
    local what="$1" started=$SECONDS
    shift
    step "$what ..."
    if ! "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@" >>"$LOG" 2>&1; then
        fail "$what failed: $(grep -E '^ *(ERROR|error)' "$LOG" | tail -n 1 | cut -c 1-300) (all of it: $LOG)"
    fi
    step "$what: $((SECONDS - started)) s"
}

cpu_index_answers() {
    "$VENV/bin/python" - "$TORCH_CPU_INDEX/torch/" >/dev/null 2>&1 <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).read(1)
PYTHON
}

install_cpu_torch() {
    if cpu_index_answers; then
        quiet_pip "PyTorch for CPU (about 200 MB)" install --no-compile "$TORCH" --index-url "$TORCH_CPU_INDEX"
    else
        quiet_pip "PyTorch" install --no-compile "$TORCH"
    fi
    "$VENV/bin/python" -c 'import torch; raise SystemExit(torch.version.cuda is not None)' 2>>"$LOG" ||
        fail "the CPU build of $TORCH is needed, but pip found another one and $TORCH_CPU_INDEX does not answer; try STACK=gpu or that index"
}

install_flash_attention() {
    if ! command -v nvcc >/dev/null; then
        step "flash-attn is left out (no nvcc): the learner uses torch's own attention"
    elif ! timeout 3600 "$VENV/bin/python" -m pip --quiet install --no-build-isolation "flash-attn>=2.7" >>"$LOG" 2>&1; then
        step "flash-attn is left out (it did not build, see $LOG): the learner uses torch's own attention"
    fi
}

remove_mismatched() { # they come with vLLM, nothing here needs them, and a build for another torch breaks `import transformers`
    local package
    for package in torchvision torchaudio torchcodec; do
        "$VENV/bin/python" -m pip show --quiet "$package" >/dev/null 2>&1 || continue
        "$VENV/bin/python" -c "import $package" >/dev/null 2>&1 || quiet_pip "removing $package, which does not match torch" uninstall --yes "$package"
    done
}

make_environment() { # an older one is brought up to date, unless it is broken or of another Python
    local clear=""
    [ "$("$VENV/bin/python" --version 2>/dev/null)" = "$("$1" --version)" ] || clear=--clear
    "$1" -m venv $clear "$VENV" >/dev/null 2>&1 || fail "$1 cannot make a virtual environment, e.g. apt-get install python3-venv"
    rm -f "$VENV/stamp"
    : >"$LOG"
}

install_all() { # interpreter, stack
    local started=$SECONDS
    check_machine
    check_compiler "$1"
    step "installing the $2 stack into $VENV (about 4 GB on disk, a few minutes)"
    make_environment "$1"
    [ "$2" = gpu ] || install_cpu_torch
    # Python compiles a module when it is first imported; most of 28,000 never are, and pip would take a minute for them.
    quiet_pip "Ray, vLLM and the rest" install --no-compile --editable "$ROOT[$2,dev]"
    [ "$2" = cpu ] || install_flash_attention
    remove_mismatched
    "$VENV/bin/python" -c 'import transformers, vllm, ray, trafilatura, webdancer' >>"$LOG" 2>&1 ||
        fail "what was installed does not import: $(tail -n 1 "$LOG" | cut -c 1-300) (all of it: $LOG)"
    step "ready after $((SECONDS - started)) s"
}

if [ -z "${VENV:-}" ]; then
    VENV="$ROOT/.venv"
    LOG="$VENV/setup.log"
    interpreter=$(find_python) || exit $?
    stack=$(choose_stack) || exit $?
    stamp="$stack $("$interpreter" --version) $(cat "$ROOT/setup.py" "$ROOT/launch/setup.sh" | sha256sum | cut -c 1-16)"
    if [ "$(cat "$VENV/stamp" 2>/dev/null)" != "$stamp" ]; then
        install_all "$interpreter" "$stack"
        echo "$stamp" >"$VENV/stamp"
    fi
fi
[ -x "$VENV/bin/python" ] || fail "VENV must be a virtual environment, got $VENV"
export PATH="$VENV/bin:$PATH"
