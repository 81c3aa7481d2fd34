#!/usr/bin/env bash
# One machine: NPROC ranks of `python -m distmuon ARGS` under torchrun.
#   NPROC=2 launch/local.sh train configs/runs/moe_mini.toml
# DRY_RUN=1 prints the command instead of running it.
set -euo pipefail

# More threads than cores per rank makes CPU ranks fight; torchrun would choose 1 too, but with a warning.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

command=(torchrun --standalone --nproc-per-node="${NPROC:-2}" -m distmuon "$@")
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "${command[@]}"
    exit 0
fi
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
supervise "${command[@]}"
