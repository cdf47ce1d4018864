#!/usr/bin/env bash
# Makes .venv beside this repository's setup.py with everything speechtx needs, and finds or installs sclite.
# Run it again at any time: when nothing changed it says so and is done in a second.
set -euo pipefail

readonly torch_version=2.13.0      # the version the tests and RESULTS.md were run with
readonly torchaudio_version=2.11.0 # its last release; only its Python parts are used
readonly kenlm='kenlm>=0.3,<1'     # the extra `lm` of setup.py
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly repo venv=$repo/.venv stamp=$repo/.venv/speechtx-installed unfinished=$repo/.venv/speechtx-unfinished

usage() {
  cat <<'USAGE'
usage: tools/install.sh [--dev] [--cpu | --cuda | --torch SPEC] [--sctk PATH]

  --dev          also what the tests and lint need
  --cpu          a CPU build of torch, also on a machine with an NVIDIA GPU
  --cuda         a CUDA build of torch (several GB); the default where nvidia-smi lists a GPU
  --torch SPEC   any torch that pip can find, for example: --torch 'torch==2.13.0+cu126'
  --sctk PATH    build sclite from this SCTK source folder or archive if no package of it can be had
  --force        start over with an empty .venv

Needs Python 3.11 or newer (another one than the first found: PYTHON=/path/to/python3.12 tools/install.sh) and
no root. pip's own settings choose where packages come from (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

example: tools/install.sh --dev && .venv/bin/speechtx --help
USAGE
}

say() { printf 'install.sh: %s\n' "$*"; }

# die WHAT WHY WHAT_TO_DO
die() {
  printf 'install.sh: error: %s\n  why:        %s\n  what to do: %s\n' "$1" "$2" "$3" >&2
  rm -f "$unfinished" # pip ended by itself, so what is there can be built upon
  exit 1
}
trap 'exit 130' INT TERM # while pip runs, so that no clean-up above makes a half-made .venv look whole

