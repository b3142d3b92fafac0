#!/usr/bin/env bash
# A model trained on 128 tokens, extended to 512 by YaRN, its retrieval measured before and after: some minutes
# on one core. Settings of the training may follow:  examples/context_extension.sh --log-interval 10
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
data=${DATA:-data/retrieval} output=${OUTPUT:-outputs/context_extension} text=${TEXT:-$data/text}

if [ ! -d "$data/long" ]; then
  [ -d "$text" ] || python tools/make_sample_corpus.py --output "$text"
  weave() { python tools/make_retrieval_corpus.py --text "$text" --overwrite "$@"; }
  weave --output "$data/corpus"
  weave --output "$data/corpus_long" --reach-words 450 --mb 3
  tokenizer=$data/tokenizer.model
  python tools/train_tokenizer.py --input "$data/corpus" --output "$tokenizer" --vocab-size 1024 --overwrite
  prepare() { python tools/preprocess_dolma.py --tokenizer "$tokenizer" --overwrite "$@"; }
  prepare --input-root "$data/corpus" --output-root "$data"
  prepare --input-root "$data/corpus_long" --output-root "$data/long"
fi
python pretrain_megads.py --config configs/context_extension.json --distributed.device cpu \
  --data.cache_dir "$data" --tokenizer-model "$data/tokenizer.model" --output_dir "$output" "$@"

measure() { python tools/evaluate_retrieval.py --text "$data/corpus/haystack" --lengths 64,128,256,512 \
  --samples "${SAMPLES:-25}" --max-position-embeddings 512 --checkpoint "$output/$1/checkpoints" "${@:2}"; }
measure pretrain --output "$output/plain.png" --title "trained on 128: plain RoPE"
measure pretrain --output "$output/yarn.png" --title "the same weights, YaRN x4" --model.mla.rope_scaling.factor 4 \
  --model.mla.rope_scaling.original_max_position_embeddings 128
measure extend --output "$output/retrieval.png" --title "YaRN x4, trained on 512" --beside "$output"/{plain,yarn}.json
