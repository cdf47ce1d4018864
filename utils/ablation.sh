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
# Each run has an experiment, exp/ablation/<options>_seed<N>, and a log, exp/ablation/log/<job>.log with <job>.sh, what it runs. All lines run with the first seed, then
# with the next one. Call it again, with more seeds or another list, and what is finished is skipped; a run that failed is named at
# the end, and the page is written when none did. Lines with training.join share the words of the recipe's exp/align, which must be there.
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
if ((nj == 0)); then nj=$((ngpu > 0 ? 1 : $(env -u OMP_NUM_THREADS nproc))); fi
read -ra runner <<<"${cmd:-$utils/parallel/run.sh}"
# shellcheck source=/dev/null
source ./path.sh

lines=()
while IFS= read -r line; do
  read -ra words <<<"${line%%#*}"
  [[ " ${words[*]} " != *" --fbank-config"* ]] || fail "$list: ${words[*]}: features of one kind lie in data/, which all lines share"
  ((${#words[@]} == 0)) || lines+=("${words[*]}")
done <"$list"
((${#lines[@]} > 0)) || fail "$list: no line with options"

shared=(--nj 1 --procs 1 --ngpu "$ngpu")
for file in "${decode_config[@]}"; do shared+=(--decode-config "$file"); done
if ((ngpu == 0)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
[[ -z $archive ]] || shared+=(--archive "$archive")

# Data and features first, by one run after another: the others share them.
exps=() log=exp/ablation/log
mkdir -p "$log"
for seed in ${seeds//,/ }; do
  for number in "${!lines[@]}"; do
    change='' name=base
    if ((number > 0)); then
      change=${lines[number]}
      name=${change//--set /}
      name=${name//[!A-Za-z0-9._+-]/-}
    fi
    read -ra words <<<"${lines[0]} $change"
    words=(./run.sh "${shared[@]}" "${words[@]}" --exp "exp/ablation/${name#--}_seed$seed" --seed "$seed")
    if [[ $seed == "${seeds%%,*}" && ($number == 0 || $change == *--speeds*) ]]; then
      "${words[@]}" --stage data --stop-stage fbank
    fi
    exps+=("exp/ablation/${name#--}_seed$seed")
    printf 'exec%s\n' "$(printf ' %q' "${words[@]}" --stage bpe)" >"$log/${#exps[@]}.sh"
  done
done
doubled=$(printf '%s\n' "${exps[@]}" | sort | uniq -d | head -1)
[[ -z $doubled ]] || fail "$list: two runs would share $doubled: a line or a seed is there twice"

printf '[%s] %d runs, %d at once; each tells in %s/<job>.log how far it is\n' "$(date '+%F %T')" "${#exps[@]}" "$nj" "$log"
"${runner[@]}" --max-jobs-run "$nj" --gpu "$ngpu" "JOB=1:${#exps[@]}" "$log/JOB.log" bash "$log/JOB.sh"

exec speechtx compare "${exps[@]}" --out "$out"
