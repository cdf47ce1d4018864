#!/usr/bin/env bats
# Comparing changes of a recipe: utils/ablation.sh, with a run.sh and a speechtx that only write down how they were called.

setup() {
  ablation=$(cd "$BATS_TEST_DIRNAME/../../utils" && pwd)/ablation.sh
  cd "$BATS_TEST_TMPDIR" || return
  mkdir -p bin conf
  echo 'export PATH=$PWD/bin:$PATH' >path.sh
  printf '#!/bin/bash\necho "$*" >>calls\n[[ "$*" != *broken* || "$*" == *"--stop-stage "* ]] && [[ "$*" != *mistaken* ]]\n' >run.sh
  printf '#!/bin/bash\necho "speechtx $*" >>calls\n' >bin/speechtx
  chmod +x run.sh bin/speechtx
  cat >conf/ablation.txt <<'LIST'
# what each gives
--set training.epochs=10

--set training.ema=null   # a comment
--set model.ctc_weight=0.3 --set training.epochs=30 --speeds=
LIST
}

@test "every line runs with every seed, on top of the first line, and all are compared" {
  run "$ablation" --seeds 1,7 --nj 2 conf/ablation.txt OUT.md
  [ "$status" -eq 0 ]
  [ "$(grep -c -- '--stage bpe' calls)" -eq 6 ]
  common='--ngpu 0 --decode-config conf/decode.yaml --set training.epochs=10'
  alone='--nj 1 --procs 1 --stage bpe'
  grep -qxF -- "$common --exp exp/ablation/base_seed1 --seed 1 $alone" calls
  grep -qxF -- "$common --set training.ema=null --exp exp/ablation/training.ema-null_seed7 --seed 7 $alone" calls
  change='--set model.ctc_weight=0.3 --set training.epochs=30 --speeds='
  grep -qxF -- "$common $change --exp exp/ablation/model.ctc_weight-0.3-training.epochs-30---speeds-_seed7 --seed 7 $alone" calls
  tail -1 calls | grep -q '^speechtx compare exp/ablation/base_seed1 exp/ablation/training.ema-null_seed1 .* exp/ablation/base_seed7 .* --out OUT.md$'
}

@test "data and features are made once for each set of copies, and every line is checked, before anything is trained" {
  run "$ablation" --seeds 1,2 --archive 'a b.tgz' conf/ablation.txt OUT.md
  [ "$status" -eq 0 ]
  [ "$(grep -c -- '--stage data --stop-stage fbank$' calls)" -eq 2 ]
  [ "$(sed -n 3,5p calls | grep -c -- '--stage check --stop-stage check$')" -eq 3 ]
  head -2 calls | grep -c -- '--archive a b.tgz .*--stage data --stop-stage fbank$' | grep -qx 2
  grep -q -- '--archive a b.tgz .* --stage bpe$' calls
}

@test "a run that fails is named, the others finish, and no page is written" {
  echo '--set broken=1' >>conf/ablation.txt
  echo '--set later=1' >>conf/ablation.txt
  run "$ablation" --nj 1 conf/ablation.txt OUT.md
  [ "$status" -ne 0 ]
  [[ $output == *"1 of 5 job(s) failed: 4"* ]]
  grep -q -- 'later=1 .*--stage bpe' calls
  run grep -q '^speechtx compare' calls
  [ "$status" -eq 1 ]
}

@test "a mistake in any line is told before anything is trained" {
  printf -- '--set mistaken=1' >>conf/ablation.txt   # no end of line
  run "$ablation" conf/ablation.txt OUT.md
  [ "$status" -eq 2 ]
  [[ $output == *"conf/ablation.txt: --set mistaken=1: see above"* ]]
  run grep -q -- '--stage bpe' calls
  [ "$status" -eq 1 ]
}

@test "two do not work in one recipe at the same time, and TERM ends what runs" {
  printf '#!/bin/bash\n[[ "$*" == *"--stop-stage "* ]] || { touch at_work; sleep 60; }\n' >run.sh
  "$ablation" --nj 1 conf/ablation.txt OUT.md >first.out 2>&1 3>&- &
  first=$!
  for _ in {1..200}; do [[ -e at_work ]] && break; sleep 0.1; done
  run "$ablation" conf/ablation.txt OUT.md
  [[ $status -eq 2 && $output == *"another one is at work here"* ]]
  kill -TERM "$first"
  wait "$first" || status=$?
  [ "$status" -eq 143 ]
  exec 9>exp/ablation/.lock
  flock -n 9   # nothing that it started is left
}

@test "a list that cannot be run is refused" {
  echo '--set training.ema=null' >>conf/ablation.txt
  run "$ablation" conf/ablation.txt OUT.md
  [ "$status" -eq 2 ]
  [[ $output == *"two runs would share exp/ablation/training.ema-null_seed1"* ]]
  printf '%s\n' '# nothing' >empty.txt
  run "$ablation" empty.txt OUT.md
  [ "$status" -eq 2 ]
  [[ $output == *"empty.txt: no line with options"* ]]
  printf '%s\n' '' '--set a=1' '--fbank-config conf/other.yaml' >features.txt
  run "$ablation" features.txt OUT.md
  [[ $status -eq 2 && $output == *"features of one kind lie in data/"* ]]
  printf '%s\n' '--set a=1' '--speeds 0.8,1.0' >speeds.txt
  run "$ablation" speeds.txt OUT.md
  [[ $status -eq 2 && $output == *"name these speeds in the first line too"* ]]
  printf '%s\n' '--speeds 0.9,1.0' '--speeds=0.8,1.0' >speeds.txt
  run "$ablation" speeds.txt OUT.md
  [[ $status -eq 2 && $output == *"0.9,1.0 was named before"* ]]
  printf '%s\n' '--set a=1' '--set training.join.words=exp/align/words' >words.txt
  run "$ablation" words.txt OUT.md
  [[ $status -eq 2 && $output == *"exp/align/words is not there"* ]]
  [ ! -e calls ]
  run "$ablation" --seeds one conf/ablation.txt OUT.md
  [[ $status -eq 2 && $output == *"--seeds takes whole numbers"* ]]
  cd conf && run "$ablation" ablation.txt OUT.md
  [[ $status -eq 2 && $output == *"call it in a recipe's directory"* ]]
}
