# Where jobs run. Every step calls `$cmd JOB=1:4 log/x.JOB.log command...`; another runner with this interface goes here.
# shellcheck shell=bash
export cmd="utils/parallel/run.sh"
# export cmd="utils/parallel/run.sh --max-jobs-run 2"   # fewer at once than there are processors
