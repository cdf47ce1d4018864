#!/usr/bin/env bash
# Stage 1 of TEMPLATE: writes the Kaldi data directories data/{train,dev,test}. This is the one script a new corpus needs.
#
# Each directory holds, sorted by key in C order, UTF-8:
#   wav.scp   <utterance-id> <path of its audio file: wav, flac, sphere>       (a recording id instead, if there are segments)
#   text      <utterance-id> <transcript, in the form that is to be scored>
#   utt2spk   <utterance-id> <speaker-id>                                     (begin utterance ids with the speaker's id)
#   segments  <utterance-id> <recording-id> <start> <end>                     (optional; seconds in the recording)
# `speechtx data fix` sorts, makes spk2utt and leaves out what is incomplete; `speechtx data subset` cuts off a dev set.
# docs/new_corpus.md walks through an example.
set -euo pipefail

echo "local/data.sh: error: not written yet; it must make data/{train,dev,test} (its header and docs/new_corpus.md say how)" >&2
exit 1

# For example, with a table of "file<TAB>speaker<TAB>transcript" lines for each set:
#
# for name in train dev test; do
#   mkdir -p "data/$name"
#   : >"data/$name/wav.scp" && : >"data/$name/text" && : >"data/$name/utt2spk"
#   while IFS=$'\t' read -r file speaker words; do
#     id=$speaker-$(basename "$file" .wav)
#     echo "$id $file" >>"data/$name/wav.scp"
#     echo "$id $words" >>"data/$name/text"
#     echo "$id $speaker" >>"data/$name/utt2spk"
#   done <"/path/to/corpus/$name.tsv"
#   speechtx data fix "data/$name"
# done
