#!/usr/bin/env bats
# A recipe of one's own with one command: utils/new_recipe.sh.

setup() {
  root=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
}

@test "a recipe outside of the repository is complete, named, and finds the steps" {
  run "$root/utils/new_recipe.sh" "$BATS_TEST_TMPDIR/some where/mycorpus"
  [ "$status" -eq 0 ]
  cd "$BATS_TEST_TMPDIR/some where/mycorpus/asr1"
  [ -x run.sh ] && [ -x local/data.sh ] && [ -f conf/train.yaml ] && [ -f path.sh ] && [ -f cmd.sh ]
  [ -x utils/steps/fbank.sh ]
  grep -q mycorpus run.sh
  ! grep -rq TEMPLATE run.sh local || return 1
  run ./run.sh --help
  [ "$status" -eq 0 ]
  [[ $output == *mycorpus* ]]
}

@test "before local/data.sh is written, stage 1 says what to write" {
  "$root/utils/new_recipe.sh" "$BATS_TEST_TMPDIR/c"
  cd "$BATS_TEST_TMPDIR/c/asr1"
  run ./run.sh --stage data
  [ "$status" -eq 1 ]
  [[ $output == *"local/data.sh: error: "*"not written yet"* ]]
  [[ $output == *"stage 1 data did not finish"* ]]
}

@test "inside of the repository the link to utils is relative" {
  copy=$BATS_TEST_TMPDIR/repo
  mkdir -p "$copy/egs"
  cp -R "$root/utils" "$copy/"
  cp -R "$root/egs/TEMPLATE" "$copy/egs/"
  run "$copy/utils/new_recipe.sh" mine
  [ "$status" -eq 0 ]
  [ "$(readlink "$copy/egs/mine/asr1/utils")" = ../../../utils ]
  [ -f "$copy/egs/mine/asr1/utils/stages.sh" ]
}

@test "an existing recipe is never overwritten" {
  mkdir -p "$BATS_TEST_TMPDIR/c/asr1"
  echo precious >"$BATS_TEST_TMPDIR/c/asr1/run.sh"
  run "$root/utils/new_recipe.sh" "$BATS_TEST_TMPDIR/c"
  [ "$status" -eq 1 ]
  [[ $output == *"exists already"* ]]
  [ "$(cat "$BATS_TEST_TMPDIR/c/asr1/run.sh")" = precious ]
}

@test "a name that would break paths is refused, and so is none" {
  run "$root/utils/new_recipe.sh" 'my corpus'
  [ "$status" -eq 1 ]
  [ ! -e "$root/egs/my corpus" ]
  run "$root/utils/new_recipe.sh"
  [ "$status" -eq 2 ]
}
