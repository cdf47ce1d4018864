#!/usr/bin/env bash
# Runs jobs on this machine, with the interface of Kaldi's run.pl; recipes call it through $cmd (cmd.sh).
#
# Usage: run.sh [options] [JOB=first:last] <log-file> <command> [arguments...]
#  e.g.: run.sh JOB=1:4 exp/log/fbank.JOB.log speechtx fbank --job JOB --num-jobs 4
#
#   --max-jobs-run N   at most so many at once (default: the number of processors, divided by --num-threads)
#   --num-threads N    threads that one job uses (default 1)
#   --mem SIZE         for cluster schedulers; ignored here
#   --gpu N            for cluster schedulers; ignored here
#
# JOB (any name in capitals) is replaced by the job's number in the log's name and in the arguments. The command is run as given, without a
# shell: write `bash -c '...'` for a pipeline. Each log holds the command, host, start, output, end and status.
# A failed job does not stop the others; at the end the first failure is shown with its log and the command that runs it again.
set -euo pipefail

max_jobs_run=0 num_threads=1 mem='' gpu=0
# shellcheck source=utils/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"
: "$mem" "$gpu"

fail() {
  printf 'run.sh: error: %s\n' "$1" >&2
  exit 2
}

name='' first=1 last=1
if [[ ${1:-} =~ ^([A-Z][A-Z0-9_]*)=([0-9]+)(:([0-9]+))?$ ]]; then
  name=${BASH_REMATCH[1]} first=$((10#${BASH_REMATCH[2]}))
  last=$first
  [[ -n ${BASH_REMATCH[4]} ]] && last=$((10#${BASH_REMATCH[4]}))
  shift
  ((first <= last)) || fail "$name=$first:$last is an empty range"
fi
(($# >= 2)) || fail "expected a log file and a command; run.sh --help shows an example"
log=$1
shift
command=("$@")
((last == first)) || [[ $log == *"$name"* ]] || fail "$((last - first + 1)) jobs would write the same log $log; put $name into its name"
if ((max_jobs_run == 0)); then
  max_jobs_run=$(($(env -u OMP_NUM_THREADS nproc) / (num_threads > 0 ? num_threads : 1))) # nproc counts OpenMP threads where they are limited
  ((max_jobs_run > 0)) || max_jobs_run=1
fi

finished=$(mktemp -d)   # one empty file for each job that ended well

# Sets job_log and job_command for job number $1.
expand() {
  job_log=$log job_command=("${command[@]}")
  if [[ -n $name ]]; then
    job_log=${log//$name/$1}
    job_command=("${command[@]//$name/$1}")
  fi
}

# Prints a command so that it can be pasted back into a shell.
quoted() {
  local word
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    printf '%s ' "$word"
  done
}

# Runs one job with its log around it.
run_job() {
  local status=0 start=$SECONDS job_log job_command
  expand "$1"
  mkdir -p "$(dirname "$job_log")"
  {
    printf '# %s\n# Running on %s\n# Started at %s\n' "$(quoted "${job_command[@]}")" "$(uname -n)" "$(date)"
    "${job_command[@]}" </dev/null 2>&1 || status=$?
    printf '# Ended (code %d) at %s, elapsed time %d seconds\n' "$status" "$(date)" "$((SECONDS - start))"
  } >"$job_log" 2>&1
  ((status == 0)) && : >"$finished/$1"
  return "$status"
}

groups=()
# Ends every job with all its children; each runs in a process group of its own.
# shellcheck disable=SC2329  # called by the traps
stop() {
  trap '' INT TERM HUP
  local group
  for group in "${groups[@]}"; do kill -TERM -- "-$group" 2>/dev/null || true; done
  { wait || true; } 2>/dev/null
  printf 'run.sh: stopped by signal; the jobs were ended\n' >&2
  exit "$1"
}
trap 'rm -rf "$finished"' EXIT
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

((first == last)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_threads > 0 ? num_threads : 1))} # jobs share the processors
set -m   # job control: every background job gets its own process group
for ((job = first; job <= last; job++)); do
  while ((max_jobs_run <= $(jobs -rp | wc -l))); do wait -n || true; done
  run_job "$job" &
  groups+=("$!")
done
wait
set +m

failed=()
for ((job = first; job <= last; job++)); do
  [[ -e $finished/$job ]] || failed+=("$job")
done
((${#failed[@]})) || exit 0

expand "${failed[0]}"
{
  printf 'run.sh: %d of %d job(s) failed: %s\n' "${#failed[@]}" "$((last - first + 1))" "${failed[*]}"
  printf 'run.sh: job %s ended badly; the last 20 lines of %s:\n' "${failed[0]}" "$job_log"
  tail -n 20 "$job_log" 2>/dev/null | sed 's/^/  | /' || true
  printf 'run.sh: to run it again:\n  cd %s && ' "$(quoted "$PWD" | sed 's/ $//')"
  [[ -f path.sh ]] && printf 'source ./path.sh && '
  quoted "${job_command[@]}"
  printf '\n'
} >&2
exit 1