dev=false force=false build='' torch_spec='' sctk=()
while (($# > 0)); do
  case $1 in
    --dev) dev=true ;;
    --cpu) build=cpu ;;
    --cuda) build=cuda ;;
    --force) force=true ;;
    --torch | --sctk)
      (($# > 1)) || { usage >&2; printf 'install.sh: error: %s needs a value\n' "$1" >&2; exit 2; }
      if [[ $1 == --torch ]]; then build=spec torch_spec=$2; else sctk=(--from "$2"); fi
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; printf 'install.sh: error: unknown option %s\n' "$1" >&2; exit 2 ;;
  esac
  shift
done

# ------------------------------------------------------------------------------------------------ nothing to do?

# What decides whether an installation is still the right one: these two files.
fingerprint() { cat "$repo/setup.py" "$repo/tools/install.sh" | sha256sum | cut -d ' ' -f 1; }

# stamped NAME: the value of one line `NAME=value` of the stamp, empty without one
stamped() { [[ ! -f $stamp ]] || sed -n "s/^$1=//p" "$stamp"; }

packages_ready() {
  [[ $force == false && ! -e $unfinished ]] || return 1
  [[ $(stamped fingerprint) == "$(fingerprint)" && $(stamped repo) == "$repo" ]] || return 1
  [[ $dev == false || $(stamped dev) == true ]] || return 1
  [[ -z $build || $(stamped build) == "$build" && $(stamped torch_spec) == "$torch_spec" ]] || return 1
  "$venv/bin/python" "$repo/tools/check_install.py" --quick >/dev/null 2>&1
}

# An environment that is there, of this place, and not left half-made by a run that was killed.
venv_usable() {
  [[ $force == false && ! -e $unfinished && -x $venv/bin/python ]] || return 1
  [[ ! -f $stamp || $(stamped repo) == "$repo" ]] || return 1 # the scripts in .venv/bin hold their absolute path
  "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

# ------------------------------------------------------------------------------------------------------- Python

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
    [[ -z ${PYTHON:-} ]] || die "PYTHON=$PYTHON cannot be used" "it does not run, or is older than Python 3.11" \
      "name another one, or leave PYTHON unset"
  done
  die "no Python 3.11 or newer found" "tried python3.11, python3.12, python3.13 and python3 on PATH" \
    "Debian, as root: apt-get install python3.11 python3.11-venv; or PYTHON=/path/to/python3.11 tools/install.sh"
}

# make_venv PYTHON: with the standard library's venv, else virtualenv, else (as root on Debian) the package that venv lacks
make_venv() {
  local python=$1 version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null && ! "$python" -c 'import virtualenv' 2>/dev/null \
    && ((EUID == 0)) && command -v apt-get >/dev/null; then
    say "$python has no module venv: apt-get install python$version-venv"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "python$version-venv" >/dev/null \
      || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "python$version-venv" >/dev/null; } \
      || true
  fi
  if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
  elif "$python" -c 'import virtualenv' 2>/dev/null; then
    "$python" -m virtualenv --quiet --clear "$venv"
  else
    die "a virtual environment cannot be made with $python" "it has neither the modules venv and ensurepip nor virtualenv" \
      "Debian, as root: apt-get install python$version-venv; without root: $python -m pip install --user virtualenv"
  fi
}

# ------------------------------------------------------------------------------------------------------ packages

step=0 steps=4 log=
# install WHAT PIP_ARGUMENTS...: runs pip with its own progress bars on a terminal, or its main lines elsewhere
install() {
  local what=$1 started=$SECONDS
  shift
  step=$((step + 1))
  say "[$step/$steps] $what"
  local -a pip=("$venv/bin/python" -m pip --disable-pip-version-check --log "$log" install)
  if [[ -t 1 ]]; then
    "${pip[@]}" "$@" || return 1
  else
    # grep's own status does not matter (pip may print none of these lines); pip's does
    "${pip[@]}" --progress-bar off "$@" 2>&1 \
      | { grep --line-buffered -E '^ *(Downloading|Using cached|Processing|Installing collected|ERROR)' || true; } \
      | cut -c 1-150 | sed -u 's/^ */    /' || return 1
  fi
  say "[$step/$steps] $what: done in $((SECONDS - started)) s"
}

# needs_mib NUMBER: stops before the disk is full rather than after
needs_mib() {
  local free
  free=$(df -Pm "$repo" | awk 'NR == 2 { print $4 }')
  ((free >= $1)) || die "not enough disk" "$repo has $free MiB free, the installation needs about $1 MiB" \
    "free some space, or clone the repository onto another disk"
}

install_torch() {
  case $build in
    cpu)
      needs_mib 2500
      # A build is part of a version (2.13.0+cpu). The default registry may have none with that mark.
      if "$venv/bin/python" -m pip install -q --dry-run --no-deps "torch==$torch_version+cpu" >/dev/null 2>&1; then
        install "torch $torch_version, CPU build" "torch==$torch_version+cpu" && return
      fi
      say "pip finds no torch==$torch_version+cpu; taking its default build, which on Linux x86-64 may bring gigabytes of"
      say "CUDA packages (stop with Ctrl-C and set PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds to avoid that)"
      needs_mib 9000
      install "torch $torch_version, default build" "torch==$torch_version" && return
      ;;
    cuda)
      needs_mib 9000
      install "torch $torch_version, CUDA build" "torch==$torch_version,!=$torch_version+cpu" && return
      ;;
    spec)
      needs_mib 2500
      install "$torch_spec" "$torch_spec" && return
      ;;
  esac
  local hint="check the network and pip's settings ($venv/bin/pip config list), then run tools/install.sh again"
  [[ $build != cuda ]] || hint+="; or choose another build that pip has: --torch 'torch>=$torch_version,<3', or --cpu"
  die "torch could not be installed" "see above, and $log" "$hint"
}

# torchaudio's Linux wheels are CUDA builds that ask for a CUDA torch, hence --no-deps. Its compiled extension cannot load
# beside another build of torch; torchaudio skips an extension whose file is absent, and all we use is Python code.
install_torchaudio() {
  install "torchaudio $torchaudio_version (second fbank backend)" --no-deps --force-reinstall "torchaudio==$torchaudio_version" || {
    say "torchaudio could not be installed: the fbank backend 'torchaudio' will not be there, all else works; see $log"
    return 0
  }
  if ! "$venv/bin/python" -c 'import torchaudio' 2>/dev/null; then
    say "torchaudio's compiled extension does not load beside this torch: removing it (only its Python parts are used)"
    find "$venv" -path '*/torchaudio/lib/*torchaudio.*' -name '*.so' -delete
    "$venv/bin/python" -c 'import torchaudio.compliance.kaldi' 2>/dev/null \
      || say "torchaudio does not import even so: the fbank backend 'torchaudio' will not be there, all else works"
  fi
}

