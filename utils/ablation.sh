#!/usr/bin/env bash
# What each change gives: runs a recipe with one change at a time, with the same seeds, and compares them on the development set.
#
# Usage: ablation.sh [options] <list> <out-file>      (in the recipe's directory)
#  e.g.: utils/ablation.sh --seeds 1,2 --nj 2 conf/ablation.txt ABLATION.md
#
#   --seeds N,N,...       of every line of the list (default 1)
#   --nj N                runs at once, on one processor each (default: the number of processors, or 1 with a GPU)
#   --ngpu N              GPUs that one run trains on (default 0)
#   --cmd CMD             job runner (default utils/parallel/run.sh)
#   --archive FILE        the corpus' archive, for recipes that take one
#   --decode-config FILE  how to recognise, may be repeated (default conf/decode.yaml)
#
# Each line of <list> holds options of run.sh, as `--set training.ema.decay=0.999`. All lines begin with what the first one says, which is what
# they are compared with. A # begins a comment; quotes mean nothing (write --speeds= for --speeds '').
#
# Each run has an experiment, exp/ablation/<options>_seed<N>, and a log, exp/ablation/log/<job>.log with <job>.sh, what it runs. All lines run
# with the first seed, then with the next one. Stop it and call it again, with more seeds or more lines, and what is finished is skipped;
# runs that fail are numbered at the end, and the page is written when none did. The runs share data/, so a list may name one set of
# --speeds, or none (--speeds=), and one fbank.yaml; and lines with training.join share exp/align, which the recipe has made before.
set -euo pipefail

seeds=1 nj=0 ngpu=0 cmd='' archive='' decode_config=()
utils=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=utils/parse_options.sh
source "$utils/parse_options.sh"

fail() {
  printf 'ablation.sh: error: %s\n' "$1" >&2
  exit 2
}

(($# == 2)) || fail "expected <list> <out-file>, found $# argument(s); ablation.sh --help shows an example"
list=$1 out=$2
[[ -f run.sh && -f path.sh ]] || fail "no run.sh and path.sh here: call it in a recipe's directory, as egs/an4/asr1"
[[ -f $list ]] || fail "$list: no such file"
[[ $seeds =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds takes whole numbers with commas between them, not '$seeds'"
((${#decode_config[@]} > 0)) || decode_config=(conf/decode.yaml)
processors=$(env -u OMP_NUM_THREADS nproc)
if ((nj == 0)); then nj=$((ngpu > 0 ? 1 : processors)); fi
runner=("$utils/parallel/run.sh")
[[ -z $cmd ]] || read -ra runner <<<"$cmd"
# shellcheck source=/dev/null
source ./path.sh

lines=() speeds=''
while IFS= read -r line || [[ -n $line ]]; do
  line=${line%%#*}
  read -ra words <<<"${line%$'\r'}"
  ((${#words[@]} > 0)) || continue
  line="${words[*]}"
  [[ " $line" != *" --fbank-config"* ]] || fail "$list: $line: features of one kind lie in data/, which all lines share"
  if [[ " $line " =~ \ --speeds[=\ ]([^\ ]+)\  ]]; then
    [[ -z $speeds || $speeds == "${BASH_REMATCH[1]}" ]] ||
      fail "$list: $line: copies at one set of speeds lie in data/, which all lines share; $speeds was named before"
    speeds=${BASH_REMATCH[1]}
    ((${#lines[@]} == 0)) || [[ " ${lines[0]}" == *" --speeds"* ]] || fail "$list: $line: name these speeds in the first line too"
  fi
  if [[ $line == *training.join.words=* ]]; then
    joined=${line##*training.join.words=}
    [[ -e ${joined%% *} ]] || fail "$list: $line: ${joined%% *} is not there; run the recipe up to its training first"
  fi
  lines+=("$line")
done <"$list"
((${#lines[@]} > 0)) || fail "$list: no line with options"

shared=(--ngpu "$ngpu")
for file in "${decode_config[@]}"; do shared+=(--decode-config "$file"); done
if ((ngpu == 0)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
[[ -z $archive ]] || shared+=(--archive "$archive")

log=exp/ablation/log
mkdir -p "$log"
exec 9>exp/ablation/.lock # open in every run too
flock -n 9 || fail "$PWD/exp/ablation: another one is at work here"

exps=() commands=() first=()
for seed in ${seeds//,/ }; do
  for number in "${!lines[@]}"; do
    change='' name=base
    if ((number > 0)); then
      change=${lines[number]}
      name=${change//--set /}
      name=${name//[!A-Za-z0-9._+-]/-}
    fi
    read -ra words <<<"${lines[0]} $change"
    exps+=("exp/ablation/${name#--}_seed$seed")
    words=(./run.sh "${shared[@]}" "${words[@]}" --exp "${exps[-1]}" --seed "$seed")
    commands+=("exec$(printf ' %q' "${words[@]}" --nj 1 --procs 1 --stage bpe)")
    [[ $seed != "${seeds%%,*}" ]] || first+=("$(printf ' %q' "${words[@]}" --nj "$processors")")
  done
done
doubled=$(printf '%s\n' "${exps[@]}" | sort | uniq -d | head -1)
[[ -z $doubled ]] || fail "$list: two runs would share $doubled: a line or a seed is there twice"

# Data and features, by one run after another: the others share them. Then every configuration is looked at, before the first one
# trains for an hour.
begin() { # NUMBER FIRST-STAGE LAST-STAGE, of a line's first run
  printf 'exec%s --stage %s --stop-stage %s\n' "${first[$1]}" "$2" "$3" >"$log/begin.sh"
  bash "$log/begin.sh"
}
for number in "${!lines[@]}"; do
  if [[ $number == 0 || ${lines[number]} == *--speeds* ]]; then begin "$number" data fbank; fi
done
for number in "${!lines[@]}"; do
  begin "$number" check check >"$log/begin.log" 2>&1 || { cat "$log/begin.log" >&2 && fail "$list: ${lines[number]}: see above"; }
done

for number in "${!commands[@]}"; do printf '%s\n' "${commands[number]}" >"$log/$((number + 1)).sh"; done
printf '[%s] %d runs, %d at once; each tells in %s/<job>.log how far it is\n' "$(date '+%F %T')" "${#exps[@]}" "$nj" "$log"
"${runner[@]}" --max-jobs-run "$nj" --gpu "$ngpu" "JOB=1:${#exps[@]}" "$log/JOB.log" bash "$log/JOB.sh" &
jobs=$!
trap 'kill -TERM $jobs 2>/dev/null; wait $jobs; exit 143' TERM INT HUP
wait "$jobs"
trap - TERM INT HUP

exec speechtx compare "${exps[@]}" --out "$out"
