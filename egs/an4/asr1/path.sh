# Sourced by run.sh and by anything you run by hand in this folder: puts speechtx's Python on the PATH.
# shellcheck shell=bash
SPEECHTX_ROOT=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/utils/.." && pwd)
export SPEECHTX_ROOT
export PATH="$SPEECHTX_ROOT/.venv/bin:$PATH"
export LC_ALL=C PYTHONUTF8=1 # C order everywhere, as Kaldi's tables need; UTF-8 text all the same
