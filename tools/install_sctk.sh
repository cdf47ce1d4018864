#!/usr/bin/env bash
# Finds NIST's sclite, or installs it: Debian's package sctk as root, the same package unpacked into tools/sctk without
# root, or a build from SCTK's sources that you name.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly repo target=$repo/tools/sctk

usage() {
  cat <<'USAGE'
usage: tools/install_sctk.sh [--local] [--from PATH]

  --local       into tools/sctk of this repository, whatever the system has, and without root
  --from PATH   build from an SCTK source folder or archive (tar or zip); needs a C and C++ compiler and make

example: tools/install_sctk.sh --from ~/downloads/SCTK-2.4.12.tar.gz
USAGE
}

say() { printf 'install_sctk.sh: %s\n' "$*"; }
die() {
  printf 'install_sctk.sh: error: %s\n  why:        %s\n  what to do: %s\n' "$1" "$2" "$3" >&2
  exit 1
}

local_only=false from=''
while (($# > 0)); do
  case $1 in
    --local) local_only=true ;;
    --from)
      (($# > 1)) || { usage >&2; exit 2; }
      from=$2
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; printf 'install_sctk.sh: error: unknown option %s\n' "$1" >&2; exit 2 ;;
  esac
  shift
done

work=$(mktemp -d)
readonly work
trap 'rm -rf "$work"' EXIT

python=$repo/.venv/bin/python
[[ -x $python ]] || python=python3
# found [PROGRAM]: is there an sclite, or is PROGRAM one, that says it is NIST's and counts right?
found() { "$python" "$repo/tools/check_install.py" --sclite "$@" >"$work/check.log" 2>&1; }

# put FOLDER_WITH_PROGRAMS: makes them tools/sctk/bin, whole or not at all
put() {
  found "$1/sclite" || die "the sclite in $1 does not work" "$(sed -n 2p "$work/check.log")" "choose another source with --from"
  rm -rf "$target.new"
  mkdir -p "$target.new/bin"
  cp -p "$1"/* "$target.new/bin/" 2>/dev/null || [[ -x $target.new/bin/sclite ]]
  rm -rf "$target"
  mv "$target.new" "$target"
  say "sclite is $target/bin/sclite"
}

from_debian_as_root() {
  command -v apt-get >/dev/null && ((EUID == 0)) || return 1
  say "apt-get install sctk"
  local -a get=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 --no-install-recommends install sctk)
  "${get[@]}" >"$work/apt.log" 2>&1 || { apt-get -qq update >>"$work/apt.log" 2>&1 && "${get[@]}" >>"$work/apt.log" 2>&1; }
}

# Without root: apt may still fetch a package. Where its lists are empty or old, it gets some of its own.
from_debian_unpacked() {
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
  say "apt-get download sctk, unpacked into tools/sctk"
  local -a own=(-o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o Debug::NoLocking=1)
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
  (
    cd "$work"
    apt-get -qq download sctk >apt.log 2>&1 || {
      apt-get -qq "${own[@]}" update >>apt.log 2>&1
      apt-get -qq "${own[@]}" download sctk >>apt.log 2>&1
    }
  ) || return 1
  dpkg -x "$work"/sctk_*.deb "$work/unpacked" && put "$work/unpacked/usr/lib/sctk/bin"
}

from_source() {
  local sources
  mkdir "$work/sources"
  if [[ -d $from ]]; then
    cp -R "$from/." "$work/sources/"
  elif [[ $from == *.zip ]]; then
    "$python" -m zipfile -e "$from" "$work/sources"
    chmod -R u+x "$work/sources" # zipfile drops the mark of executable scripts
  elif [[ -f $from ]]; then
    tar -xf "$from" -C "$work/sources"
  else
    die "--from $from" "there is no such file or folder" "name a folder or archive of SCTK's sources"
  fi
  sources=$(find "$work/sources" -maxdepth 4 -type d -path '*/src/sclite' -print -quit)
  [[ -n $sources ]] || die "--from $from" "it has no folder src/sclite" "name the top folder or the archive of SCTK's sources"
  sources=${sources%/src/sclite}
  say "building SCTK in a temporary folder (about a minute)"
  (cd "$sources" && make config && make all && make install) >"$work/build.log" 2>&1 || {
    tail -n 20 "$work/build.log" >&2
    die "SCTK could not be built" "its last lines are above" "install a C and C++ compiler and make (Debian: build-essential)"
  }
  put "$sources/bin"
}

if [[ -n $from ]]; then
  from_source
elif [[ $local_only == false ]] && found; then
  say "already here: $(sed -n 2p "$work/check.log")"
elif [[ $local_only == true ]]; then
  from_debian_unpacked || die "sclite could not be fetched" "$(tail -n 1 "$work/apt.log" 2>/dev/null || echo 'no apt-get here')" \
    "give its sources: tools/install_sctk.sh --from PATH"
else
  from_debian_as_root || from_debian_unpacked || die "sclite could not be installed" \
    "$(tail -n 1 "$work/apt.log" 2>/dev/null || echo 'no apt-get here')" \
    "install NIST SCTK by your system's means (not PyPI's sctk), or give its sources: tools/install_sctk.sh --from PATH"
fi

if [[ $local_only == false && -z $from ]]; then
  found || die "the sclite found does not work" "$(sed -n 2p "$work/check.log")" "tools/install_sctk.sh --from PATH"
fi
