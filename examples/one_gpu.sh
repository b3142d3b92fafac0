#!/usr/bin/env bash
# About 100M parameters on one GPU, in BF16 (configs/train_config_tiny.json).
# Trains on the sample data of `make demo`; drop the three data flags once Dolma lies in data/cache
# (docs/data.md). Settings may follow; --dry-run shows the plan and touches nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
data=${DATA:-data/sample}

torchrun --standalone --nproc-per-node 1 pretrain_megads.py --config configs/train_config_tiny.json \
  --distributed.device cuda \
  --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" \
  --data-path 0.4 "$data/code" 0.3 "$data/reference" 0.3 "$data/docs" "$@"
