#!/usr/bin/env bats
# tools/install.sh and install_sctk.sh without a network: Python, pip and apt are played by scripts that note what they
# are asked for, in a copy of the files that the installers read.

setup() {
  repo=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
  checkout=$BATS_TEST_TMPDIR/checkout
  calls=$BATS_TEST_TMPDIR/calls
  fake=$BATS_TEST_TMPDIR/fake
  mkdir -p "$checkout/speechtx" "$fake"
  cp -R "$repo/tools" "$checkout/"
  rm -rf "$checkout/tools/sctk"
  cp "$repo/setup.py" "$checkout/"
  : >"$calls"
  export calls

  cat >"$fake/python" <<'PYTHON'
#!/usr/bin/env bash
# Plays python -c, -m venv, -m pip and the scripts given to it.
case "$1 ${2:-}" in
  '--version ') echo Python 3.11.99 ;;
  '-m venv') echo "venv ${*: -1}" >>"$calls"; rm -rf "${*: -1}"; mkdir -p "${*: -1}/bin"; cp "$0" "${*: -1}/bin/python" ;;
  '-m pip')
    [[ $* != *--version* ]] || exit 0
    echo "pip ${*: -1}" >>"$calls"
    if [[ -n ${FAIL_ON:-} && $* == *"$FAIL_ON"* ]]; then echo "ERROR: No matching distribution found for $FAIL_ON"; exit 1; fi
    if [[ -n ${KILL_ON:-} && $* == *"$KILL_ON"* ]]; then kill -9 "$(ps -o ppid= -p "$PPID" | tr -d ' ')" "$PPID"; fi ;;
  '-c '*version_info*%d*) echo 3.11 ;;
  *torchaudio*) exit 0 ;;
esac
PYTHON
  chmod +x "$fake/python"
  export PYTHON=$fake/python
}

@test "an unknown option is refused with the usage" {
  run "$checkout/tools/install.sh" --devel
  [ "$status" -eq 2 ]
  [[ $output == *usage:*'unknown option --devel'* ]]
}

@test "a Python that is too old or missing is named, with what to do" {
  PYTHON=/nonexistent/python run "$checkout/tools/install.sh"
  [ "$status" -eq 1 ]
  [[ $output == *'PYTHON=/nonexistent/python cannot be used'*'what to do'* ]]
}

@test "the second call does nothing and takes less than three seconds" {
  "$checkout/tools/install.sh"
  : >"$calls"
  SECONDS=0
  run "$checkout/tools/install.sh"
  [ "$status" -eq 0 ]
  [ "$SECONDS" -lt 3 ]
  [[ $output == *'up to date'* ]]
  [ ! -s "$calls" ]
}

@test "torch comes first and torchaudio never brings its own torch" {
  "$checkout/tools/install.sh" --cpu
  [ "$(grep -c '^pip torch==' "$calls")" -eq 2 ] # a look whether there is a CPU build, then the installation
  [ "$(tail -n 1 "$calls" | cut -d = -f 1)" = 'pip torchaudio' ]
  grep -q -- '--no-deps --force-reinstall "torchaudio==' "$checkout/tools/install.sh"
}

@test "--dev after a plain installation adds to it, and stays" {
  "$checkout/tools/install.sh"
  : >"$calls"
  "$checkout/tools/install.sh" --dev
  grep -q 'mini,dev' "$calls"
  ! grep -q '^venv' "$calls" || false
  : >"$calls"
  "$checkout/tools/install.sh"
  [ ! -s "$calls" ]
}

@test "a changed setup.py is installed again into the same environment" {
  "$checkout/tools/install.sh"
  : >"$calls"
  echo '# one more dependency' >>"$checkout/setup.py"
  "$checkout/tools/install.sh"
  grep -q '^pip' "$calls"
  ! grep -q '^venv' "$calls" || false
}

@test "a package that cannot be installed is an error that says what, why and what to do, and is not taken for done" {
  FAIL_ON='[mini' run "$checkout/tools/install.sh"
  [ "$status" -eq 1 ]
  [[ $output == *'ERROR: No matching distribution'*'error: a package could not be installed'*why:*'what to do:'* ]]
  : >"$calls"
  run "$checkout/tools/install.sh"
  [ "$status" -eq 0 ]
  grep -q '^pip' "$calls"
}

