# --- the end -----------------------------------------------------------------------------------------------
# Not SLURM_JOB_ID alone: one task of an array bears the array's own number, and what it requeued, cancelled or
# signalled by that would be all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# How far each run has come that the job trains: its end, or its newest checkpoint.
reached() {
  local run
  for run in "${TRAINED[@]}"; do
    ls -d "$run"/checkpoints/step_* "$run/summary.json" 2>/dev/null | sort -V | tail -n 1
  done
}

all_have() { # name of a file
  local run
  for run in "${TRAINED[@]}"; do [ -e "$run/$1" ] || return 1; done
}

one_has() {
  local run
  for run in "${TRAINED[@]}"; do [ -e "$run/$1" ] && return 0; done
  return 1
}

has_trained() { # in this attempt
  local run
  for run in "${TRAINED[@]}"; do [ "$run/metrics/train.jsonl" -nt "$RUN/launch/attempt" ] && return 0; done
  return 1
}

mkdir -p "$RUN/launch" && touch "$RUN/launch/attempt" # its time tells what this attempt has written
began_with=$(reached)
stopping="" asking=""

# SLURM tells this shell alone some time before the end of the allocation (--signal=B:USR1@$GRACE_S). A rank that
# is still importing would miss a single signal, so it is sent again until the ranks have ended.
ask_to_stop() { # the signal that this shell got
  [ -n "$stopping" ] && return
  stopping=$1
  say "SIG$1: the ranks are asked to save and stop"
  keep_asking "$1" &
  asking=$!
}

# In the background, and not beyond this attempt: the next one has the same job and step.
keep_asking() {
  local last=$((SECONDS + (GRACE_S > 40 ? GRACE_S - 20 : GRACE_S / 2)))
  while kill -0 $$ 2>/dev/null; do
    # by name: the steps of a heterogeneous job share their numbers
    squeue --noheader --steps --jobs="$job" --format='%i %j' | while read -r step name; do
      [ "$name" = trainers ] && scancel --signal=USR1 "$step" 2>/dev/null # it may have ended
    done
    sleep 4
    if [ "$1" = USR1 ] && [ $SECONDS -ge $last ] && [ ! -e "$RUN/launch/cancelled.json" ]; then
      # a job that is not requeued before its allocation ends is over; it goes on from the last checkpoint
      again "not saved in time"
    fi
  done
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

wait_for() { # PID; a trap ends `wait` early
  local code=0
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return $code
}

# The one place that decides what follows an attempt: the end, another attempt, or a failure to be looked at.
# The run directory tells more than an exit code that has come through ranks, torchrun and srun.
conclude() { # exit code of the trainers' srun
  local code=$1 failures=0
  [ -n "$asking" ] && kill "$asking" 2>/dev/null
  if all_have summary.json; then
    say "$RUN has ended"
    exit 0
  fi
  if [ -e "$RUN/launch/cancelled.json" ]; then
    say "cancelled"
    exec scancel "$job"
  fi
  # A job that is cancelled, or that SLURM requeues itself, is completing by now: a requeue would bring it back.
  if [ "$(state_of_job)" != RUNNING ]; then
    say "SLURM has ended the job"
    exit "$code"
  fi
  if one_has stopped.json || [ -n "$stopping" ]; then
    again "stopped on request"
  fi
  # A node that dies takes the ranks of the others along before SLURM knows of it. What never came to train, for
  # a mistake in the configuration perhaps, is not tried again, nor what fails again and again at one place.
  if [ "$(reached)" = "$began_with" ]; then
    failures=$(($(cat "$RUN/launch/failures" 2>/dev/null || echo 0) + 1))
  fi
  echo "$failures" >"$RUN/launch/failures"
  if has_trained && [ "$failures" -le "$RETRIES" ]; then
    again "failed with code $code, $failures time(s) in a row without a new checkpoint, where $RETRIES are allowed"
  fi
  say "failed with code $code: not tried again"
  exit "$code"
}

# No answer is no state: asked again, for some minutes.
state_of_job() {
  local told tries
  for tries in {1..30}; do
    told=$(scontrol --oneliner show job "$job" 2>/dev/null) && break
    sleep 10
  done
  [[ $told =~ JobState=([A-Z_]+) ]] && echo "${BASH_REMATCH[1]}"
}

again() { # why
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
    say "$1, and requeued $MAX_REQUEUES times already: given up"
    exit 1
  fi
  say "$1: requeued"
  exec scontrol requeue "$job"
}

say() { echo "$(date '+%F %T') $*"; }
