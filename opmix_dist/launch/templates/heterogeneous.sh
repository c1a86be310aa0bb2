# --- two worlds: component 0 of the job trains, component 1 is the pool --------------------------------------
# A pool that dies does not touch training. The trainers' end is the job's; the pool's searches go on from what
# is on the disk in the next attempt.
port=$((20000 + SLURM_JOB_ID % 5000))

SRUN_OPTIONS+=(--het-group=0)
start_ranks trainers "$SLURM_JOB_NODELIST_HET_GROUP_0" $port "$RANKS_PER_NODE" $COMMAND "$CONFIG"
trainers=$!

SRUN_OPTIONS+=(--het-group=1) # the last one counts
start_ranks pool "$SLURM_JOB_NODELIST_HET_GROUP_1" $((port + 5000)) "$POOL_RANKS_PER_NODE" pool --run "$RUN"
pool=$!

wait_for $trainers
code=$?
kill $pool 2>/dev/null
conclude $code
