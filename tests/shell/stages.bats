#!/usr/bin/env bats
# Selecting and skipping stages: utils/stages.sh and `speechtx stamp`, under the real run.sh of TEMPLATE with steps that only write files.

# One finished recipe is made for all tests; most of them begin with a copy of it.
setup_file() {
  make_recipe "$BATS_FILE_TMPDIR/finished"
  cd "$T/egs/x/asr1" || return
  ./run.sh >/dev/null
  rm "$T/calls"
}

finished() {
  export T=$BATS_TEST_TMPDIR/finished
  cp -a "$BATS_FILE_TMPDIR/finished" "$T"
  cd "$T/egs/x/asr1" || return
}

fresh() {
  make_recipe "$BATS_TEST_TMPDIR/fresh"
  cd "$T/egs/x/asr1" || return
}

make_recipe() {
  export T=$1
  local root real
  root=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  real=$(command -v "$root/.venv/bin/speechtx" || command -v speechtx)
  mkdir -p "$T/.venv/bin" "$T/utils/steps" "$T/egs/x"
  cp -R "$root/egs/TEMPLATE/asr1" "$T/egs/x/asr1"
  ln -s "$root/utils/stages.sh" "$root/utils/parse_options.sh" "$root/utils/parallel" "$T/utils/"
  program "$T/.venv/bin/speechtx" "[[ \$1 != stamp && \$1 != lm ]] || exec '$real' \"\$@\""
  program "$T/utils/steps/check.sh" 'echo "check $*" >>"$T/calls"'
  program "$T/egs/x/asr1/local/data.sh" '
    echo data >>"$T/calls"
    for name in train dev test; do
      mkdir -p data/$name
      echo "utt $name.wav" >data/$name/wav.scp
      echo "utt spk" >data/$name/utt2spk
      echo "utt ${WORDS:-HELLO}" >data/$name/text
    done'
  program "$T/utils/steps/fbank.sh" '
    dir=${!#}
    echo "fbank $dir" >>"$T/calls"
    cat conf/fbank.yaml >"$dir/fbank.yaml"
    for file in feats.scp utt2num_frames global_cmvn.ark; do cat "$dir/wav.scp" conf/fbank.yaml >"$dir/$file"; done'
  program "$T/utils/steps/bpe.sh" '
    echo bpe >>"$T/calls"
    mkdir -p "${!#}"
    cat data/train/text conf/train.yaml | grep -E "HELLO|BYE|vocab_size" >"${!#}/tokens.txt"'
  program "$T/utils/steps/train.sh" '
    echo "train $*" >>"$T/calls"
    [[ ! -e $T/fail_train ]] || { echo "out of luck" >&2; exit 3; }
    if [[ $* == *--restart=true* ]]; then
      rm -rf "${!#}.old"
      mv "${!#}" "${!#}.old" && mkdir "${!#}" && mv "${!#}.old/.stamps" "${!#}/"
    fi
    mkdir -p "${!#}"
    cat conf/train.yaml >"${!#}/config.yaml"
    [[ ! -e $T/kill_train ]] || { echo killed >&2; exit 9; }'
  program "$T/utils/steps/align.sh" '
    echo "align $*" >>"$T/calls"
    mkdir -p "${!#}/words"
    cat data/train/text >"${!#}/words/segments"'
  program "$T/utils/steps/lm.sh" '
    echo "lm $*" >>"$T/calls"
    mkdir -p "${!#}"
    : >"${!#}/perplexity.json"'
  program "$T/utils/steps/average.sh" 'echo average >>"$T/calls"; date +%s%N >"$1/model.pt"'
  program "$T/utils/steps/tune.sh" 'echo "tune $*" >>"$T/calls"; mkdir -p "${!#}"; cat conf/tune*.yaml >"${!#}/tuned.yaml"'
  program "$T/utils/steps/decode.sh" 'echo "$*" >>"$T/decode_arguments"; echo "decode ${!#}" >>"$T/calls"; mkdir -p "${!#}"; date +%s%N >"${!#}/text"'
  program "$T/utils/steps/score.sh" 'echo score >>"$T/calls"; echo "| test | 1.2 |" >"$3/RESULTS.md"'
}

program() {
  printf '#!/usr/bin/env bash\nset -euo pipefail\n%s\n' "$2" >"$1"
  chmod +x "$1"
}

# The stages that did something since the last call, without check.
calls() {
  cut -d' ' -f1 "$T/calls" | grep -v check | uniq | tr '\n' ' '
  rm "$T/calls"
}

@test "all stages run in order, and the scores and their places are shown" {
  fresh
  run ./run.sh --nj 1
  [ "$status" -eq 0 ]
  [ "$(calls)" = "data fbank bpe train average decode score " ]
  [[ $output =~ '['20..-..-..' '..:..:..'] stage 2 fbank: ' ]]
  [[ $output == *"| test | 1.2 |"* ]]
  [[ $output == *"$PWD/exp/train/RESULTS.md"* ]]
}

@test "a second run skips every stage" {
  finished
  run ./run.sh
  [ "$status" -eq 0 ]
  [ "$(calls)" = "" ]
  [ "$(grep -c 'up to date (finished 20' <<<"$output")" -eq 7 ]
}

@test "how many jobs and processes share the work decides nothing about what is up to date" {
  finished
  run ./run.sh --nj 7 --procs 3
  [ "$status" -eq 0 ]
  [ "$(calls)" = "" ]
}

@test "training gets as many processes as were asked for, else as many as pay" {
  finished
  ./run.sh --stage train --stop-stage train --force >/dev/null
  grep -q '^train .*--procs 0 ' "$T/calls"
  ./run.sh --stage train --stop-stage train --force --procs 3 >/dev/null
  grep -q '^train .*--procs 3 ' "$T/calls"
}

@test "a changed feature configuration reruns from stage 2, and says what changed" {
  finished
  sed -i 's/^num_mel_bins: .*/num_mel_bins: 40/' conf/fbank.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [ "$(calls)" = "fbank train average decode score " ]
  [[ $output == *"stage 2 fbank: "*"changed: num_mel_bins in conf/fbank.yaml"* ]]
}

@test "a changed tokenizer section leaves data and features alone" {
  finished
  sed -i 's/vocab_size: .*/vocab_size: 77/' conf/train.yaml
  run ./run.sh
  [ "$(calls)" = "bpe train average decode score " ]
  [[ $output == *"changed: tokenizer.vocab_size in conf/train.yaml"* ]]
}

@test "another model starts anew, more epochs continue" {
  finished
  sed -i 's/  epochs: .*/  epochs: 51/' conf/train.yaml
  run ./run.sh
  grep -q 'train .*--restart=false' "$T/calls"
  [ "$(calls)" = "train average decode score " ]
  sed -i 's/    dim: .*/    dim: 128/' conf/train.yaml
  run ./run.sh
  grep -q 'train .*--restart=true' "$T/calls"
  [[ $output == *"stage 4 train: "*"changed: model.encoder.dim in conf/train.yaml"* ]]
}

@test "a comment in a configuration changes nothing" {
  finished
  echo '# a thought' >>conf/train.yaml
  run ./run.sh
  [ "$(calls)" = "" ]
}

@test "another decoding configuration only decodes and scores again" {
  finished
  sed -i 's/^beam: .*/beam: 3/' conf/decode.yaml
  run ./run.sh
  [ "$(calls)" = "decode score " ]
}

@test "new transcripts from stage 1 reach every stage that reads them" {
  finished
  echo '# new' >>local/data.sh
  WORDS=BYE run ./run.sh
  [ "$(calls)" = "data fbank bpe train average decode score " ]
}

@test "stage 1 running again with the same result does not train again" {
  finished
  echo '# new' >>local/data.sh
  run ./run.sh
  [ "$(calls)" = "data fbank " ]
}

@test "a failed stage stops the recipe with its status, says so, and runs again" {
  fresh
  touch "$T/fail_train"
  run ./run.sh
  [ "$status" -eq 3 ]
  [[ $output == *"out of luck"* ]]
  [[ $output == *"stage 4 train did not finish (status 3)"* ]]
  [ "$(calls)" = "data fbank bpe train " ]
  rm "$T/fail_train"
  run ./run.sh
  [ "$status" -eq 0 ]
  [[ $output == *"stage 4 train: "*"again, because it did not finish"* ]]
  [ "$(calls)" = "train average decode score " ]
}

@test "another model still starts anew if its training could not start at first, and continues once it had" {
  finished
  sed -i 's/    dim: .*/    dim: 128/' conf/train.yaml
  touch "$T/fail_train"
  run ./run.sh --stop-stage train
  [ "$status" -eq 3 ]
  mv "$T/fail_train" "$T/kill_train"
  run ./run.sh --stop-stage train
  [ "$status" -eq 9 ]
  [[ $output == *"stage 4 train: "*"again, because it did not finish"* ]]
  [ "$(grep -c '^train .*--restart=true' "$T/calls")" -eq 2 ]
  rm "$T/kill_train" "$T/calls"
  run ./run.sh --stop-stage train
  [ "$status" -eq 0 ]
  [ "$(grep -c '^train .*--restart=false' "$T/calls")" -eq 1 ]
  sed -i 's/  epochs: .*/  epochs: 51/' conf/train.yaml
  run ./run.sh --stop-stage train
  [ "$(grep -c '^train .*--restart=false' "$T/calls")" -eq 2 ]
}

@test "a result that was removed is made again" {
  finished
  rm data/dev/feats.scp
  run ./run.sh
  [ "$(calls)" = "fbank " ]
  [[ $output == *"gone: data/dev/feats.scp"* ]]
}

@test "stages are selected by number and by name" {
  fresh
  run ./run.sh --stage data --stop-stage 2
  [ "$(calls)" = "data fbank " ]
  run ./run.sh --stage 3 --stop-stage bpe
  [ "$(calls)" = "bpe " ]
}

@test "unknown stages and reversed ranges are errors before anything runs" {
  fresh
  run ./run.sh --stage feats
  [ "$status" -eq 2 ]
  [[ $output == *"unknown stage 'feats'"*"2 fbank"* ]]
  run ./run.sh --stage train --stop-stage 2
  [ "$status" -eq 2 ]
  run ./run.sh train
  [ "$status" -eq 2 ]
  run ./run.sh --stpo-stage 2
  [ "$status" -eq 2 ]
  [[ $output == *"did you mean --stop-stage?"* ]]
  [ ! -e "$T/calls" ]
}

@test "--force runs the selected stages although nothing changed" {
  finished
  run ./run.sh --stage decode --stop-stage decode --force
  [ "$(calls)" = "decode " ]
}

@test "--restart trains from nothing although nothing changed" {
  finished
  run ./run.sh --restart --stop-stage train
  grep -q 'train .*--restart=true' "$T/calls"
}

@test "seed and overrides have experiment directories of their own" {
  fresh
  ./run.sh --stop-stage train
  run ./run.sh --stop-stage train --seed 2 --set model.encoder.layers=3 --set training.specaugment=null
  [ "$status" -eq 0 ]
  [ -e exp/train/config.yaml ]
  [ -e exp/train_encoder.layers3_training.specaugmentnull_seed2/config.yaml ]
  run ./run.sh --stop-stage train --exp exp/mine --seed 3
  [ -e exp/mine/config.yaml ]
}

@test "run.sh works from any folder" {
  fresh
  cd /
  run "$T/egs/x/asr1/run.sh" --stop-stage data
  [ "$status" -eq 0 ]
  [ -e "$T/egs/x/asr1/data/train/text" ]
}

@test "conf/lm.yaml brings the language models it has sections for, each with a stamp of its own" {
  finished
  printf 'ngram: {order: 3}\n' >conf/lm.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [[ $output == *'stage 3 ngram: n-gram language model in exp/lm/train/ngram'* ]]
  [[ $output != *'stage 4 transformer'* ]]
  [ "$(cut -d' ' -f1-4 "$T/calls" | grep lm)" = "lm --config conf/lm.yaml ngram" ]
  [ "$(calls)" = "lm " ] # nothing else runs again
  printf 'ngram: {order: 3}\ntransformer:\n  epochs: 3\n  dim: 16\n' >conf/lm.yaml
  ./run.sh
  grep -q -- '--restart=false transformer data/train data/dev data/tokenizer/train exp/lm/train/transformer' "$T/calls"
  [ "$(calls)" = "lm " ]
  run ./run.sh
  [[ $output == *'stage 3 ngram: up to date'*'stage 4 transformer: up to date'* ]]
}

@test "a section lexicon makes a model of whole words, whose word lists are watched, and which takes the place of the n-gram" {
  finished
  echo 'HELLO WORLD' >words.txt
  printf 'ngram: {order: 3}\nlexicon: {order: 1, words: [words.txt]}\n' >conf/lm.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [[ $output == *'stage 3 lexicon: word n-gram and lexicon in exp/lm/train/lexicon'* ]]
  grep -q 'lexicon data/train data/dev data/tokenizer/train exp/lm/train/lexicon' "$T/calls"
  rm "$T/calls"
  echo 'AGAIN' >>words.txt
  run ./run.sh
  [[ $output == *'stage 3 ngram: up to date'*'stage 3 lexicon: '*'changed: words.txt'* ]]
  rm "$T/calls"
  echo 'ngram_weight: 0.3' >>conf/decode.yaml
  ./run.sh
  grep -q -- '--ngram exp/lm/train/lexicon' "$T/decode_arguments"
}

@test "searches by phones are done if the model predicts phones, and if they are named" {
  finished
  printf 'phone_weight: 0.5\n' >conf/decode_phones.yaml
  run ./run.sh
  [[ $output != *decode_phones* ]]
  run ./run.sh --set model.intermediate_ctc.lexicon=lexicon.txt
  [ "$status" -eq 0 ]
  grep -q 'decode_test_decode_phones' "$T/calls"
  rm "$T/calls"
  ./run.sh --decode-config conf/decode_phones.yaml
  grep -q 'check .*--decode-config conf/decode_phones.yaml' "$T/calls" # where it is refused
}

@test "a configuration that joins words gets a first model to find them, once for all seeds" {
  finished
  printf '  join:\n    words: exp/align/words\n' >>conf/train.yaml # its last section is training
  run ./run.sh
  [[ $output != *'stage 4 align'* ]] # nobody says what the first model is like
  rm "$T/calls"
  cp conf/train.yaml conf/align.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [[ $output == *'stage 4 align: words of train, by a first model in exp/align'* ]]
  [[ $output == *'stage 4 train: training in exp/train; changed: exp/align/words'* ]]
  grep -q -- '--restart=false data/train data/dev exp/align' "$T/calls"
  grep -q -- '--align-config conf/align.yaml' "$T/calls"
  rm "$T/calls"
  run ./run.sh --seed 2
  [[ $output == *'stage 4 align: up to date'*'stage 4 train: training in exp/train_seed2'* ]]
  rm "$T/calls"
  echo '  epochs: 3' >>conf/align.yaml
  run ./run.sh --stop-stage train
  [[ $output == *'stage 4 align: '*'changed: training.epochs in conf/align.yaml'* ]]
  grep -q -- '--restart=true data/train data/dev exp/align' "$T/calls"
}

@test "a language model is made anew when it must be, continued when it can be, and made again when its text changes" {
  finished
  echo 'HELLO AGAIN' >more.txt
  printf 'ngram:\n  text: [more.txt]\ntransformer:\n  epochs: 3\n  dim: 16\n' >conf/lm.yaml
  ./run.sh
  rm "$T/calls"
  sed -i 's/epochs: 3/epochs: 4/' conf/lm.yaml
  run ./run.sh
  [[ $output == *'stage 4 transformer: '*'changed: transformer.epochs in conf/lm.yaml'* ]]
  grep -q -- '--restart=false transformer' "$T/calls"
  [ "$(calls)" = "lm " ]
  sed -i 's/dim: 16/dim: 32/' conf/lm.yaml
  ./run.sh
  grep -q -- '--restart=true transformer' "$T/calls"
  [ "$(calls)" = "lm " ]
  echo 'BYE' >>more.txt
  run ./run.sh
  [[ $output == *'stage 3 ngram: '*'changed: more.txt'*'stage 4 transformer: up to date'* ]]
}

@test "a section without a value, or in another style of YAML, is what the schema makes of it" {
  finished
  printf '"ngram": {order: 3}\ntransformer: null\nlexicon: # none yet\n' >conf/lm.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [[ $output == *'stage 3 ngram: '* ]]
  [[ $output != *transformer* && $output != *lexicon* ]]
  [ "$(calls)" = "lm " ]
}

@test "a wrong language model configuration is an error from whichever stage on, and stage 0 tells it" {
  finished
  echo 'ngrams: {order: 3}' >conf/lm.yaml
  run ./run.sh --stage train
  [ "$status" -eq 1 ]
  [[ $output == *"conf/lm.yaml:1: ngrams: unknown key; did you mean 'ngram'?"* ]]
  run ./run.sh --stop-stage check
  [ "$status" -eq 0 ] # of the check that this test has in its place
  grep -q -- '--lm-config conf/lm.yaml' "$T/calls"
  [[ $output != *"unknown key"* ]]
}

@test "a language model configuration that is named must exist" {
  finished
  run ./run.sh --lm-config conf/none.yaml
  [ "$status" -eq 2 ]
  [[ $output == *'--lm-config conf/none.yaml: no such file'* ]]
  [ ! -e "$T/calls" ]
}

@test "weights are tuned on the development set where there is a grid, before it and the test set are decoded with them" {
  finished
  echo 'ctc_weight: [0.3, 0.5]' >conf/tune.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  grep -q '^tune .*--config conf/decode.yaml --grid conf/tune.yaml exp/train data/dev exp/train/tune_dev_decode$' "$T/calls"
  [ "$(calls)" = "tune decode score " ]
  [[ $output == *"stage 6 tune: weights of conf/decode.yaml, chosen on dev"* ]]
  [ "$(tail -2 "$T/decode_arguments" | grep -c -- '--config exp/train/tune_dev_decode/tuned.yaml exp/train data/')" -eq 2 ]
  run ./run.sh
  [ "$(calls)" = "" ]
  echo 'ctc_weight: [0.3, 0.5, 0.7]' >conf/tune.yaml
  run ./run.sh
  [ "$(calls)" = "tune decode score " ]
  [[ $output == *"stage 6 tune: "*"changed: ctc_weight in conf/tune.yaml"* ]]
  rm conf/tune.yaml
  run ./run.sh
  [ "$(calls)" = "decode score " ]
  tail -1 "$T/decode_arguments" | grep -q -- '--config conf/decode.yaml '
}

@test "a grid that leads to the same choice decodes nothing again" {
  finished
  program "$T/utils/steps/tune.sh" 'echo "tune $*" >>"$T/calls"; mkdir -p "${!#}"; echo "ctc_weight: 0.3" >"${!#}/tuned.yaml"'
  echo 'ctc_weight: [0.3, 0.5]' >conf/tune.yaml
  ./run.sh >/dev/null
  rm "$T/calls"
  echo 'ctc_weight: [0.3, 0.5, 0.7]' >conf/tune.yaml
  run ./run.sh
  [ "$(calls)" = "tune " ]
}

@test "every decoding configuration in conf is used, and each has its own grid, directories and stamps" {
  finished
  echo 'method: ctc_greedy' >conf/decode_ctc.yaml
  echo 'beam: 2' >conf/decode_lm.yaml
  echo 'beam: [1, 2]' >conf/tune_lm.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [ "$(cut -d' ' -f1,2 "$T/calls" | grep -c '^decode exp/train/decode_test_decode_')" -eq 2 ]
  [ "$(grep -c '^tune .*tune_dev_decode_lm$' "$T/calls")" -eq 1 ]
  [ "$(calls)" = "decode tune decode score " ]
  [ -d exp/train/decode_dev_decode_ctc ] && [ -d exp/train/decode_test_decode_lm ]
  echo 'beam: 3' >conf/decode_lm.yaml
  run ./run.sh
  [ "$(calls)" = "tune " ]
  run ./run.sh --decode-config conf/decode_ctc.yaml --force --stage decode
  [ "$(grep -c '^decode .*_decode_ctc$' "$T/calls")" -eq 2 ]
  [ "$(grep -c '^decode' "$T/calls")" -eq 2 ]
  run ./run.sh --decode-config conf/none.yaml
  [ "$status" -eq 2 ]
  [[ $output == *"conf/none.yaml: no such decoding configuration"* ]]
}

@test "language models that conf/lm.yaml makes are given to the search, and only those with a weight make it run again" {
  finished
  printf 'ngram:\n  order: 3\n' >conf/lm.yaml
  echo 'ngram_weight: 0.2' >conf/decode_lm.yaml
  run ./run.sh
  [ "$status" -eq 0 ]
  [ "$(calls)" = "lm decode score " ]
  tail -1 "$T/decode_arguments" | grep -q -- '--ngram exp/lm/train/ngram --config conf/decode_lm.yaml'
  [[ $(<"$T/decode_arguments") != *"--lm "* ]]
  sed -i 's/3/4/' conf/lm.yaml
  run ./run.sh
  [ "$(grep -c '^decode .*decode_lm$' "$T/calls")" -eq 2 ]
  [ "$(grep -c '^decode .*decode$' "$T/calls")" -eq 0 ]
}

@test "weights are chosen anew for another language model, however the grid is written" {
  finished
  printf 'ngram:\n  order: 3\n' >conf/lm.yaml
  for grid in 'ngram_weight: [0.0, 0.2]' $'ngram_weight:\n  - 0.0\n  - 0.2' $'ngram_weight: # of the n-gram\n  - 0.2'; do
    echo "$grid" >conf/tune.yaml
    ./run.sh >/dev/null
    echo "  text: [data/train]" >>conf/lm.yaml
    rm "$T/calls"
    ./run.sh >/dev/null
    grep -q '^tune ' "$T/calls"
    sed -i '$d' conf/lm.yaml
  done
}

@test "stage 0 is told every decoding configuration and its grid" {
  finished
  echo 'beam: [1, 2]' >conf/tune.yaml
  echo 'beam: 2' >conf/decode_x.yaml
  run ./run.sh --stop-stage check
  [ "$(grep -c -- '--decode-config conf/decode.yaml --tune conf/decode.yaml conf/tune.yaml --decode-config conf/decode_x.yaml' "$T/calls")" -eq 1 ]
}

@test "stage 0 is told at which speeds the training set will be copied" {
  finished
  run ./run.sh --stop-stage check --speeds 0.9,1.0,1.1
  grep -q -- '--speeds 0.9,1.0,1.1 ' "$T/calls"
}

@test "the page is written again when a decoding changed, although its text did not" {
  finished
  program "$T/utils/steps/decode.sh" 'echo "decode ${!#}" >>"$T/calls"; mkdir -p "${!#}"; echo "utt HELLO" >"${!#}/text"'
  ./run.sh --stage decode --force >/dev/null
  rm "$T/calls"
  sed -i 's/^beam: .*/beam: 3/' conf/decode.yaml
  run ./run.sh
  [ "$(calls)" = "decode score " ]
}

@test "an edited exp/NAME/config.yaml is decoded anew" {
  finished
  sed -i 's/    dim: .*/    dim: 128/' exp/train/config.yaml
  run ./run.sh
  [ "$(calls)" = "decode score " ]
}

# Lets `data perturb-speed` of the stub write a set that tells its speeds.
with_speeds() {
  mv "$T/.venv/bin/speechtx" "$T/.venv/bin/speechtx.stub"
  program "$T/.venv/bin/speechtx" '
    [[ "$1 ${2:-}" == "data perturb-speed" ]] || exec speechtx.stub "$@"
    rm -rf "$6" && cp -R "$5" "$6" && echo "utt $4" >"$6/utt2speed"'
}

@test "features that a run at other speeds computed otherwise are computed again, equal ones are not" {
  finished
  with_speeds
  ./run.sh --speeds 0.9,1.1 --stop-stage fbank >/dev/null
  [ "$(calls)" = "fbank " ]
  run ./run.sh --stop-stage fbank
  [ "$(calls)" = "" ]
  sed 's/^num_mel_bins: .*/num_mel_bins: 40/' conf/fbank.yaml >conf/narrow.yaml
  mv conf/fbank.yaml conf/wide.yaml
  cp conf/narrow.yaml conf/fbank.yaml
  ./run.sh --speeds 0.9,1.1 --stop-stage fbank >/dev/null
  cp conf/wide.yaml conf/fbank.yaml
  rm "$T/calls"
  run ./run.sh --stop-stage fbank
  [[ $output == *"stage 2 fbank: "*"changed: data/dev/fbank.yaml, data/test/fbank.yaml"* ]]
  [ "$(calls)" = "fbank " ]
}

@test "features at some speeds are not taken for those at others" {
  finished
  with_speeds
  for speeds in 0.9,1.0,1.1 0.8,1.2 0.9,1.0,1.1; do
    ./run.sh --speeds "$speeds" --stop-stage fbank >/dev/null
    [ "$(cat data/train_sp/utt2speed)" = "utt $speeds" ]
    [ "$(calls)" = "fbank " ]
  done
  run ./run.sh --speeds 0.9,1.0,1.1 --stop-stage fbank
  [ "$(calls)" = "" ]
}
