#!/usr/bin/env bash
# A step of stage 4: trains a first model, as far as is needed to tell where words are said, and cuts the training set into words.
#
# Usage: steps/align.sh [options] <train-dir> <dev-dir> <align-dir>
#  e.g.: steps/align.sh --ngpu 1 data/train data/dev exp/align
#
#   --config FILE   training configuration of the first model (default conf/align.yaml)
#   --ngpu N        GPUs to train on (default 0)
#   --procs N       without one, processes to train on (default 0: as many as pay)
#   --restart       starts anew: a model that is there is moved to <align-dir>.old-1 (-2, ...)
#
# Makes an experiment in <align-dir>, with its tokenizer, and <align-dir>/words, which training.join.words of conf/train.yaml names.
set -euo pipefail

config=conf/align.yaml ngpu=0 procs=0 restart=false
steps=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=utils/parse_options.sh
source "$steps/../parse_options.sh"

if (($# != 3)); then
  echo "align.sh: error: expected <train-dir> <dev-dir> <align-dir>, found $# argument(s); align.sh --help shows an example" >&2
  exit 2
fi
train=${1%/} dev=${2%/} align=${3%/}

tokenizer=data/tokenizer/$(basename "$align")
"$steps/bpe.sh" --config "$config" --report "$dev/text" "$train/text" "$tokenizer"
"$steps/train.sh" --config "$config" --ngpu "$ngpu" --procs "$procs" --restart="$restart" "$train" "$dev" "$tokenizer" "$align"
"$steps/average.sh" "$align"
speechtx align --exp "$align" --data "$train" --out "$align/words" --ngpu "$((ngpu > 0))"
