#!/usr/bin/env bash
# Trainers and pool in one SLURM job: launch/slurm.sh CONFIG [--dry-run] [options] [--dotted.key value ...]
# Copy it, and change what your cluster has otherwise.
set -euo pipefail
nodes=(--nodes 4 --gpus-per-node 8) # 32 ranks, of which the last pool.ranks search
# Whole nodes: a neighbour's job would share the network cards and the memory bandwidth of the CPUs.
whole=(--sbatch=--exclusive --mem 0)
# Loaders and AdamW's host side want cores; SLURM gives one to a task unless told.
cores=(--cpus-per-task 96)
# Short allocations start sooner, and the run goes on in the next one. A checkpoint of the largest model must fit
# in the grace time.
time=(--time 24:00:00 --grace-s 300)
exec opmix launch slurm "$@" "${nodes[@]}" "${whole[@]}" "${cores[@]}" "${time[@]}"
