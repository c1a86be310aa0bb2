#!/usr/bin/env bash
# Stands in for the interpreter that starts ranks, where a test is about the job script: it plays an attempt at a
# run as RUN/launch/play says, a line for each attempt: `fail`, `fail early`, `save and fail`, `end`, `wait`.
config=${!#}
run=$(dirname "$(dirname "$config")")
[ "$PET_NODE_RANK" = 0 ] || exit 0
echo "$*" >>"$run/launch/attempts"
play=$(sed -n "$(wc -l <"$run/launch/attempts")p" "$run/launch/play")
step() { mkdir -p "$run/metrics" && sleep 0.1 && echo "{}" >>"$run/metrics/train.jsonl"; }
save() { mkdir -p "$run/checkpoints/step_$1" && echo "{}" >"$run/checkpoints/step_$1/COMPLETE.json"; }
case $play in
  fail) step && exit 3 ;;
  "fail early") exit 2 ;;
  "save and fail") step && save "$(wc -l <"$run/launch/attempts")" && exit 3 ;;
  end) echo "{}" >"$run/summary.json" ;;
  wait)
    trap 'echo "{}" >"$run/stopped.json"; exit 0' USR1 TERM
    while :; do sleep 0.1; done
    ;;
esac
