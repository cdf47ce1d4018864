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

# Shows one line that is rewritten every second: how far all jobs together are, their rate and the time left.
watch_progress() {
  local start=$EPOCHREALTIME
  while sleep 1; do
    cat "$data"/fbank/feats.*.progress 2>/dev/null | awk -v utterances="$utterances" -v start="$start" -v now="$EPOCHREALTIME" '
      { done += $1; audio += $3 }
      END {
        elapsed = now - start
        if (!done) exit
        left = elapsed / done * (utterances - done)
        printf "  fbank %d/%d utterances, %.0f/s, %.0f x real time, %d:%02d left\033[K\r", done, utterances, done / elapsed, audio / elapsed, left / 60, left % 60
      }' >&2 || true
  done
}

# What an earlier run left would point into archives that are about to change.
mkdir -p "$data/fbank/log"
rm -f "$data"/{feats.scp,utt2num_frames,utt2dur,fbank.yaml,cmvn.scp,global_cmvn.ark} "$data"/fbank/{feats.*,.feats.*,cmvn.ark,skipped.txt,log/fbank.*.log}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # the jobs are the parallelism
options=(--data "$data" --config "$config" --backend "$backend")
$compress && options+=(--compress)
$allow_pipes && options+=(--allow-pipes)
watcher=''
if [[ -t 2 ]]; then
  watch_progress &
  watcher=$!
  trap 'kill "$watcher" 2>/dev/null || true' EXIT
fi
"${runner[@]}" "JOB=1:$nj" "$data/fbank/log/fbank.JOB.log" speechtx fbank "${options[@]}" --job JOB --num-jobs "$nj"
if [[ -n $watcher ]]; then
  kill "$watcher" 2>/dev/null || true
  printf '\033[K' >&2
fi

speechtx fbank --data "$data" --config "$config" --num-jobs "$nj" --merge
speechtx cmvn --data "$data"
