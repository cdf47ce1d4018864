#!/usr/bin/env bash
# One line on the terminal that shows how far all jobs together are, for steps that run jobs in the background. Source it.
#
#   watch_progress NAME FOLDER     starts showing, if stderr is a terminal
#   ...                            run the jobs
#   stop_progress                  ends it and clears the line
#
# Every job keeps one line in FOLDER/*.progress: utterances done, utterances to do, seconds of audio, seconds of work (or nothing).

_progress_watcher=''

watch_progress() {
  [[ -t 2 ]] || return 0
  local name=$1 folder=$2 start=$EPOCHREALTIME
  while sleep 1; do
    cat "$folder"/*.progress 2>/dev/null | awk -v name="$name" -v start="$start" -v now="$EPOCHREALTIME" '
      { done += $1; total += $2; audio += $3; work += $4 }
      END {
        elapsed = now - start
        if (!done) exit
        left = elapsed / done * (total - done)
        speed = work > 0 && audio > 0 ? sprintf("RTF %.4f", work / audio) : sprintf("%.0f x real time", audio / elapsed)
        printf "  %s %d/%d utterances, %.1f/s, %s, %d:%02d left\033[K\r", name, done, total, done / elapsed, speed, left / 60, left % 60
      }' >&2 || true
  done &
  _progress_watcher=$!
  trap 'stop_progress' EXIT
}

stop_progress() {
  [[ -n $_progress_watcher ]] || return 0
  kill "$_progress_watcher" 2>/dev/null || true
  wait "$_progress_watcher" 2>/dev/null || true
  _progress_watcher=''
  printf '\033[K' >&2
}
