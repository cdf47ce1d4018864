#!/usr/bin/env bash
# Lists everything that is wrong with a data directory, by file, line and entry; the exit status is 1 if anything is.
# As in Kaldi, features are expected unless --no-feats is given.
#
# Usage: utils/data/validate_data_dir.sh [--no-feats] [--no-text] [--no-wav] [--no-files] [--no-spk-sort] [--allow-pipes] DIR
# e.g.:  utils/data/validate_data_dir.sh --no-feats data/train
set -euo pipefail

if ! command -v speechtx >/dev/null; then
  echo "$0: speechtx is not on PATH: source path.sh in the recipe's folder first" >&2
  exit 1
fi
exec speechtx data validate --feats "$@"
