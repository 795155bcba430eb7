#!/usr/bin/env bash
# All checks and tests, on a bare machine, in virtual environments that it makes here or under $TEST_ENVIRONMENTS:
#     .venv-test   ruff, mypy, import-linter and the tests
#     .venv-guests tests/guests once more, with other people's libraries that use networks
#     .venv-npu    tests/ascend and tests/npu: the real torch_npu on a stand-in for CANN, which needs a CPU build of
#                  torch and g++; where these can't be had the reason is printed
# Arguments go to pytest, both times (for example: -k weights -x). It fails if anything failed.
#     tests/run.sh --npu   runs the tests for a real NPU instead, with the python of the environment ($PYTHON): torch_npu, this
#                          package and pytest must be installed, and CANN loaded or in one of its usual folders.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --npu ]]; then
    shift
    python=${PYTHON:-$(command -v python || command -v python3 || true)}
    arguments=("$@")
    set --  # common.sh looks for --help
    # shellcheck source=/dev/null
    source train_scripts/common.sh
    load_cann
    obstacle=$("$python" -m tests.npu.real_device 2>&1 | tail -n 1) || {
        echo "tests/run.sh: error: no tests on a real NPU here: $obstacle" >&2
        exit 2
    }
    echo "$obstacle"
    exec "$python" -m pytest -q tests/npu/test_real_npu.py ${arguments[@]+"${arguments[@]}"}
fi

environments=${TEST_ENVIRONMENTS:-$PWD}
python=${PYTHON:-python3}
torch_npu=2.13.0     # and the torch that it pins
torchvision=0.28.0   # which belongs to that torch

say() { printf '\n== %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "tests/run.sh: error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3." >&2
    exit 2
}

# prepare DIRECTORY FUNCTION ARGUMENT...: a virtual environment that the function fills, made again when the arguments,
# pyproject.toml or Python change.
prepare() {
    local environment=$1 stamp
    shift
    stamp="$("$python" -V) $* $(sha256sum < pyproject.toml)"
    [[ "$(cat "$environment/.stamp" 2>/dev/null)" != "$stamp" ]] || return 0
    say "installing $environment (once)"
    rm -rf "$environment"
    "$python" -m venv "$environment" || return
    "$1" "$environment" "${@:2}" || return
    echo "$stamp" > "$environment/.stamp"
}

# install ENVIRONMENT PACKAGE...
install() {
    "$1/bin/pip" install --quiet --disable-pip-version-check "${@:2}" 2>&1 | { grep -v '^WARNING: Location' || true; }
}

# install_npu ENVIRONMENT TORCH TORCHVISION: a CUDA build of torch cannot be loaded beside torch_npu. Where pip's own
# index has no CPU build, TORCH_CPU_INDEX names the one that has.
install_npu() {
    install "$1" ${TORCH_CPU_INDEX:+--index-url "$TORCH_CPU_INDEX"} "torch==$2+cpu" "torchvision==$3" || return
    install "$1" "torch_npu==$2" --editable . pytest
}

# install_guests ENVIRONMENT: with timm's own tests, which its wheel does not have.
install_guests() {
    install "$1" --editable '.[dev,guests]' || return
    local version
    version=$("$1/bin/pip" show timm | sed -n 's/^Version: //p')
    if "$1/bin/pip" download --quiet --no-deps --no-binary timm --dest "$1" "timm==$version"; then
        mkdir -p "$1/timm-source"
        tar -xzf "$1/timm-$version.tar.gz" -C "$1/timm-source" --strip-components 1
    else
        echo "tests/guests/test_timm.py is skipped: timm's source distribution could not be had (see above)."
    fi
}

main=$environments/.venv-test
guests=$environments/.venv-guests
npu=$environments/.venv-npu
failed=()

# check NAME COMMAND...: notes a failure; that no test was selected is none where there are arguments for pytest.
check() {
    local name=$1 code=0
    shift
    say "$name"
    "$@" || code=$?
    [[ $code == 0 || ($code == 5 && $selected == yes) ]] || failed+=("$name")
}

selected=$([[ $# == 0 ]] && echo no || echo yes)

prepare "$main" install --editable '.[dev,docs]'
check 'ruff' "$main/bin/ruff" check .
check 'mypy' "$main/bin/mypy"
check 'import-linter' "$main/bin/lint-imports"
site=$(mktemp -d)
check 'docs' env NO_MKDOCS_2_WARNING=1 "$main/bin/mkdocs" build --strict --quiet --site-dir "$site"
rm -rf "$site"
# Two tests at a time; one thread each, since tests compare sums in one process with those in others.
export OMP_NUM_THREADS=1
check 'tests' "$main/bin/python" -m pytest -n 2 "$@"

# Their dependencies are many, so they have an environment of their own; without it their tests are skipped.
if prepare "$guests" install_guests; then
    check 'guests' "$guests/bin/python" -m pytest -n 2 tests/guests "$@"
else
    say "SKIPPED: other people's libraries, which could not be installed (see above)"
fi

# Prints why the NPU tests cannot run here, or nothing.
npu_obstacle() {
    if [[ "$(uname -s)" != Linux ]]; then
        echo 'torch_npu is for Linux'
    elif ! command -v "${CXX:-g++}" > /dev/null; then
        echo "there is no C++ compiler (${CXX:-g++}) for the stand-in"
    elif ! prepare "$npu" install_npu "$torch_npu" "$torchvision" >&2; then
        echo "no CPU build of torch $torch_npu with torch_npu $torch_npu could be installed (see above; TORCH_CPU_INDEX names the index of PyTorch's CPU builds)"
    elif ! TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$npu/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        echo "the torch in $npu is a CUDA build, which cannot be loaded beside torch_npu"
    fi
}

obstacle=$(npu_obstacle)
if [[ -n $obstacle ]]; then
    say "SKIPPED: tests on torch_npu, since $obstacle"
else
    check 'stand-in for CANN' "$npu/bin/python" tests/ascend/build.py "$npu/standin"
    rm -f "$npu"/journal-*
    check 'tests on torch_npu' "$npu/bin/python" tests/ascend/environment.py "$npu/standin" \
        --operator-log "$npu/journal-operators" --trace "$npu/journal-trace" -- \
        "$npu/bin/python" -m pytest tests/ascend tests/npu "$@"
    rm -f "$npu"/journal-*
fi

if [[ ${#failed[@]} != 0 ]]; then
    say "FAILED: $(printf '%s; ' "${failed[@]}")"
    exit 1
fi
