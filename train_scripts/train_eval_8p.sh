#!/usr/bin/env bash
# The accuracy of a checkpoint (--checkpoint FILE, or --pth_path=FILE as in the ModelZoo), over eight NPUs:
#     bash train_scripts/train_eval_8p.sh --data_path=DIR [options of validate.py]
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

launch validate.py 8 "$@"
