#!/usr/bin/env bash
# Stops a run half-way in one parallel layout and ends it in another: the checkpoint fits both.
# On the CPU, with the data of examples/debug_on_cpu.sh or `make demo`; settings may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
data=${DATA:-data/sample}
output=${OUTPUT:-outputs/two_layouts}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() {
  torchrun --standalone --nproc-per-node 2 pretrain_megads.py --config configs/debug.json \
    --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" --output_dir "$output" \
    --distributed.device cpu --train-iters "${STEPS:-60}" "$@"
}

# Experts over two processes. exit_step cuts the run as the end of a job would: checkpoint, then exit.
train --expert-model-parallel-size 2 "$@" --training.exit_step "${STOP_STEP:-30}"
# The same command with another layout goes on from the latest checkpoint in output_dir.
train --tensor-model-parallel-size 2 "$@"
