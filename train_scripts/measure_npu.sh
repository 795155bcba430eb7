#!/usr/bin/env bash
# Measure on a machine with NPUs, and print the rows of the tables in the documentation: first the fastest settings
# of this device (benchmark.py tune), then training and operators, then a profile of ten steps.
#     bash train_scripts/measure_npu.sh --data_path=DIR [options of train.py]
# CARDS="1 8" (the default) are the numbers of cards, BATCH=192 the images in a batch of a card, IMG_SIZE=299 their height
# and width, OUTPUT the folder for all figures, BUDGET=1200 the seconds for the settings.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ $# -gt 0 ]] || fail 'usage: measure_npu.sh --data_path=DIR [options of train.py]'
check_python
OUTPUT=${OUTPUT:-output/measured} BATCH=${BATCH:-192} IMG_SIZE=${IMG_SIZE:-299}
load_cann
mkdir -p "$OUTPUT"
benchmark() {  # benchmark COMMAND OPTION...
    "$PYTHON" "$SCRIPTS/benchmark.py" "$@" --img-size "$IMG_SIZE" --batch-size "$BATCH" ${DEVICE:+--device "$DEVICE"}
}

# The recipes below train at O2 in float16; train.py finds the result, which is also copied into the folder. Settings
# that torch_npu reads when it is loaded are variables from here on.
VARIABLES='import json, sys; [print(f"export {n}={v}") for n, v in json.load(open(sys.argv[1]))["environment"].items()]'
if ( set_defaults 1
     benchmark tune --opt-level O2 --budget "${BUDGET:-1200}" --json "$OUTPUT/tune.json" ); then
    eval "$("$PYTHON" -c "$VARIABLES" "$OUTPUT/tune.json")"
else
    echo 'measure_npu.sh: no settings were tuned; measuring the default ones.' >&2
fi

for cards in ${CARDS:-1 8}; do
    run=$OUTPUT/${cards}p-$(date +%Y%m%d-%H%M%S)
    recipe=$SCRIPTS/recipes/zoo_$([[ $cards == 1 ]] && echo 1p || echo 8p).yaml
    bash "$SCRIPTS/dist_train_npu.sh" "$cards" -c "$recipe" --epochs 2 --batch-size "$BATCH" \
        --img-size "$IMG_SIZE" --output "$OUTPUT" --experiment "$(basename "$run")" "$@"
    reports+=("$run/report.json")
done

set_defaults 1
benchmark train --amp --json "$OUTPUT/train.json"
for kernels in aten triton; do  # which of them is faster here is not known until this has run
    TIMM_NPU_IRV2_KERNELS=$kernels benchmark ops --amp --json "$OUTPUT/ops-$kernels.json" \
        || echo "measure_npu.sh: the $kernels kernels do not run here." >&2
done
( unset ASCEND_RT_VISIBLE_DEVICES  # the profiler does not work with it
  benchmark profile --amp --output "$OUTPUT/profile" ) \
    || echo 'measure_npu.sh: the profiler does not run here.' >&2
"$PYTHON" "$SCRIPTS/benchmark.py" table "${reports[@]}"
