#!/usr/bin/env bash
# A run on this machine: launch/one_node.sh CONFIG [--dry-run] [--dotted.key value ...]
# One rank for each GPU; the last `pool.ranks` of them search. Ctrl-C saves and stops, the same command resumes.
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec opmix launch local "$@" --ranks "${RANKS:-$((gpus > 0 ? gpus : 1))}"
