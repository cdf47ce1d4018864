#!/usr/bin/env bash
# Makes the recipe of a new corpus out of egs/TEMPLATE; what is left to write is its local/data.sh.
#
# Usage: utils/new_recipe.sh <corpus>
#  e.g.: utils/new_recipe.sh mycorpus              makes egs/mycorpus/asr1
#        utils/new_recipe.sh ~/work/mycorpus       makes ~/work/mycorpus/asr1, outside of the repository
set -euo pipefail

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=utils/parse_options.sh
source "$root/utils/parse_options.sh"

fail() {
  printf 'new_recipe.sh: error: %s\n' "$1" >&2
  exit "${2:-1}"
}

(($# == 1)) || fail "expected the name of the corpus, or a folder for it, found $# arguments" 2
case $1 in
  */*) folder=${1%/} ;;
  *) folder=$root/egs/$1 ;;
esac
name=$(basename "$folder")
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "'$name' is no name for a corpus; use letters, digits, dot, dash, underscore"
recipe=$folder/asr1
[[ ! -e $recipe ]] || fail "$recipe exists already; nothing was changed"

mkdir -p "$folder"
unfinished=$(mktemp -d "$folder/.asr1.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
for part in run.sh path.sh cmd.sh conf local; do cp -R "$root/egs/TEMPLATE/asr1/$part" "$unfinished/"; done
for script in run.sh local/data.sh; do
  text=$(<"$unfinished/$script")
  printf '%s\n' "${text//TEMPLATE/"$name"}" >"$unfinished/$script"
done
if [[ $(cd -P "$folder/.." && pwd) == "$root/egs" ]]; then
  ln -s ../../../utils "$unfinished/utils"
else
  ln -s "$root/utils" "$unfinished/utils"
fi
chmod 755 "$unfinished"
mv "$unfinished" "$recipe"

cat <<END
made $recipe
1. write $recipe/local/data.sh (its header says what it must make)
2. set sample_rate in conf/fbank.yaml, sizes in conf/train.yaml
3. cd $recipe && ./run.sh --stop-stage check && ./run.sh
END
