#!/usr/bin/env bash
# Pre-training, context extension with YaRN, fine-tuning on answers: configs/stages_debug.json on two CPU
# processes. Makes the sample data where they are missing. The same command again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
data=${DATA:-data/sample}

python tools/make_sample_data.py --output "$data"
if [ ! -f "$data/library.json" ]; then
  python tools/make_sample_instructions.py --output "$data/library.jsonl"
  python tools/preprocess_dolma.py --input "$data/library.jsonl" --output "$data/library" \
    --conversations messages --tokenizer "$data/tokenizer.model" --overwrite
fi

# --distributed.device cpu: also where there is a GPU. One thread per process: two processes, two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --standalone --nproc-per-node 2 pretrain_megads.py --config configs/stages_debug.json \
  --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" --distributed.device cpu "$@"
