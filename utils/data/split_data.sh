#!/usr/bin/env bash
# Splits a data directory into DIR/splitN/1 ... DIR/splitN/N, equally long, whole speakers where possible.
#
# Usage: utils/data/split_data.sh [--per-utt] DIR N
# e.g.:  utils/data/split_data.sh data/train 4
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
exec speechtx data split "$@"
