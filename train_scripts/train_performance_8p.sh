#!/usr/bin/env bash
# Two epochs of the ModelZoo's recipe on eight NPUs, to see how fast it is:
#     bash train_scripts/train_performance_8p.sh --data_path=DIR [options of train.py]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

launch train.py 8 -c "$SCRIPTS/recipes/zoo_8p.yaml" --epochs 2 "$@"
