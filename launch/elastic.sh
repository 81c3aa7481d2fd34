#!/usr/bin/env bash
# Ranks that may die: run this on every node; torchrun starts all ranks again after a failure, up to MAX_RESTARTS times.
#   RDZV_ENDPOINT=node-1:29500 NNODES=2:4 NPROC=8 launch/elastic.sh train configs/runs/NAME.toml --resume auto
# Without `--resume auto` a restart begins at step 0. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torchrun kills ranks this many seconds after SIGTERM; its own 30 s are short for a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
# Without this, restarted ranks find the addresses of dead ones in the store they share with torchrun, and fail to connect.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

command=(
    torchrun
    --nnodes="${NNODES:-1}"
    --nproc-per-node="${NPROC:-2}"
    --max-restarts="${MAX_RESTARTS:-3}"
    --rdzv-backend=c10d
    --rdzv-endpoint="${RDZV_ENDPOINT:-localhost:29500}"
    --rdzv-id="${RDZV_ID:-distmuon}"
    -m distmuon "$@"
)
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "${command[@]}"
    exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
supervise "${command[@]}"
