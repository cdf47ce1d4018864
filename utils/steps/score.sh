#!/usr/bin/env bash
# Stage 7: scores decoding directories against a data directory's transcripts with NIST sclite, and writes RESULTS.md.
#
# Usage: steps/score.sh [options] <exp-dir> <data-dir> <decode-dir>...
#  e.g.: steps/score.sh --unit "wer cer ter" exp/asr data/test exp/asr/decode_test_decode
#
#   --unit UNITS      what is counted: some of wer, cer, ter (default "wer cer"); the page needs wer
#   --note TEXT       a plain statement for the top of RESULTS.md, for example that the corpus is synthetic
#   --allow-missing   count utterances without a hypothesis as deleted instead of stopping
#
# Makes <decode-dir>/score_<unit>/: score.json and sclite's result.sys, .raw, .dtl, .pra, .sgml;
# then writes <exp-dir>/RESULTS.md from all that is scored there.
set -euo pipefail

unit="wer cer" note='' allow_missing=false
# shellcheck source=utils/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"

if (($# < 3)); then
  echo "score.sh: error: expected <exp-dir> <data-dir> <decode-dir>..., found $# argument(s); score.sh --help shows an example" >&2
  exit 2
fi
exp=$1 data=$2
shift 2
read -ra units <<<"$unit"

for file in "$data/text" "${@/%//text}"; do
  if [[ ! -f $file ]]; then
    echo "score.sh: error: $file: no such file" >&2
    exit 1
  fi
done

common=(--ref "$data/text")
if [[ -f $data/utt2spk ]]; then common+=(--utt2spk "$data/utt2spk"); fi
if $allow_missing; then common+=(--allow-missing); fi
for decoded; do
  for one in "${units[@]}"; do
    extra=()
    if [[ $one == ter ]]; then extra=(--tokenizer "$exp/tokenizer"); fi
    speechtx score "${common[@]}" --hyp "$decoded/text" --out "$decoded/score_$one" --unit "$one" "${extra[@]}"
  done
done
# Of several sets, those that come after this one may still carry the scores of an earlier decoding.
speechtx results --exp "$exp" --note "$note" --current-only >/dev/null
