#!/usr/bin/env bash
# Pretrains on your own text: JSON lines with a "text" field, plain, .gz or .zst, one directory per source.
#   examples/own_data.sh CORPUS_DIRECTORY DATA_DIRECTORY [settings]
set -euo pipefail
corpus=$(realpath "$1")
mkdir -p "$2"
data=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A vocabulary made for this text; --tokenizer takes any sentencepiece model or tokenizer.json instead.
vocab_size=${VOCAB_SIZE:-4096}
python tools/train_tokenizer.py --input "$corpus" --output "$data/tokenizer.model" --vocab-size "$vocab_size"
python tools/preprocess_dolma.py --input-root "$corpus" --output-root "$data" --tokenizer "$data/tokenizer.model"

# Every source with the same weight; write other weights before the directories, or "sources" in the JSON.
sources=()
for source in "$corpus"/*/; do sources+=(1 "$data/$(basename "$source")"); done
torchrun --standalone --nproc-per-node 2 pretrain_megads.py --config configs/debug.json \
  --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" --vocab-size "$vocab_size" \
  --output_dir "$data/run" "$@" --data-path "${sources[@]}"
