#!/usr/bin/env bash
# Stage 5: averages the weights of the epochs that training.average names into model.pt, and draws the training curves.
#
# Usage: steps/average.sh <exp-dir>
#  e.g.: steps/average.sh exp/train
set -euo pipefail

# shellcheck source=utils/parse_options.sh
source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"

if (($# != 1)); then
  echo "average.sh: error: expected one experiment directory, found $#; average.sh --help shows an example" >&2
  exit 2
fi
speechtx average --exp "$1"
speechtx curves "$1"
