#!/usr/bin/env bash
# Stage 1 of yesno: fetch the archive, unpack it, write data/{train,dev,test} with Kaldi's split (dev is taken out of training).
# What the corpus is, and what --concat does and why it is fair: the docstring of local/prepare.py.
set -euo pipefail

url=http://www.openslr.org/resources/1/waves_yesno.tar.gz
archive=
concat=400
seed=1

usage() {
    cat <<EOF
Usage: local/data.sh [--archive FILE] [--url URL] [--concat N] [--seed N]       (from egs/yesno/asr1)
  --archive FILE   waves_yesno.tar.gz that you already have; without it 5 MB are downloaded (resumable)
  --url URL        where to download it from (default: $url)
  --concat N       training utterances made by joining words of training recordings in random order (default: $concat; 0 for none)
  --seed N         for --concat (default: $seed)
Example: local/data.sh --archive ~/corpora/waves_yesno.tar.gz
EOF
}

while [[ $# -gt 0 ]]; do
    case $1 in
        --archive) archive=${2:?--archive needs a file}; shift 2 ;;
        --url) url=${2:?--url needs an address}; shift 2 ;;
        --concat) concat=${2:?--concat needs a number}; shift 2 ;;
        --seed) seed=${2:?--seed needs a number}; shift 2 ;;
        -h|--help) usage; exit 0 ;;
        *) echo "local/data.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done
[[ -z $archive ]] || archive=$(realpath -- "$archive")

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
. ./path.sh

# Digests of the archive seen so far: the one torchaudio pins, and a later one with a README inside.
known=(--sha256 30301975fd8c5cac4040c261c0852f57cfa8adbbad2ce78e77e4986957445f27
       --sha256 f638dc5c185b67dcf16f6e71b3cd319beb57c0de9dec592afffd0bc54e9abc71)
source=(--url "$url")
[[ -z $archive ]] || source=(--archive "$archive")

python3 utils/data/fetch_archive.py "${source[@]}" "${known[@]}" --max-mib 64 --out corpus/yesno
python3 local/prepare.py --corpus corpus/yesno/waves_yesno --data data --concat "$concat" --seed "$seed"