@test "an installation killed half way is started over, not believed in" {
  KILL_ON='[mini' run "$checkout/tools/install.sh"
  [ "$status" -ne 0 ]
  [ -e "$checkout/.venv/speechtx-unfinished" ]
  : >"$calls"
  "$checkout/tools/install.sh"
  grep -q '^venv' "$calls"
  [ ! -e "$checkout/.venv/speechtx-unfinished" ]
}

@test "a checkout that was moved gets a new environment, since the scripts in it hold the old path" {
  "$checkout/tools/install.sh"
  mv "$checkout" "$checkout-moved"
  : >"$calls"
  "$checkout-moved/tools/install.sh"
  grep -q '^venv' "$calls"
}

@test "an installation that loses its packages is noticed" {
  "$checkout/tools/install.sh"
  printf '#!/bin/sh\nexit 1\n' >"$checkout/.venv/bin/python"
  : >"$calls"
  "$checkout/tools/install.sh"
  grep -q '^venv' "$calls"
}

# ---------------------------------------------------------------------------------------------------- install_sctk.sh

# fake_apt SCLITE: an apt-get whose package sctk holds this program
fake_apt() {
  command -v dpkg-deb >/dev/null || skip "no dpkg on this machine"
  local package=$BATS_TEST_TMPDIR/package
  mkdir -p "$package/DEBIAN" "$package/usr/lib/sctk/bin"
  printf 'Package: sctk\nVersion: 2\nArchitecture: all\nMaintainer: x <x@x.org>\nDescription: x\n' >"$package/DEBIAN/control"
  printf '%s\n' '#!/bin/sh' "$1" >"$package/usr/lib/sctk/bin/sclite"
  chmod 755 "$package/usr/lib/sctk/bin/sclite"
  dpkg-deb --build "$package" "$BATS_TEST_TMPDIR/sctk_2_all.deb" >/dev/null
  printf '%s\n' '#!/usr/bin/env bash' "cp '$BATS_TEST_TMPDIR/sctk_2_all.deb' ." >"$fake/apt-get"
  chmod +x "$fake/apt-get"
}

good_sclite="if [ \$# -eq 0 ]; then echo 'sclite Version: 2.10, SCTK Version: 1.3'; else echo '| Sum | 2 6 | 4 1 1 1 3 2 |'; fi"

@test "without root the Debian package is unpacked into tools/sctk" {
  fake_apt "$good_sclite"
  PATH=$fake:$PATH run "$checkout/tools/install_sctk.sh" --local
  echo "$output"
  [ "$status" -eq 0 ]
  [ -x "$checkout/tools/sctk/bin/sclite" ]
}

@test "a package whose sclite miscounts is refused, and what was there stays" {
  fake_apt "${good_sclite/4 1 1 1/5 0 1 1}"
  mkdir -p "$checkout/tools/sctk/bin"
  touch "$checkout/tools/sctk/bin/before"
  PATH=$fake:$PATH run "$checkout/tools/install_sctk.sh" --local
  [ "$status" -eq 1 ]
  [[ $output == *miscounts*'what to do'* ]]
  [ -e "$checkout/tools/sctk/bin/before" ]
}

@test "--from something that is not SCTK is refused" {
  run "$checkout/tools/install_sctk.sh" --from "$BATS_TEST_TMPDIR/nothing.tar.gz"
  [ "$status" -eq 1 ]
  [[ $output == *'no such file or folder'* ]]
  run "$checkout/tools/install_sctk.sh" --from "$checkout/speechtx"
  [ "$status" -eq 1 ]
  [[ $output == *'no folder src/sclite'* ]]
}

@test "--from builds with SCTK's own makefile and puts the programs into tools/sctk" {
  sources=$BATS_TEST_TMPDIR/SCTK-2.4
  mkdir -p "$sources/src/sclite"
  printf '%s\n' '#!/bin/sh' "$good_sclite" >"$sources/src/sclite/program"
  printf 'config:\n\ttouch configured\nall: configured\n\ninstall:\n\tmkdir bin; cp src/sclite/program bin/sclite; chmod 755 bin/sclite\n' \
    >"$sources/makefile"
  tar -czf "$sources.tar.gz" -C "$BATS_TEST_TMPDIR" SCTK-2.4
  run "$checkout/tools/install_sctk.sh" --from "$sources.tar.gz"
  echo "$output"
  [ "$status" -eq 0 ]
  [ -x "$checkout/tools/sctk/bin/sclite" ]
}
