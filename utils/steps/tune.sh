#!/usr/bin/env bash
# Chooses decoding weights on the development set (step of stage 6): decodes it with every point of a grid in parallel jobs, counts
# errors with sclite, and writes the best configuration.
#
# Usage: tune.sh [options] <exp-dir> <dev-dir> <out-dir>
#  e.g.: tune.sh --nj 4 --config conf/decode.yaml --grid conf/tune.yaml exp/asr data/dev exp/asr/tune_dev_decode
#
#   --nj N            parallel jobs (default 1 with a GPU, else the number of processors)
#   --ngpu N          0 or 1: decode on a GPU (default 0)
#   --cmd CMD         job runner (default utils/parallel/run.sh)
#   --config FILE     decoding configuration whose values are replaced (default conf/decode.yaml)
#   --grid FILE       keys and the values to try (default conf/tune.yaml)
#   --lm DIR          language model that lm_weight weighs
#   --ngram PATH      language model that ngram_weight weighs: its directory, or an ARPA file
#   --unit UNIT       wer or cer: what is counted (default wer)
#
# Makes <out-dir>/tuned.yaml, a whole decoding configuration, tune.json, points/ and log/. What was decoded already is kept.
set -euo pipefail

nj=0 ngpu=0 cmd='' config=conf/decode.yaml grid=conf/tune.yaml lm='' ngram='' unit=wer
utils=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=utils/parse_options.sh
source "$utils/parse_options.sh"
# shellcheck source=utils/progress.sh
source "$utils/progress.sh"

if (($# != 3)); then
  printf 'tune.sh: error: expected <exp-dir> <dev-dir> <out-dir>, found %d argument(s); tune.sh --help shows an example\n' "$#" >&2
  exit 2
fi
exp=$1 data=$2 out=$3
read -ra runner <<<"${cmd:-$utils/parallel/run.sh}"
if ((nj == 0)); then
  if ((ngpu > 0)); then nj=1; else nj=$(env -u OMP_NUM_THREADS nproc); fi
fi

for file in "$exp/config.yaml" "$exp/model.pt" "$data/feats.scp" "$data/fbank.yaml" "$data/text" "$config" "$grid"; do
  if [[ ! -f $file ]]; then
    printf 'tune.sh: error: %s: no such file\n' "$file" >&2
    exit 1
  fi
done

options=(--exp "$exp" --data "$data" --config "$config" --grid "$grid" --out "$out" --unit "$unit" --num-jobs "$nj" --ngpu "$ngpu")
[[ -z $lm ]] || options+=(--lm "$lm")
[[ -z $ngram ]] || options+=(--ngram "$ngram")

mkdir -p "$out/log"
rm -f "$out"/*.progress   # of jobs that were killed
watch_progress "$(basename "$out")" "$out"
"${runner[@]}" --gpu "$ngpu" "JOB=1:$nj" "$out/log/tune.JOB.log" speechtx tune "${options[@]}" --job JOB
stop_progress
speechtx tune "${options[@]}" --merge
