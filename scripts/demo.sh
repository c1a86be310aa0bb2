#!/usr/bin/env bash
# The demo: real text, a small Llama, uniform against OP-Mix at the same tokens. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
opmix=.venv/bin/opmix
torchrun=".venv/bin/python -m torch.distributed.run --standalone"
export OMP_NUM_THREADS=1 # one thread per rank: the ranks share the cores
export TOKENIZERS_PARALLELISM=true

data=data/builtin
runs=${RUNS:-runs/demo}
start=$SECONDS

echo "1/4 the built-in corpus: text that this installation has anyway"
$opmix prepare --builtin --out "$data" --eval-fraction 0.1 --vocab-size 2048

echo "2/4 uniform mixture, 2 trainer ranks"
$torchrun --nproc-per-node=2 -m opmix_dist.cli train configs/demo.yaml \
  --run_dir "$runs/uniform" --mixture.policy static --pool.ranks 0 "$@"

echo "3/4 OP-Mix, 2 trainer ranks and a pool rank"
$torchrun --nproc-per-node=3 -m opmix_dist.cli train configs/demo.yaml --run_dir "$runs/opmix" "$@"

echo "4/4 comparison and report"
$opmix compare "$runs/uniform" "$runs/opmix"
$opmix report "$runs/opmix" --baseline "$runs/uniform"
echo "the job took $((SECONDS - start)) s"
