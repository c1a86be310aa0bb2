#!/usr/bin/env bash
# Scaling experiments, a run for each size and seed, as a SLURM job array:
#   launch/slurm_array.sh SIZE.yaml SIZE.yaml ... [--dry-run] [options] [--dotted.key value ...]
# Each size has a configuration with a run_dir of its own, below which each seed gets a folder.
set -euo pipefail
# Not more than 4 runs at once: whoever shares the cluster wants some of it too.
exec opmix launch slurm "$@" --vary seed=0,1,2 --array-limit 4 --nodes 1 --gpus-per-node 8 --cpus-per-task 96 \
  --time 12:00:00 --grace-s 300
