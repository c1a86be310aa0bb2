#!/usr/bin/env bash
# Trainers in one component of a SLURM job, the pool in another, perhaps on other GPUs:
#   launch/slurm_heterogeneous.sh CONFIG [--dry-run] [options] [--dotted.key value ...]
# Two worlds that meet in the run directory: a pool that dies does not touch training. Sets pool.external.
set -euo pipefail
trainers=(--nodes 4 --gpus-per-node 8)
pool=(--pool-nodes 1 --pool-gpus-per-node 8) # --pool-partition names another kind of nodes
exec opmix launch slurm "$@" "${trainers[@]}" "${pool[@]}" --cpus-per-task 96 --time 24:00:00 --grace-s 300
