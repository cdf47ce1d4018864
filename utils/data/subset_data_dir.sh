#!/usr/bin/env bash
# Writes a data directory with some of the utterances of another.
#
# Usage: utils/data/subset_data_dir.sh [--first | --last | --shortest | --per-spk] SRC N DEST
#        utils/data/subset_data_dir.sh (--utt-list FILE | --spk-list FILE) SRC DEST
# e.g.:  utils/data/subset_data_dir.sh --first data/train 100 data/train_100
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
exec speechtx data subset "$@"
