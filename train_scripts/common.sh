# Functions of the launchers, which source this file.
# shellcheck shell=bash

set -euo pipefail

SCRIPTS=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}

show_help() {  # show_help ARGUMENT...: for -h or --help, print the comment at the top of the launcher and stop
    local word
    for word in "$@"; do
        if [[ $word == -h || $word == --help ]]; then
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" | grep -v '^shellcheck'
            exit 0
        fi
    done
}

fail() {  # fail MESSAGE: one line, exit code 2
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

check_python() {  # the Python that the launchers start has this package
    [[ -n $PYTHON ]] || fail 'python is not found: activate an environment, or set PYTHON.'
    "$PYTHON" -c 'import sys, importlib.util as i; sys.exit(i.find_spec("timm_npu_irv2") is None)' 2>/dev/null ||
        fail "$PYTHON does not have timm_npu_irv2: activate the environment that has it, or set PYTHON."
}

load_cann() {  # the environment of CANN, if it is installed and not loaded yet
    local file
    [[ -z ${ASCEND_OPP_PATH:-} ]] || return 0
    # `cann` is the newer name of the folder; without root CANN is installed below the home folder.
    for file in "${ASCEND_TOOLKIT_HOME:-}/set_env.sh" "${ASCEND_TOOLKIT_HOME:-}/../set_env.sh" \
            {/usr/local,"${HOME:-}"}/Ascend/cann/set_env.sh {/usr/local,"${HOME:-}"}/Ascend/ascend-toolkit/set_env.sh; do
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
    if [[ -z ${PYTORCH_ALLOC_CONF:-} ]]; then  # torch_npu ends the process if both are set
        export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}  # less fragmentation
    fi
    if [[ -n ${SOCKET_IFNAME:-} ]]; then  # the network interface that joins several machines
        export HCCL_SOCKET_IFNAME=${HCCL_SOCKET_IFNAME:-$SOCKET_IFNAME} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$SOCKET_IFNAME}
    fi
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}  # threads that wait soon give way: twenty times faster beside others
}

set_hccl_ports() {  # HCCL listens on 32 ports from 60000 on: others for a second job on this machine (error EJ0003)
    local file address state port base listening=' '
    [[ -z ${HCCL_IF_BASE_PORT:-} ]] || return 0
    for file in /proc/net/tcp /proc/net/tcp6; do
        [[ -r $file ]] || continue
        while read -r _ address _ state _; do
            if [[ $state == 0A ]]; then listening+="$((16#${address##*:})) "; fi
        done < "$file"
    done
    for ((base = 60000; base + 32 <= 65536; base += 32)); do
        for ((port = base; port < base + 32; port++)); do
            [[ $listening != *" $port "* ]] || continue 2
        done
        [[ $base == 60000 ]] || export HCCL_IF_BASE_PORT=$base
        return 0
    done
}

find_machines() {  # the variables of Kubernetes or SLURM under the names below; where NNODES is set they are not looked at
    [[ -z ${NNODES:-} ]] || return 0
    if [[ -n ${PET_NNODES:-} ]]; then  # Kubeflow's trainer
        NNODES=$PET_NNODES NODE_RANK=${PET_NODE_RANK:-0} RDZV_ENDPOINT=${PET_RDZV_ENDPOINT:-} RDZV_ID=${PET_RDZV_ID:-}
        MASTER_ADDR=${PET_MASTER_ADDR:-${MASTER_ADDR:-}} MASTER_PORT=${PET_MASTER_PORT:-${MASTER_PORT:-}}
        MAX_RESTARTS=${MAX_RESTARTS:-${PET_MAX_RESTARTS:-}}
        unset "${!PET_@}"  # torchrun reads them too
    elif [[ -n ${KUBERNETES_SERVICE_HOST:-} && -n ${MASTER_ADDR:-} && -n ${WORLD_SIZE:-} && -n ${RANK:-} ]]; then
        NNODES=$WORLD_SIZE NODE_RANK=$RANK  # Volcano and older PyTorchJobs count the pods like this
    elif [[ ${SLURM_NNODES:-1} != 1 && ${SLURM_NTASKS:-} == "${SLURM_NNODES:-}" && -n ${SLURM_NODEID:-} ]]; then
        NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID  # srun has started one launcher on each machine
        MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
        MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 9000))}  # two jobs may share a machine
    else
        return 0
    fi
    local name
    for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT RDZV_ENDPOINT RDZV_ID MAX_RESTARTS; do
        if [[ -n ${!name:-} ]]; then export "${name?}"; else unset "$name"; fi
    done
}

launch() {  # launch SCRIPT PROCESSES OPTION...: run one of the Python scripts in so many processes per machine
    local script=$1 processes=$2
    shift 2
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "'$processes' is not a number of processes."
    check_python
    load_cann
    set_defaults "$processes"
    find_machines
    local nodes=${NNODES:-1}
    if [[ $processes == 1 && $nodes == 1 ]]; then
        exec "$PYTHON" "$SCRIPTS/$script" "$@"
    fi
    # Mistakes that can be found in advance are reported here, once.
    "$PYTHON" "$SCRIPTS/preflight.py" "${0##*/}" "$script" "$processes" "$@"
    set_hccl_ports
    local meeting=() restarts=0  # one machine: torchrun.py knows where to meet
    local limit=${MEETING_TIMEOUT:-600}
    if [[ $nodes == *:* ]]; then
        [[ -n ${RDZV_ENDPOINT:-} ]] || fail "NNODES=$nodes needs RDZV_ENDPOINT=HOST:PORT, where the machines meet."
        restarts=100  # a machine that leaves counts as a failure for the others
    fi
    if [[ -n ${RDZV_ENDPOINT:-} ]]; then
        meeting=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-train}")
        meeting+=(--rdzv-conf "join_timeout=$limit,last_call_timeout=${LAST_CALL_TIMEOUT:-30}" --nnodes "$nodes")
    elif [[ $nodes != 1 ]]; then
        [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes needs MASTER_ADDR, the address of machine 0."
        meeting=(--rdzv-backend machines --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id train)
        meeting+=(--rdzv-conf "rank=${NODE_RANK:-0},timeout=$limit" --nnodes "$nodes")
    fi
    exec "$PYTHON" "$SCRIPTS/torchrun.py" ${meeting[@]+"${meeting[@]}"} --nproc-per-node "$processes" \
        --max-restarts "${MAX_RESTARTS:-$restarts}" "$SCRIPTS/$script" "$@"
}

show_help "$@"
