#!/usr/bin/env bash
# Stage 1 of AN4: fetch CMU's archive, unpack it, write data/{train_nodev,train_dev,test} with ESPnet's split.
# What the corpus is, its licence and layout: the docstring of local/prepare.py.
set -euo pipefail

url=http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz
archive=

usage() {
    cat <<EOF
Usage: local/data.sh [--archive FILE] [--url URL]       (from egs/an4/asr1)
  --archive FILE   an4_sphere.tar.gz that you already have; without it 64 MB are downloaded (resumable)
  --url URL        where to download it from (default: $url)
Example: local/data.sh --archive ~/corpora/an4_sphere.tar.gz
EOF
}

while [[ $# -gt 0 ]]; do
    case $1 in
        --archive) archive=${2:?--archive needs a file}; shift 2 ;;
        --url) url=${2:?--url needs an address}; shift 2 ;;
        -h|--help) usage; exit 0 ;;
        *) echo "local/data.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
done

[[ -z $archive ]] || archive=$(realpath -- "$archive")

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
. ./path.sh

# Digests of the archive seen so far: the one other projects pin, and a repacked copy with the same contents.
known=(--sha256 a0525579493735d32b60fb6fa5975dd0eaacde087b0a4eeb7f13b7ef33077b12
       --sha256 d16b70032dbf19105688f7de308aa5d17a238334bf5c887a786ada94a70f1c83)
source=(--url "$url")
[[ -z $archive ]] || source=(--archive "$archive")

python3 utils/data/fetch_archive.py "${source[@]}" "${known[@]}" --max-mib 512 --out corpus/an4_sphere
python3 local/prepare.py --corpus corpus/an4_sphere/an4 --data data
