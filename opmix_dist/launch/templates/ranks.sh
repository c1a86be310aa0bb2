# --- ranks -------------------------------------------------------------------------------------------------
# Ranks get the scheduler's signals themselves, and save. The launcher must outlive these: it would kill its
# ranks 30 s after a signal, and at once after another. A signal that a shell ignores stays ignored in what it
# starts, except by programs that ask for it, as ranks do; hence the trap, and SIGQUIT as the launcher's only one.
on_each_node='trap "" INT TERM USR1; export PET_NODE_RANK=$SLURM_NODEID; exec "$@"'

# start_ranks NAME NODELIST PORT RANKS_PER_NODE COMMAND...: a launcher on each node, in the background, as a step
# of that name. Ranks are numbered in the order of SLURM's nodes: neighbours in rank are neighbours in the
# network, and the pool, which is the last ranks, is on the last nodes.
start_ranks() {
  local name=$1 port=$3 ranks=$4 hosts
  mapfile -t hosts < <(scontrol show hostnames "$2")
  shift 4
  srun --job-name="$name" --nodes=${#hosts[@]} --ntasks=${#hosts[@]} --ntasks-per-node=1 \
    --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
    bash -c "$on_each_node" on_each_node "$PYTHON" -m torch.distributed.run --nnodes=${#hosts[@]} \
    --nproc-per-node="$ranks" --master-addr="${hosts[0]}" --master-port="$port" --signals-to-handle=SIGQUIT \
    -m -- opmix_dist.cli "$@" & # torchrun would take --run for an option of its own
}
