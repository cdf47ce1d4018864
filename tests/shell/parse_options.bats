#!/usr/bin/env bats
# Options of recipes and steps: utils/parse_options.sh.

setup() {
  utils=$(cd "$BATS_TEST_DIRNAME/../../utils" && pwd)
  script=$BATS_TEST_TMPDIR/step.sh
  cat >"$script" <<END
#!/usr/bin/env bash
# Does something.
#
#   --nj N            parallel jobs
#   --config FILE     a file
#   --set KEY=VALUE   override (repeatable)
#   --compress        a switch
#   --orphan TEXT     documented, but without a default
set -euo pipefail
nj=4 config=conf/a.yaml set=() compress=false hidden=1
# --hidden N          is not in the header
source "$utils/parse_options.sh"
echo "nj=\$nj config=\$config set=\${#set[@]}:\${set[*]} compress=\$compress hidden=\$hidden rest=\$*"
END
  chmod +x "$script"
}

@test "defaults stay when nothing is given" {
  run "$script"
  [ "$status" -eq 0 ]
  [ "$output" = "nj=4 config=conf/a.yaml set=0: compress=false hidden=1 rest=" ]
}

@test "options, switches, repeated options and positional arguments arrive" {
  run "$script" --nj 8 --set a=1 --config=x.yaml --set b=2 --compress data/train 'two words'
  [ "$status" -eq 0 ]
  [ "$output" = "nj=8 config=x.yaml set=2:a=1 b=2 compress=true hidden=1 rest=data/train two words" ]
}

@test "a switch can be given a value, and only true or false" {
  run "$script" --compress=false
  [[ $output == *compress=false* ]]
  run "$script" --compress=maybe
  [ "$status" -eq 2 ]
  [[ $output == *"true or false, not 'maybe'"* ]]
}

@test "an unknown option is an error that names the nearest one" {
  run "$script" --confg x
  [ "$status" -eq 2 ]
  [[ $output == *"unknown option --confg; did you mean --config?"* ]]
}

@test "an option that resembles none is an error without a guess" {
  run "$script" --zzzzzzzzzz 1
  [ "$status" -eq 2 ]
  [[ $output == *"unknown option --zzzzzzzzzz"* ]]
  [[ $output != *"did you mean"* ]]
}

@test "a variable of the script that is not documented cannot be set" {
  run "$script" --hidden 2
  [ "$status" -eq 2 ]
  run "$script" --PATH /tmp
  [ "$status" -eq 2 ]
}

@test "a documented option without a default is reported" {
  run "$script" --orphan x
  [ "$status" -eq 2 ]
  [[ $output == *"gives orphan no default"* ]]
}

@test "a missing value and a word for a number are errors" {
  run "$script" --nj
  [ "$status" -eq 2 ]
  [[ $output == *"--nj needs a value"* ]]
  run "$script" --nj --compress
  [ "$status" -eq 2 ]
  run "$script" --nj four
  [ "$status" -eq 2 ]
  [[ $output == *"whole number, not 'four'"* ]]
  run "$script" -n 4
  [ "$status" -eq 2 ]
}

@test "values are never evaluated" {
  run "$script" --config "\$(touch $BATS_TEST_TMPDIR/evil)" --set "x[\$(touch $BATS_TEST_TMPDIR/evil)]=1"
  [ "$status" -eq 0 ]
  [ ! -e "$BATS_TEST_TMPDIR/evil" ]
  [[ $output == *'config=$(touch'* ]]
}

@test "what follows -- is left alone" {
  run "$script" -- --nj 9
  [ "$status" -eq 0 ]
  [[ $output == *"nj=4"*"rest=--nj 9" ]]
}

@test "--help prints the header comment and nothing of the code" {
  run "$script" --help
  [ "$status" -eq 0 ]
  [ "${lines[0]}" = "Does something." ]
  [[ $output == *"--set KEY=VALUE"* ]]
  [[ $output != *pipefail* ]]
}

@test "every documented option of every script has a default" {
  root=$utils/..
  for path in "$utils"/steps/*.sh "$utils"/parallel/*.sh "$root"/egs/*/asr1/run.sh; do
    grep -q parse_options.sh "$path" || continue
    while read -r option; do
      grep -Eq "(^|[ ;])${option//-/_}=" "$path" || { echo "$path: --$option has no default"; return 1; }
    done < <(sed -n '2,/^[^#]/s/^#  *--\([a-z][a-z0-9-]*\).*/\1/p' "$path")
  done
}
