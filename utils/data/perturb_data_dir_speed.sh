#!/usr/bin/env bash
# Repeats the utterances of a data directory at other speeds, which are applied when features are computed.
#
# Usage: utils/data/perturb_data_dir_speed.sh [--speeds 0.9,1.0,1.1] SRC DEST
#        utils/data/perturb_data_dir_speed.sh FACTOR SRC DEST     (one speed, as in Kaldi)
# e.g.:  utils/data/perturb_data_dir_speed.sh data/train data/train_sp
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
if [ $# -eq 3 ] && [[ $1 != -* ]]; then
  set -- --speeds "$@"
fi
exec speechtx data perturb-speed "$@"
