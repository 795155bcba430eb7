# What the launchers share. Sourced by them, not run.
# shellcheck shell=bash

set -euo pipefail

SCRIPTS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}

fail() {  # fail MESSAGE: one line, exit code 2
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

load_cann() {  # the environment of CANN, if it is installed and not loaded yet
    local file
    [[ -z ${ASCEND_OPP_PATH:-} ]] || return 0
    for file in "${ASCEND_TOOLKIT_HOME:-}/set_env.sh" "${ASCEND_TOOLKIT_HOME:-}/../set_env.sh" \
            /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh; do
        if [[ -f $file ]]; then
            set +eu  # the vendor's script reads variables that need not be set
            # shellcheck disable=SC1090
            source "$file"
            set -eu
            return 0
        fi
    done
}

set_defaults() {  # set_defaults PROCESSES: what suits an NPU and a busy processor; what is set already stays
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}            # launch operators from a thread of their own
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}   # cards may start minutes apart
    export HCCL_WHITELIST_DISABLE=${HCCL_WHITELIST_DISABLE:-1}  # no list of allowed machines
    export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}  # less fragmentation
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}  # threads that wait soon give way: twenty times faster beside others
}

launch() {  # launch SCRIPT PROCESSES OPTION...: run one of the Python scripts in so many processes per machine
    local script=$1 processes=$2
    shift 2
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "'$processes' is no number of processes."
    [[ -n $PYTHON ]] || fail 'there is no python here: activate an environment, or set PYTHON.'
    load_cann
    set_defaults "$processes"
    local nodes=${NNODES:-1}
    if [[ $processes == 1 && $nodes == 1 ]]; then
        exec "$PYTHON" "$SCRIPTS/$script" "$@"
    fi
    # Whatever can be known to be wrong is one line here, and not one from each process.
    "$PYTHON" "$SCRIPTS/preflight.py" "${0##*/}" "$script" "$processes" "$@"
    local meeting=(--standalone)  # one machine: a free port
    if [[ $nodes != 1 ]]; then
        meeting=(--nnodes "$nodes" --node-rank "${NODE_RANK:-0}")
        meeting+=(--master-addr "${MASTER_ADDR:?is needed with NNODES}" --master-port "${MASTER_PORT:-29500}")
    elif [[ -n ${MASTER_PORT:-} ]]; then
        meeting=(--master-addr localhost --master-port "$MASTER_PORT")
    fi
    exec "$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes" \
        --max-restarts "${MAX_RESTARTS:-0}" "$SCRIPTS/$script" "$@"
}
