#!/usr/bin/env bash
# Stage 1 of a new corpus: write data/train, data/dev and data/test. This is the only file you must write; the other stages
# never look at your corpus, only at these directories.
#
# Each of the three directories holds four tables. Every line is a key, a space, and the rest; UTF-8, LF, sorted by key in C order
# (LC_ALL=C sort), each key once:
#
#   wav.scp   UTTERANCE FILE          one audio file an utterance: wav, flac or sph, mono, at the sample_rate of conf/fbank.yaml;
#                                     absolute paths, so that the directories work from anywhere
#   text      UTTERANCE WORDS         what is said, normalised as you want it scored: one case, no punctuation you do not score
#   utt2spk   UTTERANCE SPEAKER       who says it; utterance ids must begin with the speaker id, so that both sort alike
#   spk2utt   SPEAKER UTTERANCE ...   the same, by speaker; `speechtx data fix` writes it from utt2spk
#
# Long recordings with several utterances: wav.scp then lists RECORDING FILE, and a fifth table cuts them (times in seconds):
#   segments  UTTERANCE RECORDING START END
#
# Keep the sets apart: no speaker, and ideally no sentence, in two of them; choose everything (models, settings, when to stop) on dev,
# and let test say only how good the choice was.
#
# A worked example. Say the corpus is a folder with one tab-separated list a set, such as train.tsv:
#
#   anna/0001.wav <TAB> Good morning, everybody.
#   ben/0007.wav  <TAB> What's the time?
#
# Replace everything below the line "Write it here" with this, and run ./run.sh --stage data --stop-stage data:
#
#   corpus=$(realpath "${CORPUS:?set CORPUS to the folder with train.tsv, dev.tsv and test.tsv}")
#   for name in train dev test; do
#       mkdir -p "data/$name"
#       python3 - "$corpus" "$name" "data/$name" <<'PYTHON'
#   import re, sys
#   from pathlib import Path
#   from speechtx.data.kaldi_table import write_table
#
#   corpus, name, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
#   wav, text, speaker = {}, {}, {}
#   for line in (corpus / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
#       file, words = line.split("\t")
#       key = "-".join(Path(file).with_suffix("").parts)               # anna-0001: the speaker comes first
#       wav[key] = str(corpus / file)
#       text[key] = " ".join(re.sub(r"[^\w' ]", " ", words).upper().split())  # GOOD MORNING EVERYBODY
#       speaker[key] = Path(file).parts[0]
#   for table, values in (("wav.scp", wav), ("text", text), ("utt2spk", speaker)):
#       write_table(out / table, values)
#   PYTHON
#       speechtx data fix "data/$name"
#   done
#
# Larger examples: egs/an4 (an archive with its own lists), egs/yesno (names that are transcripts), egs/mini (audio made on the spot).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
. ./path.sh

# ---- Write it here -------------------------------------------------------------------------------------------------------------

cat >&2 <<EOF
$PWD/local/data.sh: error: the data preparation of this corpus is not written yet.
It must make data/train, data/dev and data/test, each with the tables
  wav.scp   UTTERANCE FILE
  text      UTTERANCE WORDS
  utt2spk   UTTERANCE SPEAKER
  spk2utt   SPEAKER UTTERANCE ...
Open the file: the comments say what goes into each and show a complete example. Then run ./run.sh --stage data again.
EOF
exit 1
