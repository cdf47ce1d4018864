#!/usr/bin/env bash
# Stage 4: trains a model, or continues a training that was stopped.
#
# Usage: steps/train.sh [options] <train-dir> <dev-dir> <tokenizer-dir> <exp-dir>
#  e.g.: steps/train.sh --ngpu 1 data/train data/dev data/tokenizer exp/train
#
#   --config FILE     the experiment's YAML (default conf/train.yaml)
#   --set KEY=VALUE   overrides one value of it; may be repeated
#   --seed N          overrides its seed (default 1)
#   --ngpu N          0: on the processor; N: that many GPUs of this machine, each with batches of its own (default 0)
#   --procs N         on the processor: processes that share each batch, and its cores (default 0: as many as pay, one a core and at most 4)
#   --restart         starts anew: an experiment that is there is moved to <exp-dir>.old-1 (-2, ...)
#
# Running it again with the same arguments continues from the newest checkpoint. What it prints is also in <exp-dir>/train.log.
set -euo pipefail

config=conf/train.yaml set=() seed=1 ngpu=0 procs=0 restart=false
# shellcheck source=utils/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"

if (($# != 4)); then
  echo "train.sh: error: expected four directories, found $#; train.sh --help shows an example" >&2
  exit 2
fi
train=${1%/} dev=${2%/} tokenizer=${3%/} exp=${4%/}
for file in "$config" "$train"/{text,feats.scp,utt2num_frames} "$dev"/{text,feats.scp,utt2num_frames} "$tokenizer/tokens.txt"; do
  if [[ ! -f $file ]]; then
    echo "train.sh: error: no such file: $file; an earlier stage makes it" >&2
    exit 1
  fi
done

if $restart && [[ -f $exp/config.yaml ]]; then
  number=1
  while [[ -e $exp.old-$number ]]; do number=$((number + 1)); done
  mv "$exp" "$exp.old-$number"
  mkdir "$exp"
  [[ ! -d $exp.old-$number/.stamps ]] || mv "$exp.old-$number/.stamps" "$exp/.stamps" # what run.sh knows about finished stages
  echo "train.sh: the earlier experiment was moved to $exp.old-$number; remove it when you no longer need it"
fi

arguments=(train --config "$config" --train "$train" --dev "$dev" --tokenizer "$tokenizer" --exp "$exp" --seed "$seed" --ngpu "$ngpu" --procs "$procs")
for override in "${set[@]}"; do arguments+=(--set "$override"); done
exec speechtx "${arguments[@]}"
