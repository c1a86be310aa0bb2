#!/usr/bin/env bash
# A run on several machines without a scheduler, which share the run directory. On each of them, with its number:
#   NODES=4 NODE=0 HEAD=10.0.0.1 launch/several_nodes.sh CONFIG [--dry-run] [--dotted.key value ...]
# HEAD is machine 0's address as the others reach it. Machine 0 has the first ranks, the last one the pool.
set -euo pipefail
# Gloo and NCCL take the first network that comes up; where that is the wrong one:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
exec opmix launch torchrun "$@" --nodes "${NODES:?number of machines}" --node-rank "${NODE:?number of this one}" \
  --head "${HEAD:?address of machine 0}" --ranks-per-node "${RANKS_PER_NODE:-8}"
