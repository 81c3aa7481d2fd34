#!/usr/bin/env bash
# DeepSpeed's own launcher: over ssh on the nodes of HOSTFILE, or NPROC ranks on this machine without one.
#   HOSTFILE=launch/hostfile launch/deepspeed.sh train configs/runs/NAME.toml
# DRY_RUN=1 prints the command instead of running it.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [[ -z "${HOSTFILE:-}" ]]; then
    where=(--num_gpus "${NPROC:-2}")
elif [[ -f "$HOSTFILE" ]]; then
    where=(--hostfile "$HOSTFILE")
else
    # DeepSpeed only warns here and trains on one node.
    echo "deepspeed.sh: HOSTFILE=$HOSTFILE is not a file; copy launch/hostfile.example there or unset HOSTFILE." >&2
    exit 2
fi

# Ranks read LOCAL_RANK; without --no_local_rank the launcher also appends an argument the CLI does not have.
command=(deepspeed "${where[@]}" --no_local_rank --module distmuon "$@")
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "${command[@]}"
    exit 0
fi
exec "${command[@]}"
