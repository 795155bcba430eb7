#!/usr/bin/env bash
# Two epochs of the ModelZoo's recipe on one NPU, to see how fast it is:
#     bash train_scripts/train_performance_1p.sh --data_path=DIR [options of train.py]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

launch train.py 1 -c "$SCRIPTS/recipes/zoo_1p.yaml" --epochs 2 "$@"
