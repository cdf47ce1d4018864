#!/usr/bin/env bash
# Stage 0: finds in seconds what would otherwise fail an hour later. Needs no data.
#
# Usage: steps/check.sh [options of `speechtx check`]
#  e.g.: steps/check.sh --config conf/train.yaml --fbank-config conf/fbank.yaml --exp exp/train --nj 4
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "check.sh: error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
  exit 1
fi
if ! command -v speechtx >/dev/null; then
  echo "check.sh: error: speechtx is not installed; run tools/install.sh at the top of the repository" >&2
  exit 1
fi
if [[ ${1:-} == --help ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
fi
exec speechtx check "$@"
