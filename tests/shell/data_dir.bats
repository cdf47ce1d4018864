#!/usr/bin/env bats
# The data directory scripts of utils/data, called as a Kaldi user calls them.

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  PATH="$repo/.venv/bin:$repo/utils/data:$PATH"
  cd "$BATS_TEST_TMPDIR" || return
  mkdir -p data/train
  printf 'RIFF' >clip.wav
  for utt in ann-1 ann-2 bob-1 bob-2; do
    echo "$utt $PWD/clip.wav" >>data/train/wav.scp
    echo "$utt one two" >>data/train/text
    echo "$utt ${utt%-*}" >>data/train/utt2spk
  done
  printf 'ann ann-1 ann-2\nbob bob-1 bob-2\n' >data/train/spk2utt
}

@test "validate accepts a good directory before features exist, and asks for features as Kaldi does" {
  run validate_data_dir.sh --no-feats data/train
  [ "$status" -eq 0 ]
  [[ $output == "data/train: valid, 4 utterances of 2 speakers, 4 recordings" ]]
  run validate_data_dir.sh data/train
  [ "$status" -eq 1 ]
  [[ $output == *"data/train/feats.scp: no such file"* ]]
}

@test "validate fails with file, line and entry, without a traceback" {
  sed -i 's/^bob-1 .*/bob-1/' data/train/text
  run validate_data_dir.sh --no-feats data/train
  [ "$status" -eq 1 ]
  [[ $output == *"data/train/text:3: utterance bob-1: empty transcript"* ]]
  [[ $output != *Traceback* ]]
}

@test "fix makes a scrambled directory valid and keeps the old tables" {
  sort -r data/train/text | sed 's/$/\r/' >text && mv text data/train/text
  rm data/train/spk2utt
  run validate_data_dir.sh --no-feats data/train
  [ "$status" -eq 1 ]
  run fix_data_dir.sh data/train
  [ "$status" -eq 0 ]
  [[ $output == *"4 utterances kept, 0 dropped; the old tables are in data/train/.backup"* ]]
  validate_data_dir.sh --no-feats data/train
  grep -q $'\r' data/train/.backup/text
}

@test "fix exits non-zero and changes nothing when a person must decide" {
  echo 'bob-2 another transcript' >>data/train/text
  cp data/train/text before
  run fix_data_dir.sh data/train
  [ "$status" -eq 1 ]
  [[ $output == *"data/train/text:5: utterance bob-2 is already on line 4"* ]]
  cmp before data/train/text
}

@test "subset takes Kaldi's options and positions" {
  subset_data_dir.sh --first data/train 3 data/first
  [ "$(cut -d' ' -f1 data/first/text | xargs)" = "ann-1 ann-2 bob-1" ]
  subset_data_dir.sh --per-spk data/train 1 data/one
  [ "$(cut -d' ' -f1 data/one/text | xargs)" = "ann-1 bob-1" ]
  echo bob >speakers
  subset_data_dir.sh --spk-list speakers data/train data/bob
  [ "$(cut -d' ' -f1 data/bob/utt2spk | xargs)" = "bob-1 bob-2" ]
  validate_data_dir.sh --no-feats data/bob
  run subset_data_dir.sh data/train data/nothing
  [ "$status" -eq 2 ]
  run subset_data_dir.sh data/train many data/nothing
  [ "$status" -eq 2 ]
  run subset_data_dir.sh data/train 5 data/nothing
  [ "$status" -eq 1 ]
  [ ! -e data/nothing ]
}

@test "split and combine give the same directory back" {
  split_data.sh data/train 2
  [ "$(ls data/train/split2)" = $'1\n2' ]
  combine_data.sh data/again data/train/split2/1 data/train/split2/2
  for table in wav.scp text utt2spk spk2utt; do
    cmp "data/train/$table" "data/again/$table"
  done
  run combine_data.sh data/twice data/train data/train/split2/1
  [ "$status" -eq 1 ]
  [[ $output == *"ann-1 is both in data/train and in data/train/split2/1"* ]]
}

@test "copy renames utterances and speakers" {
  copy_data_dir.sh --utt-prefix lab- --spk-prefix lab- data/train data/lab
  [ "$(head -n 1 data/lab/utt2spk)" = "lab-ann-1 lab-ann" ]
  validate_data_dir.sh --no-feats data/lab
}

@test "perturb speed three ways, and one factor as in Kaldi" {
  perturb_data_dir_speed.sh data/train data/sp
  [ "$(wc -l <data/sp/text)" -eq 12 ]
  grep -qx 'sp0.9-bob-2 0.9' data/sp/utt2speed
  validate_data_dir.sh --no-feats data/sp
  perturb_data_dir_speed.sh 1.1 data/train data/fast
  [ "$(wc -l <data/fast/text)" -eq 4 ]
  run perturb_data_dir_speed.sh --speeds quick data/train data/none
  [ "$status" -eq 2 ]
}

@test "an unknown option is an error" {
  for script in validate_data_dir fix_data_dir subset_data_dir combine_data split_data copy_data_dir perturb_data_dir_speed; do
    run "$script.sh" --no-such-option data/train
    [ "$status" -eq 2 ]
  done
}

@test "a command in wav.scp is refused and never runs" {
  sed -i "1s| .*| touch $PWD/executed \\||" data/train/wav.scp
  run validate_data_dir.sh --no-feats data/train
  [ "$status" -eq 1 ]
  [[ $output == *"data/train/wav.scp:1: recording ann-1: a command"* ]]
  validate_data_dir.sh --no-feats --allow-pipes data/train
  fix_data_dir.sh --drop-missing-audio data/train
  [ ! -e executed ]
}
