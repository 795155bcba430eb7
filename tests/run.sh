#!/usr/bin/env bash
# All checks and tests, on a bare machine: makes its own virtual environment (.venv-test, here or under
# $TEST_ENVIRONMENTS), installs what is needed, and runs ruff and the tests.
# Arguments go to pytest (for example: -k weights -x).
set -euo pipefail
cd "$(dirname "$0")/.."

environments=${TEST_ENVIRONMENTS:-$PWD}
python=${PYTHON:-python3}

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
