#!/usr/bin/env bash
# Sorts, cleans and reconciles the tables of a data directory in place; the old ones are kept in DIR/.backup.
#
# Usage: utils/data/fix_data_dir.sh [--drop-missing-audio] DIR
# e.g.:  utils/data/fix_data_dir.sh data/train
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
exec speechtx data fix "$@"
