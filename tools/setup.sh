#!/bin/sh
# Make .venv with the pinned development set. A second call costs a second: a stamp in .venv says what it was made from.
#   PYTHON=python3.12 sh tools/setup.sh     to choose the interpreter
set -eu
cd "$(dirname "$0")/.."
venv="$(pwd)/.venv"
stamp=.venv/.setup-done
wanted="$venv $(cat pyproject.toml constraints.txt tools/setup.sh | cksum)"

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

works() { # a Python that starts and is new enough (a pyenv shim may be there and not start)
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version() {
    "$1" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo none
}

usable() { # .venv belongs to this folder, and to the Python that was asked for
    works .venv/bin/python && [ -x .venv/bin/pip ] &&
        head -n 2 .venv/bin/pip | grep -qF "$venv/" &&
        { [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version .venv/bin/python)" ]; }
}

find_python() { # sets PYTHON
    if [ -n "${PYTHON:-}" ]; then
        works "$PYTHON" || die "PYTHON=$PYTHON does not start or is older than 3.11; name another one."
        return
    fi
    for PYTHON in python3.11 python3.12 python3.13 python3.14 python3; do
        if works "$PYTHON"; then return; fi
    done
    found=$(version python3)
    [ "$found" = none ] || die "Python 3.11 or newer is missing (python3 is $found); install it or name it: make setup PYTHON=..."
    die "Python is missing; install Python 3.11 or name it: make setup PYTHON=..."
}

step() { # step WHAT COMMAND...: show what it printed only when it fails
    what=$1
    shift
    printf 'setup: %s\n' "$what"
    "$@" >"$log" 2>&1 && return
    tail -n 15 "$log" >&2
    die "$what failed, see above; mend that and give the same command again."
}

if usable && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
rm -f "$stamp"
if ! usable; then
    find_python
    for module in venv ensurepip; do
        "$PYTHON" -c "import $module" 2>/dev/null ||
            die "$PYTHON has no module $module, which makes environments; on Debian and Ubuntu: apt install python3-venv"
    done
    if [ -e .venv ]; then step "removing a .venv of another folder or Python" rm -rf .venv; fi
    step "making .venv with Python $(version "$PYTHON")" "$PYTHON" -m venv .venv
fi

install() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet --constraint constraints.txt "$@"
}
step "installing torch (the largest part)" install torch
step "installing the build tools" install setuptools==84.2.1 wheel==0.48.0
step "installing the course and its tools" install --no-build-isolation --editable ".[dev]"
step "trying the environment" .venv/bin/python -c "import torch, transformers, datasets, nbdev, instruct_ft"
printf '%s' "$wanted" >"$stamp"
echo "setup: done"