# Compiled for a minute. Only tests need it, and they skip without it, so an installation does not fail for it.
install_kenlm() {
  ! "$venv/bin/python" -c 'import kenlm' 2>/dev/null || return 0
  install "KenLM (twin of the n-gram scorer in the tests; compiles for about a minute)" "$kenlm" \
    || say "KenLM could not be installed (it needs a C++ compiler): the tests that compare with it will be skipped; see $log"
}

# What pip's log says was fetched: over the network, or from its cache and local folders.
report_size() {
  "$venv/bin/python" - "$log" <<'PYTHON'
import os, re, sys
units = {"": 1e-6, "k": 1e-3, "M": 1.0, "G": 1e3}
sums = {"Downloading": 0.0, "Using cached": 0.0}
for line in open(sys.argv[1], encoding="utf-8", errors="replace"):
    if found := re.search(r"(Downloading|Using cached) \S+\.(?:whl|tar\.gz|zip)\S* \(([\d.]+) ?(k|M|G|)i?B\)", line):
        sums[found[1]] += float(found[2]) * units[found[3]]
    elif (found := re.search(r"Processing (/\S+\.whl)", line)) and os.path.isfile(found[1]):
        sums["Using cached"] += os.path.getsize(found[1]) / 1e6
print(f"install.sh: downloaded {sums['Downloading']:.0f} MB; {sums['Using cached']:.0f} MB came from pip's cache or local folders")
PYTHON
  say "$venv holds $(du -sm "$venv" | cut -f 1) MiB"
}

# Asked for nothing in particular: the build of torch that is there stays, else the one that fits the machine.
choose_build() {
  [[ -z $build ]] || return 0
  build=$(stamped build) torch_spec=$(stamped torch_spec)
  [[ -z $build ]] || return 0
  build=cpu
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then build=cuda; fi
}

make_environment() {
  local python extras=mini started=$SECONDS
  [[ -w $repo ]] || die "cannot write into $repo" "it belongs to $(stat -c %U "$repo"), you are $(id -un)" "clone it to a place of yours"
  choose_build
  [[ $(stamped dev) != true ]] || dev=true # what a former call added stays
  if ! venv_usable; then
    python=$(find_python)
    say "making $venv with $("$python" --version) ($python)"
    mkdir -p "$venv"
    touch "$unfinished"
    make_venv "$python"
  fi
  rm -f "$stamp"
  touch "$unfinished"
  log=$venv/install.log
  : >"$log"
  [[ $dev == false ]] || extras=mini,dev steps=5
  install "pip, setuptools" --upgrade pip "setuptools>=65" || die "pip could not be updated" "see the last lines of $log" \
    "check the network and pip's settings ($venv/bin/pip config list), then run tools/install.sh again"
  install_torch
  install "speechtx[$extras] and what it needs" --no-build-isolation --editable "${repo}[$extras]" \
    || die "a package could not be installed" "see the last lines of $log" "fix what they say and run tools/install.sh again"
  install_torchaudio
  if [[ $dev == true ]]; then install_kenlm; fi
  report_size
  printf '%s\n' "fingerprint=$(fingerprint)" "repo=$repo" "dev=$dev" "build=$build" "torch_spec=$torch_spec" >"$stamp.new"
  mv "$stamp.new" "$stamp"
  rm -f "$unfinished"
  say "packages are ready after $((SECONDS - started)) s"
}

main() {
  # One at a time: two makes in one checkout must not fill the same .venv.
  if command -v flock >/dev/null; then
    exec 9<"$repo/tools"
    flock -n 9 || { say "another tools/install.sh works here; waiting for it"; flock 9; }
  fi
  local changed=false
  if ! packages_ready; then
    make_environment
    changed=true
  fi
  if ! "$venv/bin/python" "$repo/tools/check_install.py" --sclite >/dev/null 2>&1; then
    "$repo/tools/install_sctk.sh" "${sctk[@]}"
    changed=true
  fi
  if [[ $changed == true ]]; then
    "$venv/bin/python" "$repo/tools/check_install.py"
  else
    say "up to date: $venv (the parts: .venv/bin/python tools/check_install.py)"
  fi
}

main
