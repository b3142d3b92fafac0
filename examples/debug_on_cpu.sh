#!/usr/bin/env bash
# Trains configs/debug.json on two CPU processes, expert-parallel. Makes the sample data where it is missing.
# Settings may follow:  examples/debug_on_cpu.sh --train-iters 20 --log-interval 1
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
data=${DATA:-data/sample}

python tools/make_sample_data.py --output "$data"

# --distributed.device cpu: also where there is a GPU. One thread per process: two processes, two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --standalone --nproc-per-node 2 pretrain_megads.py --config configs/debug.json \
  --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" \
  --distributed.device cpu --expert-model-parallel-size 2 "$@"
