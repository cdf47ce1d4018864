#!/usr/bin/env bats
# Stages 3 and 7 as a recipe calls them: the tokenizer, sclite on two decoding directories, RESULTS.md.

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  PATH="$repo/.venv/bin:$repo/utils/steps:$PATH"
  cd "$BATS_TEST_TMPDIR" || return
  mkdir -p data/dev data/test conf exp/tokenizer
  printf 'u-1 HELLO WORLD\nu-2 ONE (TWO) 你好\n' | tee data/dev/text >data/test/text
  printf 'u-1 u\nu-2 u\n' | tee data/dev/utt2spk >data/test/utt2spk
  printf 'tokenizer: {type: char}\n' >conf/train.yaml
}

sclite_or_skip() {
  [[ -n ${SPEECHTX_SCLITE:-} || -x $repo/tools/sctk/bin/sclite || -x /usr/lib/sctk/bin/sclite ]] || command -v sclite >/dev/null \
    || skip "NIST sclite is not installed (tools/install_sctk.sh)"
}

decode_dir() {
  mkdir -p "$1"
  printf '%s\n' "$2" "$3" >"$1/text"
  printf '{"config": {"beam": 2}, "num_utts": 2, "failed": {}, "rtf": 0.1, "device": "cpu"}\n' >"$1/decode.json"
}

experiment() {
  printf '{"command": "speechtx train --dev data/dev", "git_hash": "0", "versions": {}, "device": "cpu", "num_parameters": 9, %s}\n' \
    '"seed": 1, "train_seconds": 36' >exp/run.json
  printf '{"by": "dev_acc", "epochs": [1]}\n' >exp/average.json
  printf '{"epoch": 1}\n' >exp/metrics.jsonl
  bpe.sh data/dev/text exp/tokenizer
}

@test "bpe.sh makes the tokenizer and counts what another text has that it does not know" {
  printf 'x ЖУК\n' >other
  run bpe.sh --report other data/dev/text exp/tokenizer
  [ "$status" -eq 0 ]
  [[ $output == *"data/dev/text: 2 utterances, 5 words"*"0 <unk>"* ]]
  [[ $output == *"other: 1 utterances"*"1 <unk>"*"ЖУК"* ]]
  [ -s exp/tokenizer/bpe.model ] && [ -s exp/tokenizer/tokens.txt ]
}

@test "bpe.sh names the file that is missing and the option that does not exist" {
  run bpe.sh data/nowhere/text exp/tokenizer
  [ "$status" -eq 1 ] && [[ $output == *"data/nowhere/text: no such file"* ]]
  run bpe.sh --confg x data/dev/text exp/tokenizer
  [ "$status" -eq 2 ] && [[ $output == *"did you mean --config"* ]]
}

@test "score.sh scores every decoding directory in every unit and writes RESULTS.md" {
  sclite_or_skip
  experiment
  decode_dir exp/decode_test_a 'u-1 HELLO WORLD' 'u-2 ONE (TWO)'
  decode_dir exp/decode_test_b 'u-1 HELLO' 'u-2'
  run score.sh --unit "wer cer ter" --note "A toy." exp data/test exp/decode_test_a exp/decode_test_b
  [ "$status" -eq 0 ]
  for name in a b; do
    for unit in wer cer ter; do [ -s "exp/decode_test_$name/score_$unit/result.pra" ]; done
  done
  grep -q '^| test .* a: .* 20.00 ' exp/RESULTS.md
  grep -q '^| test .* b: .* 80.00 ' exp/RESULTS.md
  grep -q '^> A toy' exp/RESULTS.md
}

@test "score.sh can score one set after another although both were decoded again" {
  sclite_or_skip
  experiment
  decode_dir exp/decode_dev_a 'u-1 HELLO WORLD' 'u-2 ONE'
  decode_dir exp/decode_test_a 'u-1 HELLO WORLD' 'u-2 ONE'
  for set in dev test; do score.sh exp "data/$set" "exp/decode_${set}_a"; done
  decode_dir exp/decode_dev_a 'u-1 HELLO' 'u-2 ONE'
  decode_dir exp/decode_test_a 'u-1 HELLO' 'u-2 ONE'
  for set in dev test; do score.sh exp "data/$set" "exp/decode_${set}_a"; done
  [ "$(grep -c ' 60.00 ' exp/RESULTS.md)" -eq 2 ]
}

@test "score.sh stops at a missing hypothesis, and counts it as deleted only when asked" {
  sclite_or_skip
  experiment
  decode_dir exp/decode_test_a 'u-1 HELLO WORLD' 'u-1x ONE'
  sed -i '$d' exp/decode_test_a/text
  run score.sh exp data/test exp/decode_test_a
  [ "$status" -eq 1 ] && [[ $output == *"1 of 2 utterances have no hypothesis: u-2"* ]]
  run score.sh --allow-missing exp data/test exp/decode_test_a
  [ "$status" -eq 0 ] && [[ $output == *"counted as deleted: u-2"* && $output == *"WER 60.00 %"* ]]
}
