#!/usr/bin/env bash
# Tests and benchmarks on one CUDA device, without a network, in at most 8 minutes: bash tests/gpu.sh [OUTPUT_FOLDER]
# It needs torch 2.11 or newer with CUDA, this package (pip install -e .), and pytest. Each benchmark writes a JSON file
# into the folder (./gpu by default) and prints a table. BATCH, 128 by default, is the batch size, LIMIT=480 the seconds for
# all; COMPILED=1 adds training compiled by Inductor, which takes minutes more: LIMIT=900 with it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
output=${1:-gpu}
batch=${BATCH:-128}
limit=${LIMIT:-480}
benchmark=("$python" train_scripts/benchmark.py)

obstacle=$("$python" - 2>&1 <<'CODE'
import re
try:
    import timm_npu_irv2, pytest, torch
    release = tuple(int(each) for each in re.findall(r'\d+', torch.__version__)[:2])
    if release < (2, 11):
        print(f'torch 2.11 or newer is needed, and this is {torch.__version__}')
    elif not torch.cuda.is_available():
        print(f'torch {torch.__version__} finds no CUDA device')
except ImportError as error:
    print(f'{error.name} is not installed')
CODE
)
if [[ -n $obstacle ]]; then
    echo "tests/gpu.sh: error: ${obstacle##*$'\n'}." >&2
    exit 2
fi

mkdir -p "$output" || exit 2
failed=()
step_limit=${COMPILED:+500}
step_limit=${step_limit:-170}
# step NAME COMMAND...: runs it in the time that is left, $step_limit s at most, with the output on the screen and in a file, and
# notes a failure.
step() {
    local name=$1 left=$((limit - SECONDS))
    shift
    if ((left < 10)); then
        failed+=("$name (no time left)")
        return
    fi
    printf '\n== %s (%s s)\n' "$name" "$SECONDS"
    timeout -k 10 $((left < step_limit ? left : step_limit)) "$@" 2>&1 | tee "$output/$name.log" || failed+=("$name")
}

"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' | tee "$output/device.txt"
step tests "$python" -m pytest -q -m cuda tests/cuda
step step "${benchmark[@]}" step --device cuda --json "$output/step.json"
step train "${benchmark[@]}" train --device cuda --amp ${COMPILED:+--compiled} -b "$batch" --rounds 5 --steps 5 --json "$output/train.json"
step infer "${benchmark[@]}" infer --device cuda --dtype float16 -b "$batch" --rounds 5 --latencies 20 --json "$output/infer.json"
step ops "${benchmark[@]}" ops --device cuda --json "$output/ops.json"
budget=$((limit - SECONDS - 50))  # the verification at the end takes some time more
step tune "${benchmark[@]}" tune --device cuda -b "$batch" --budget $((budget < 110 ? budget : 110)) --json "$output/tune.json"

printf '\n== %s s; figures in %s\n' "$SECONDS" "$output"
if [[ ${#failed[@]} != 0 ]]; then
    echo "FAILED: ${failed[*]}" >&2
    exit 1
fi
