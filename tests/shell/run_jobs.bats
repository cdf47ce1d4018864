#!/usr/bin/env bats
# The local job runner: utils/parallel/run.sh.

setup() {
  runner=$(cd "$BATS_TEST_DIRNAME/../../utils/parallel" && pwd)/run.sh
  cd "$BATS_TEST_TMPDIR" || return
}

@test "every job runs once, with its number in arguments and log" {
  run "$runner" JOB=1:3 log/x.JOB.log bash -c 'echo "job $0 of $1"' JOB many
  [ "$status" -eq 0 ]
  [ -z "$output" ]
  for j in 1 2 3; do grep -qx "job $j of many" "log/x.$j.log"; done
  [ "$(find log -type f | wc -l)" -eq 3 ]
}

@test "the log holds command, host, start, both outputs, end and status" {
  run "$runner" x.log bash -c 'echo out; echo err >&2'
  [ "$status" -eq 0 ]
  [[ $(head -1 x.log) == "# bash -c 'echo out; echo err >&2'"* ]]
  grep -q "^# Running on $(uname -n)" x.log
  grep -q '^# Started at ' x.log
  grep -qx out x.log
  grep -qx err x.log
  tail -1 x.log | grep -q '^# Ended (code 0) at .*, elapsed time [0-9]* seconds$'
}

@test "jobs run at the same time even where OpenMP is limited to one thread" {
  (($(env -u OMP_NUM_THREADS nproc) > 1)) || skip "this machine has one processor"
  # Each job waits for the other's file: one after the other, they would never end well.
  OMP_NUM_THREADS=1 run "$runner" JOB=1:2 log/x.JOB.log bash -c 'touch "here.$0"; for _ in {1..100}; do [[ -e here.$((3 - $0)) ]] && exit 0; sleep 0.1; done; exit 1' JOB
  [ "$status" -eq 0 ]
}

@test "a failed job is named with its log, its last 20 lines and the command that runs it again; the others finish" {
  run "$runner" JOB=1:4 log/x.JOB.log bash -c 'seq 100 130; echo "it broke" >&2; [[ $0 != 2 ]] || exit 7; touch done.$0' JOB
  [ "$status" -eq 1 ]
  [[ $output == *"1 of 4 job(s) failed: 2"* ]]
  [[ $output == *"log/x.2.log"* ]]
  [[ $output == *"it broke"* ]]
  [[ $output == *"Ended (code 7)"* ]]
  [[ $output != *"  | 100"* ]]
  for j in 1 3 4; do [ -e "done.$j" ]; done
  again=$(grep -A1 'run it again' <<<"$output" | tail -1)
  run bash -c "$again"
  [ "$status" -eq 7 ]
}

@test "the command to run again sources path.sh where there is one" {
  echo 'marker=yes' >path.sh
  run "$runner" x.log false
  [ "$status" -eq 1 ]
  [[ $output == *"&& source ./path.sh && false"* ]]
}

@test "arguments arrive as they are: spaces, quotes, stars, dollars" {
  run "$runner" x.log printf '<%s>\n' 'two words' "it's" '*' '$HOME' ''
  [ "$status" -eq 0 ]
  for word in '<two words>' "<it's>" '<*>' '<$HOME>' '<>'; do grep -qxF "$word" x.log; done
}

@test "no more than --max-jobs-run at once" {
  run "$runner" --max-jobs-run 2 JOB=1:5 x.JOB.log bash -c 'mkdir up.$0; ls -d up.* | wc -l; sleep 0.2; rmdir up.$0' JOB
  [ "$status" -eq 0 ]
  most=$(grep -hx '[0-9]*' x.*.log | sort -n | tail -1)
  [ "$most" -eq 2 ]
}

@test "TERM ends the jobs and their children" {
  "$runner" JOB=1:2 x.JOB.log bash -c 'sleep 61.25 & sleep 61.25' &
  pid=$!
  for _ in {1..50}; do
    [ "$(pgrep -fxc 'sleep 61.25')" -eq 4 ] && break
    sleep 0.1
  done
  [ "$(pgrep -fxc 'sleep 61.25')" -eq 4 ]
  kill -TERM "$pid"
  status=0
  wait "$pid" || status=$?
  [ "$status" -eq 143 ]
  for _ in {1..50}; do
    pgrep -fx 'sleep 61.25' || break
    sleep 0.1
  done
  ! pgrep -fx 'sleep 61.25' || return 1
}

@test "several jobs may not share one log" {
  run "$runner" JOB=1:2 x.log true
  [ "$status" -eq 2 ]
  [[ $output == *"would write the same log"* ]]
}

@test "a log that cannot be written is a failure" {
  mkdir x.log
  run "$runner" x.log touch ran
  [ "$status" -eq 1 ]
  [ ! -e ran ]
}

@test "cluster options are accepted, unknown ones are not" {
  run "$runner" --mem 4G --gpu 1 --num-threads 2 x.log true
  [ "$status" -eq 0 ]
  run "$runner" --max-job 2 x.log true
  [ "$status" -eq 2 ]
  [[ $output == *"did you mean --max-jobs-run?"* || $output == *"unknown option --max-job"* ]]
}

@test "an empty range and a missing command are errors" {
  run "$runner" JOB=3:2 x.JOB.log true
  [ "$status" -eq 2 ]
  run "$runner" x.log
  [ "$status" -eq 2 ]
}
