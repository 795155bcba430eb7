#!/usr/bin/env bash
# All checks and tests, on a bare machine: makes its own virtual environments (in .venv-test and .venv-test-npu, or under
# $TEST_ENVIRONMENTS), installs what is needed, and runs ruff, the tests, and the NPU tests on the stand-in for CANN.
# Arguments go to pytest (for example: -k weights -x).
set -euo pipefail
cd "$(dirname "$0")/.."

environments=${TEST_ENVIRONMENTS:-$PWD}
python=${PYTHON:-python3}
# torch_npu pins torch's minor version, and its stand-in needs a CPU build of torch.
npu_torch=2.13.0

say() { printf '\n== %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "tests/run.sh: error: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3." >&2
    exit 2
}

# prepare DIRECTORY PACKAGE...: a virtual environment with the packages, made again when they or pyproject.toml change.
prepare() {
    local environment=$1 stamp
    shift
    stamp="$("$python" -V) $* $(sha256sum < pyproject.toml)"
    if [[ "$(cat "$environment/.stamp" 2>/dev/null)" != "$stamp" ]]; then
        say "installing $environment (once)"
        rm -rf "$environment"
        "$python" -m venv "$environment"
        "$environment/bin/pip" install --quiet --disable-pip-version-check "$@" 2>&1 | { grep -v '^WARNING: Location' || true; }
        echo "$stamp" > "$environment/.stamp"
    fi
}

main=$environments/.venv-test
prepare "$main" --editable '.[dev]'

say 'ruff'
"$main/bin/ruff" check .

say 'tests'
"$main/bin/python" -m pytest "$@"

npu=$environments/.venv-test-npu
say 'NPU tests, on the stand-in for CANN'
prepare "$npu" "torch==$npu_torch" "torch_npu==$npu_torch" torchvision --editable '.[dev,npu]' || {
    echo "skipped: torch $npu_torch with torch_npu can't be installed here"
    exit 0
}
if [[ "$(TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$npu/bin/python" -c 'import torch; print(torch.version.cuda)')" != None ]]; then
    echo "skipped: the torch $npu_torch to be had here is a CUDA build, which can't be loaded beside torch_npu"
    exit 0
fi
"$npu/bin/python" -m pytest tests/ascend "$@"
