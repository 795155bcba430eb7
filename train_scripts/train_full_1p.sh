#!/usr/bin/env bash
# The ModelZoo's recipe on one NPU, all 240 epochs:
#     bash train_scripts/train_full_1p.sh --data_path=DIR [options of train.py]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

launch train.py 1 -c "$SCRIPTS/recipes/zoo_1p.yaml" "$@"
