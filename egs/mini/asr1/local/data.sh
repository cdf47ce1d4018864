#!/usr/bin/env bash
# Stage 1 of mini: make the corpus (synthetic speech, eSpeak NG) and write data/{train,dev,test}.
# What it says, who speaks and how it is made: local/{sentences,voices,synthesize}.py.
set -euo pipefail

usage() {
    cat <<EOF
Usage: local/data.sh [--smoke] [--nj N] [--seed N] [--num-train N] [--num-dev N] [--num-test N]     (from egs/mini/asr1)
  --smoke     120 / 20 / 20 utterances, for tests of the pipeline
  --nj N      processes (default: one a core)
Example: local/data.sh --nj 2
EOF
}

options=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --smoke) options+=(--num-train 120 --num-dev 20 --num-test 20); shift ;;
        --nj|--seed|--num-train|--num-dev|--num-test) options+=("$1" "${2:?$1 needs a number}"); shift 2 ;;
        -h|--help) usage; exit 0 ;;
        *) echo "local/data.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
. ./path.sh

python3 local/synthesize.py --corpus corpus/synthetic --data data ${options[@]+"${options[@]}"}
