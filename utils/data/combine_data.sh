#!/usr/bin/env bash
# Joins data directories whose utterances are different.
#
# Usage: utils/data/combine_data.sh DEST SRC...
# e.g.:  utils/data/combine_data.sh data/all data/train_a data/train_b
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
exec speechtx data combine "$@"
