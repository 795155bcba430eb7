#!/usr/bin/env bash
# Train on N devices of this machine:
#     bash train_scripts/dist_train_npu.sh N --data-dir DIR [options of train.py]
# On several machines, the same on each with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set. Where machines may leave
# and join, with NNODES=2:4, RDZV_ENDPOINT=HOST:PORT, RDZV_ID, and the option --elastic.
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ $# -gt 0 ]] || fail 'usage: dist_train_npu.sh N --data-dir DIR [options of train.py]'
launch train.py "$@"
