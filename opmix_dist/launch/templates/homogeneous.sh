# --- one world: trainers, and the pool as the last pool.ranks of its ranks ----------------------------------
start_ranks trainers "$SLURM_JOB_NODELIST" $((20000 + SLURM_JOB_ID % 10000)) "$RANKS_PER_NODE" $COMMAND "$CONFIG"
wait_for $!
conclude $?
