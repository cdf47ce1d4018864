#!/usr/bin/env bash
# Command-line options for recipes and steps. Source it after the defaults:
#
#   # Usage: steps/fbank.sh [options] <data-dir>
#   #   --nj N            parallel jobs (default 4)
#   #   --config FILE     configuration
#   #   --set KEY=VALUE   override (repeatable)
#   #   --compress        a switch: no value
#   nj=4 config=conf/fbank.yaml set=() compress=false
#   source "$(dirname "${BASH_SOURCE[0]}")/../parse_options.sh"
#   data=${1:?}         # positional arguments are what is left in "$@"
#
# The script's header comment (from its second line to the first line that is no comment) is the declaration: an option is a
# line of it that starts with `--name`, after at least one space. `--name VALUE` sets the variable `name` (dashes become
# underscores), which must have been given a default; an array gathers every use. `N` for VALUE means a whole number.
# `--name=value` works too, `--` ends the options, `--help` prints the header. Anything else is an error that
# names the nearest option, exit status 2. No text of the user's is ever evaluated.

_po_script=${BASH_SOURCE[1]:-$0}
_po_name=${_po_script##*/}
_po_arguments=("$@") # as they were given, for whoever records the command
declare -A _po_value=()   # option name -> its VALUE placeholder; empty for a switch
_po_header=()

_po_fail() {
  printf '%s: error: %s\n' "$_po_name" "$1" >&2
  printf '%s: the options are listed by: %s --help\n' "$_po_name" "$_po_script" >&2
  exit 2
}

# Reads the header comment of the sourcing script into _po_header and the declared options into _po_value.
_po_read_header() {
  local line first=true
  while IFS= read -r line; do
    if $first; then first=false; [[ $line == '#!'* ]] && continue; fi
    [[ $line == '#'* ]] || break
    line=${line#\#}
    _po_header+=("${line# }")
    if [[ $line =~ ^[[:space:]]+--([a-z][a-z0-9-]*)([[:space:]]([^[:space:]]+))? ]]; then
      _po_value[${BASH_REMATCH[1]}]=${BASH_REMATCH[3]}
    fi
  done <"$_po_script"
}

# Prints the Levenshtein distance of two words.
_po_distance() {
  local a=$1 b=$2 i j cost best
  local -a row=() next=()
  for ((j = 0; j <= ${#b}; j++)); do row[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    next=("$i")
    for ((j = 1; j <= ${#b}; j++)); do
      cost=1
      [[ ${a:i-1:1} == "${b:j-1:1}" ]] && cost=0
      best=$((row[j - 1] + cost))
      ((row[j] + 1 < best)) && best=$((row[j] + 1))
      ((next[j - 1] + 1 < best)) && best=$((next[j - 1] + 1))
      next[j]=$best
    done
    row=("${next[@]}")
  done
  echo "${row[${#b}]}"
}

_po_unknown() {
  local name=$1 option distance nearest='' least=99
  for option in "${!_po_value[@]}"; do
    distance=$(_po_distance "$name" "$option")
    if ((distance < least)); then least=$distance nearest=$option; fi
  done
  if ((least <= (${#name} + 1) / 2)); then _po_fail "unknown option --$name; did you mean --$nearest?"; fi
  _po_fail "unknown option --$name"
}

# Assigns one option: _po_assign NAME VALUE.
_po_assign() {
  local name=$1 value=$2 variable=${1//-/_} declared
  declared=$(declare -p "$variable" 2>/dev/null) || _po_fail "--$name is documented, but the script gives $variable no default"
  if [[ ${_po_value[$name]} == N && ! $value =~ ^[0-9]+$ ]]; then _po_fail "--$name takes a whole number, not '$value'"; fi
  if [[ $declared == 'declare -a'* ]]; then
    local -n _po_array=$variable
    _po_array+=("$value")
  else
    printf -v "$variable" '%s' "$value"
  fi
}

_po_read_header
while (($#)); do
  case $1 in
    --) shift; break ;;
    --help | -h) printf '%s\n' "${_po_header[@]}"; exit 0 ;;
    --*=*) _po_option=${1%%=*}; _po_option=${_po_option#--}; _po_given=true; _po_text=${1#*=} ;;
    --*) _po_option=${1#--}; _po_given=false; _po_text='' ;;
    -?*) _po_fail "unknown option $1 (options start with two dashes)" ;;
    *) break ;;
  esac
  [[ -v _po_value["$_po_option"] ]] || _po_unknown "$_po_option"
  if [[ -z ${_po_value[$_po_option]} ]]; then   # a switch
    $_po_given || _po_text=true
    [[ $_po_text == true || $_po_text == false ]] || _po_fail "--$_po_option is a switch: true or false, not '$_po_text'"
  elif ! $_po_given; then
    if (($# < 2)) || [[ $2 == --?* ]]; then _po_fail "--$_po_option needs a value (${_po_value[$_po_option]})"; fi
    _po_text=$2
    shift
  fi
  _po_assign "$_po_option" "$_po_text"
  shift
done
unset _po_script _po_name _po_value _po_header _po_option _po_given _po_text
