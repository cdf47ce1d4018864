#!/usr/bin/env bash
# Recognises a data directory with a trained model (stage 6): parallel jobs, then one merge.
#
# Usage: decode.sh [options] <exp-dir> <data-dir> <out-dir>
#  e.g.: decode.sh --nj 4 --config conf/decode.yaml exp/asr data/test exp/asr/decode_test_decode
#
#   --nj N            parallel jobs (default 1 with a GPU, else the number of processors)
#   --ngpu N          0 or 1: decode on a GPU (default 0)
#   --cmd CMD         job runner (default utils/parallel/run.sh)
#   --config FILE     decoding configuration (default conf/decode.yaml)
#   --weights FILE    weights (default <exp-dir>/model.pt)
#   --set KEY=VALUE   override one value of the configuration (repeatable)
#
# Makes <out-dir>/text, nbest.jsonl, decode.json, parts/ and log/. Jobs that were killed continue where they were.
set -euo pipefail

nj=0 ngpu=0 cmd='' config=conf/decode.yaml weights='' set=()
utils=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=utils/parse_options.sh
source "$utils/parse_options.sh"

if (($# != 3)); then
  printf 'decode.sh: error: expected <exp-dir> <data-dir> <out-dir>, found %d argument(s); decode.sh --help shows an example\n' "$#" >&2
  exit 2
fi
exp=$1 data=$2 out=$3
weights=${weights:-$exp/model.pt}
read -ra runner <<<"${cmd:-$utils/parallel/run.sh}"   # a runner may come with options of its own
if ((nj == 0)); then
  if ((ngpu > 0)); then nj=1; else nj=$(env -u OMP_NUM_THREADS nproc); fi
fi

for file in "$exp/config.yaml" "$weights" "$data/feats.scp" "$data/fbank.yaml" "$config"; do
  if [[ ! -f $file ]]; then
    printf 'decode.sh: error: %s: no such file\n' "$file" >&2
    exit 1
  fi
done

overrides=()
for pair in "${set[@]}"; do overrides+=(--set "$pair"); done

mkdir -p "$out/log"
"${runner[@]}" --gpu "$ngpu" "JOB=1:$nj" "$out/log/decode.JOB.log" \
  speechtx decode --exp "$exp" --data "$data" --config "$config" "${overrides[@]}" --weights "$weights" --out "$out" \
  --job JOB --num-jobs "$nj" --ngpu "$ngpu"
speechtx decode --merge --data "$data" --out "$out" --num-jobs "$nj"
