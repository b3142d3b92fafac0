#!/usr/bin/env bash
# About 1B parameters on the eight GPUs of one node: 8 experts over 8 GPUs, data parallelism for the rest,
# optimizer state spread over all of them (configs/train_config_small.json).
# Trains on the sample data of `make demo`; drop the three data flags once Dolma lies in data/cache
# (docs/data.md). Settings may follow; --dry-run shows the plan and touches nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
data=${DATA:-data/sample}

torchrun --standalone --nproc-per-node 8 pretrain_megads.py --config configs/train_config_small.json \
  --distributed.device cuda --expert-model-parallel-size 8 \
  --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" \
  --data-path 0.4 "$data/code" 0.3 "$data/reference" 0.3 "$data/docs" "$@"
