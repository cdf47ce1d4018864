#!/usr/bin/env bash
# Recognises a data directory with a trained model (stage 6): parallel jobs, then one merge.
#
# Usage: decode.sh [options] <exp-dir> <data-dir> <out-dir>
#  e.g.: decode.sh --nj 4 --config conf/decode.yaml exp/asr data/test exp/asr/decode_test_decode
#  e.g.: decode.sh --lm exp/lm/asr/transformer --set lm_weight=0.3 exp/asr data/test exp/asr/decode_test_decode_lm
#
#   --nj N            parallel jobs (default 1 with a GPU, else the number of processors)
#   --ngpu N          0 or 1: decode on a GPU (default 0)
#   --cmd CMD         job runner (default utils/parallel/run.sh)
#   --config FILE     decoding configuration (default conf/decode.yaml)
#   --set KEY=VALUE   override one value of the configuration (repeatable)
#   --lm DIR          language model that lm_weight weighs
#   --ngram PATH      language model that ngram_weight weighs: its directory, or an ARPA file
#   --exp DIR         a further experiment to decode with, as an ensemble (repeatable)
#   --weights FILE    weights (default <exp-dir>/model.pt); one for each experiment, or several of one: an ensemble (repeatable)
#
# Makes <out-dir>/text, nbest.jsonl, decode.json, parts/ and log/. Jobs that were killed continue where they were. Utterances that
# cannot be decoded are named with the cause and get an empty hypothesis; that is no failure unless there is no other.
set -euo pipefail

nj=0 ngpu=0 cmd='' config=conf/decode.yaml set=() lm='' ngram='' exp=() weights=()
utils=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=utils/parse_options.sh
source "$utils/parse_options.sh"
# shellcheck source=utils/progress.sh
source "$utils/progress.sh"

if (($# != 3)); then
  printf 'decode.sh: error: expected <exp-dir> <data-dir> <out-dir>, found %d argument(s); decode.sh --help shows an example\n' "$#" >&2
  exit 2
fi
exp=("$1" "${exp[@]}") data=$2 out=$3
read -ra runner <<<"${cmd:-$utils/parallel/run.sh}"   # a runner may come with options of its own
if ((nj == 0)); then
  if ((ngpu > 0)); then nj=1; else nj=$(env -u OMP_NUM_THREADS nproc); fi
fi

needed=("${exp[@]/%//config.yaml}" "${weights[@]}" "$data/feats.scp" "$data/fbank.yaml" "$config")
((${#weights[@]})) || needed+=("${exp[@]/%//model.pt}")
for file in "${needed[@]}"; do
  if [[ ! -f $file ]]; then
    printf 'decode.sh: error: %s: no such file\n' "$file" >&2
    exit 1
  fi
done

options=(--data "$data" --config "$config" --out "$out" --num-jobs "$nj" --ngpu "$ngpu")
for one in "${exp[@]}"; do options+=(--exp "$one"); done
for one in "${weights[@]}"; do options+=(--weights "$one"); done
for one in "${set[@]}"; do options+=(--set "$one"); done
[[ -z $lm ]] || options+=(--lm "$lm")
[[ -z $ngram ]] || options+=(--ngram "$ngram")

mkdir -p "$out/log" "$out/parts"
rm -f "$out"/parts/*.progress   # of jobs that were killed
watch_progress "$(basename "$out")" "$out/parts"
"${runner[@]}" --gpu "$ngpu" "JOB=1:$nj" "$out/log/decode.JOB.log" speechtx decode "${options[@]}" --job JOB
stop_progress
speechtx decode --merge --data "$data" --out "$out" --num-jobs "$nj"
