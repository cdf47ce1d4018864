#!/usr/bin/env bash
# Copies a data directory, with prefixes and suffixes for its ids if wanted.
#
# Usage: utils/data/copy_data_dir.sh [--utt-prefix P] [--spk-prefix P] [--utt-suffix S] [--spk-suffix S] SRC DEST
# e.g.:  utils/data/copy_data_dir.sh --utt-prefix lab- --spk-prefix lab- data/train data/train_lab
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
exec speechtx data copy "$@"
