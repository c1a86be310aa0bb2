# --- environment -------------------------------------------------------------------------------------------
# What is set already stays: put `export NAME=value` into --setup lines or your shell to have it otherwise.

# Threads of each rank. torchrun would set 1, with which reading data and AdamW on the CPU crawl; without any
# setting each rank takes all cores of its node.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
threads=$((cores / RANKS_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# Tokenizers' own threads do not survive the forks of loader processes, and warn about it in every rank.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# Logs as they are written: what a rank said last before it died is what matters.
export PYTHONUNBUFFERED=1

# NCCL says nothing by default when a link or a plugin fails to come up; INFO shows which network it took.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Keep the last collectives of each rank, so that a timeout can name the one that some rank never entered.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

# Only where the cluster needs it, in --setup lines:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   several networks, and the first is the wrong one
#   export FI_PROVIDER=efa                                 AWS EFA, with the aws-ofi-nccl plugin
#   export CUDA_DEVICE_MAX_CONNECTIONS=1                   Megatron with tensor and sequence parallelism
