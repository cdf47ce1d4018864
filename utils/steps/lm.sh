#!/usr/bin/env bash
# Stages 3 and 4: makes one language model over a tokenizer's tokens: an n-gram, an n-gram of whole words with their spelling
# (lexicon), or a Transformer, whose training continues if it was stopped.
#
# Usage: steps/lm.sh [options] ngram|lexicon|transformer <train-dir> <dev-dir> <tokenizer-dir> <lm-dir>
#  e.g.: steps/lm.sh --config conf/lm.yaml ngram data/train data/dev data/tokenizer/train exp/lm/train/ngram
#
#   --config FILE     the YAML with a section of that name (default conf/lm.yaml)
#   --set KEY=VALUE   overrides one value of it, for example ngram.order=4; may be repeated
#   --ngpu N          0: on the processor; 1: one GPU (default 0; for the Transformer)
#   --restart         trains anew: a model that is there is moved to <lm-dir>.old-1 (-2, ...)
#
# The transcripts of <train-dir> are taken, unless the section names texts of its own; the perplexity on <dev-dir> is printed and
# written to <lm-dir>/perplexity.json.
set -euo pipefail

config=conf/lm.yaml set=() ngpu=0 restart=false
# shellcheck source=utils/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"

if (($# != 5)) || [[ $1 != ngram && $1 != lexicon && $1 != transformer ]]; then
  echo "lm.sh: error: expected ngram, lexicon or transformer and four directories; lm.sh --help shows an example" >&2
  exit 2
fi
kind=$1 train=${2%/} dev=${3%/} tokenizer=${4%/} lm=${5%/}
for file in "$config" "$train/text" "$dev/text" "$tokenizer/tokens.txt"; do
  if [[ ! -f $file ]]; then
    echo "lm.sh: error: no such file: $file" >&2
    exit 1
  fi
done

if $restart && [[ -f $lm/config.yaml ]]; then
  number=1
  while [[ -e $lm.old-$number ]]; do number=$((number + 1)); done
  mv "$lm" "$lm.old-$number"
  echo "lm.sh: the earlier model was moved to $lm.old-$number; remove it when you no longer need it"
fi

arguments=(--config "$config" --train "$train" --dev "$dev" --tokenizer "$tokenizer" "$lm")
for override in "${set[@]}"; do arguments+=(--set "$override"); done
case $kind in
  ngram | lexicon) exec speechtx lm "$kind" "${arguments[@]}" ;;
  transformer) exec speechtx lm train --ngpu "$ngpu" "${arguments[@]}" ;;
esac
