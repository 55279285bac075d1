#!/bin/sh
# Makes .venv and installs fedllm into it, with the versions of constraints.txt.
#
#   sh scripts/bootstrap.sh [EXTRAS]      for example: sh scripts/bootstrap.sh test,lint
#
# Does nothing where that is done already for the present pyproject.toml and constraints.txt.
# PYTHON=/path/to/python3.12 chooses an interpreter.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
NEEDED_GB=3        # the environment with a CPU build of torch, and room for pip's downloads
WITH_CUDA_GB=10    # the same with the build for CUDA, which pip takes on Linux unless it is told of another
EXTRAS=${1:-}
heartbeat=

say() {
    printf '%s\n' "$*" >&2
}

stop_heartbeat() {
    if [ -n "$heartbeat" ]; then
        kill "$heartbeat" 2>/dev/null || true
        heartbeat=
    fi
}
trap stop_heartbeat EXIT

state() {
    cat pyproject.toml constraints.txt scripts/bootstrap.sh | cksum
}

stamp() {
    printf '%s/.installed-%s' "$VENV" "${1:-run}"
}

is_done() {
    [ -x "$VENV/bin/fedllm" ] && [ "$(cat "$(stamp "$EXTRAS")" 2>/dev/null)" = "$(state)" ]
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the interpreter to use; nothing when there is none.
find_python() {
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if command -v "$name" >/dev/null 2>&1 && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
}

free_gb() {
    df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }'
}

missing_python() {
    found=$(python3 --version 2>/dev/null || echo none)
    say "missing: Python 3.11 or newer (found: ${PYTHON:-$found})"
    say "  Debian, Ubuntu: sudo apt-get install python3 python3-venv"
    say "  macOS:          brew install python@3.12"
    say "  or name one:    PYTHON=/path/to/python3.12 make setup"
}

missing_venv() {
    package=$("$1" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
    say "missing: the venv module of $1 (it has no ensurepip)"
    say "  Debian, Ubuntu: sudo apt-get install $package"
    say "  elsewhere:      install Python from python.org or Homebrew, which include it"
}

missing_disk() {
    say "missing: disk space; about $NEEDED_GB GB are needed in $(pwd), $(free_gb) GB are free"
    say "  free some space, or clone to a larger disk"
}

# Says all that is missing at once, before anything is changed.
check_machine() {
    lacking=0
    if [ -z "$python" ]; then
        missing_python
        lacking=1
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        missing_venv "$python"
        lacking=1
    fi
    if [ "$(free_gb)" -lt "$NEEDED_GB" ]; then
        missing_disk
        lacking=1
    fi
    if [ "$lacking" -ne 0 ]; then
        exit 1
    fi
    if [ "$(uname -s)" = Linux ] && [ "$(free_gb)" -lt "$WITH_CUDA_GB" ]; then
        say "note: $(free_gb) GB are free. Unless pip is told of a CPU build of torch, it takes the one with the CUDA"
        say "  libraries, for which $WITH_CUDA_GB GB are safe."
    fi
}

make_venv() {
    if [ -x "$VENV/bin/python" ] && is_new_enough "$VENV/bin/python" && [ -x "$VENV/bin/pip" ]; then
        return
    fi
    python=$(find_python)
    check_machine
    say "Making $VENV with $("$python" --version) ..."
    "$python" -m venv --clear "$VENV"
}

# Runs pip quietly, and says every 15 seconds that it is still at work.
install() {
    say "Installing $1 ..."
    shift
    (
        seconds=0
        while sleep 1; do
            seconds=$((seconds + 1))
            if [ $((seconds % 15)) -eq 0 ]; then
                say "  still at work after $seconds s: $(du -sm "$VENV" | cut -f1) MB in $VENV"
            fi
        done
    ) &
    heartbeat=$!
    if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; then
        say "pip could not install it; its own message stands above."
        say "  Usual reasons: no network, a proxy (set HTTPS_PROXY), or a full disk. Then run the same command again."
        exit 1
    fi
    stop_heartbeat
}

if is_done; then
    exit 0
fi
make_venv
# torch first and alone: it is the largest part, and nothing else then chooses its version.
install "torch, the largest part" "$(grep '^torch==' constraints.txt)"
install "fedllm${EXTRAS:+ with $EXTRAS}" -e ".${EXTRAS:+[$EXTRAS]}"
state >"$(stamp "$EXTRAS")"
state >"$(stamp run)"
say "Ready: $VENV/bin/fedllm"
