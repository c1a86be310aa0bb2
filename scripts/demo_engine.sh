#!/usr/bin/env bash
# A whole OP-Mix job under one engine, tiny, on the CPU: `make demo-single`, `demo-fsdp`, `demo-deepspeed`,
# `demo-megatron`. From the corpus to the report; what is given behind the engine's name overrides the configuration.
set -euo pipefail
cd "$(dirname "$0")/.."
engine=$1
shift
opmix=.venv/bin/opmix
export OMP_NUM_THREADS=1 # one thread per rank: the ranks share the cores
export TOKENIZERS_PARALLELISM=true

case $engine in
  single) trainers=1 settings=() ;;
  fsdp) trainers=2 settings=() ;;
  deepspeed) trainers=2 settings=(--engine.deepspeed.stage 3) ;;
  megatron) trainers=2 settings=(--engine.megatron.tensor_parallel 2 --engine.megatron.sequence_parallel true) ;;
  *) echo "$0: no engine is named $engine: take single, fsdp, deepspeed or megatron" >&2 && exit 2 ;;
esac

data=data/demo_engines
run=${RUNS:-runs/demo_engines}/$engine
start=$SECONDS

echo "1/3 the built-in corpus, 300 kB of each domain"
$opmix prepare --builtin --builtin-max-bytes 300000 --out $data --eval-fraction 0.1 --vocab-size 512 --sequence-length 128

echo "2/3 OP-Mix with the engine $engine: $trainers trainer rank(s) and a pool rank"
.venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=$((trainers + 1)) -m opmix_dist.cli train \
  configs/demo_engines.yaml --run_dir "$run" --engine.name "$engine" "${settings[@]}" "$@"

echo "3/3 the report"
$opmix report "$run"
echo "the job took $((SECONDS - start)) s"
