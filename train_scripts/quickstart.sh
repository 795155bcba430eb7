#!/usr/bin/env bash
# From nothing to a trained network: makes a virtual environment, installs, trains on scikit-learn's handwritten digits
# on the best device available, evaluates on the digits held out, and draws some of them with their predictions.
#     bash train_scripts/quickstart.sh [options of train.py, for example --epochs 2]
# VENV is the environment's folder (.venv-quickstart here), OUT that of the results (output/quickstart here).
# TORCH_CPU_INDEX is the address of an index with PyTorch's CPU builds, for machines without a GPU: they take 1.3 GB instead of 6.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

REPOSITORY=$(dirname -- "$SCRIPTS")
VENV=${VENV:-$REPOSITORY/.venv-quickstart}
OUT=${OUT:-$REPOSITORY/output/quickstart}

say() { printf '\n== %s\n' "$*"; }

find_python() {  # any Python from 3.10 on
    local name
    for name in "$PYTHON" python3 python python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s' "$name"
            return
        fi
    done
    fail 'Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3.'
}

prepare_environment() {
    if "$VENV/bin/python" -c 'import timm_npu_irv2, matplotlib, sklearn' 2>/dev/null; then
        say "Environment: $VENV is there already"
        return
    fi
    say "Environment: making $VENV and installing torch, timm and this package, which takes a few minutes"
    local python extras=quickstart
    python=$(find_python) || exit
    [[ -z ${ASCEND_OPP_PATH:-} ]] || extras+=,npu
    "$python" -m venv "$VENV" || fail "'$python -m venv' does not work here: install it (on Debian: python3-venv)."
    if [[ -n ${TORCH_CPU_INDEX:-} ]]; then
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --index-url "$TORCH_CPU_INDEX" torch torchvision ||
            fail 'pip could not install torch from TORCH_CPU_INDEX: see its message above.'
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${REPOSITORY}[$extras]" ||
        fail 'pip could not install the package: see its message above; running this again continues.'
}

for option in "$@"; do
    case ${option%%=*} in
        --output | --experiment | --data-dir | --data | --data-path)
            fail "$option: this script chooses the folders; set OUT for another place." ;;
    esac
done
trap 'printf "\nquickstart.sh: stopped; running it again starts a new run.\n" >&2; exit 130' INT

load_cann
prepare_environment
PYTHON=$VENV/bin/python

say 'Data: 1437 handwritten digits to train on, 360 held out'
"$PYTHON" "$SCRIPTS/digits.py" "$OUT/digits"

say 'Training'
run=$(date +%Y%m%d-%H%M%S)
set_defaults 1
"$PYTHON" "$SCRIPTS/train.py" -c "$SCRIPTS/recipes/quick.yaml" --data-dir "$OUT/digits" \
    --output "$OUT" --experiment "$run" "$@"

say 'Evaluation on the digits held out'
# The last weights, not the best ones: those were chosen by these very digits.
results=$OUT/$run
"$PYTHON" "$SCRIPTS/validate.py" -c "$results/args.yaml" --checkpoint "$results/last.pth.tar" \
    --results-format json --results-file "$results/evaluation.json" --picture "$results/predictions.png" >/dev/null

accuracy=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["top1"])' "$results/evaluation.json")
say "Done: $accuracy % of the held-out digits are right"
printf 'weights       %s\npicture       %s\nreport        %s\ncurves        %s\n' \
    "$results/last.pth.tar" "$results/predictions.png" "$results/report.json" "$results/curves.png"
