#!/usr/bin/env bash
# Stage 3: trains the sentencepiece tokenizer on training transcripts, and counts what of other texts it does not know.
#
# Usage: steps/bpe.sh [options] <text> <tokenizer-dir>
#  e.g.: steps/bpe.sh --config conf/train.yaml --report data/train_dev/text data/train/text exp/bpe
#
#   --config FILE     training configuration; its section `tokenizer` is used (default conf/train.yaml)
#   --set KEY=VALUE   override one value, for example tokenizer.vocab_size=30 (repeatable)
#   --report TEXT     count <unk> in these transcripts too (repeatable)
#
# Makes <tokenizer-dir>/bpe.model, tokens.txt and sentencepiece.log.
set -euo pipefail

config=conf/train.yaml set=() report=()
# shellcheck source=utils/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"

if (($# != 2)); then
  echo "bpe.sh: error: expected <text> <tokenizer-dir>, found $# argument(s); bpe.sh --help shows an example" >&2
  exit 2
fi
text=$1 out=$2

for file in "$text" "$config" "${report[@]}"; do
  if [[ ! -f $file ]]; then
    echo "bpe.sh: error: $file: no such file" >&2
    exit 1
  fi
done

args=()
for pair in "${set[@]}"; do args+=(--set "$pair"); done
for file in "${report[@]}"; do args+=(--report "$file"); done
speechtx tokenizer --config "$config" "${args[@]}" --text "$text" --out "$out"
