#!/usr/bin/env bash
# Stage 2: filterbank features and CMVN statistics of one data directory.
#
# Usage: steps/fbank.sh [options] <data-dir>
#  e.g.: steps/fbank.sh --nj 8 --cmd utils/parallel/run.sh data/train
#
#   --nj N               parallel jobs (default 4; never more than utterances)
#   --cmd COMMAND        runs the jobs (default utils/parallel/run.sh)
#   --config FILE        features (default conf/fbank.yaml)
#   --compress           Kaldi's lossy 8-bit compression
#   --backend NAME       kaldi-native-fbank (default) or torchaudio (faster from 20 minutes of audio a job on)
#   --allow-pipes        run the commands in wav.scp
#
# Needs wav.scp and utt2spk, and honours segments and utt2speed. Writes feats.scp, utt2num_frames, utt2dur, cmvn.scp, global_cmvn.ark and
# fbank.yaml; archives, logs and skipped.txt (utterances left out, and why) go to <data-dir>/fbank. Less than 95 % extracted is a failure.
set -euo pipefail

utils=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nj=4 cmd="$utils/parallel/run.sh" config=conf/fbank.yaml compress=false backend=kaldi-native-fbank allow_pipes=false
# shellcheck source=utils/parse_options.sh
source "$utils/parse_options.sh"
# shellcheck source=utils/progress.sh
source "$utils/progress.sh"

if (($# != 1)); then
  echo "fbank.sh: error: expected one data directory, found $#; fbank.sh --help shows an example" >&2
  exit 2
fi
data=${1%/}
for file in "$config" "$data/wav.scp" "$data/utt2spk"; do
  if [[ ! -f $file ]]; then
    echo "fbank.sh: error: no such file: $file" >&2
    exit 1
  fi
done
utterances=$(wc -l <"$([[ -f $data/segments ]] && echo "$data/segments" || echo "$data/wav.scp")")
nj=$((nj > utterances ? utterances : nj))
nj=$((nj > 0 ? nj : 1))
read -ra runner <<<"$cmd"   # a command and its options

# What an earlier run left would point into archives that are about to change.
mkdir -p "$data/fbank/log"
rm -f "$data"/{feats.scp,utt2num_frames,utt2dur,fbank.yaml,cmvn.scp,global_cmvn.ark} "$data"/fbank/{feats.*,.feats.*,cmvn.ark,skipped.txt,log/fbank.*.log}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # the jobs are the parallelism
options=(--data "$data" --config "$config" --backend "$backend")
$compress && options+=(--compress)
$allow_pipes && options+=(--allow-pipes)
watch_progress fbank "$data/fbank"
"${runner[@]}" "JOB=1:$nj" "$data/fbank/log/fbank.JOB.log" speechtx fbank "${options[@]}" --job JOB --num-jobs "$nj"
stop_progress

speechtx fbank --data "$data" --config "$config" --num-jobs "$nj" --merge
speechtx cmvn --data "$data"
