#!/usr/bin/env bash
# The eight stages of a recipe: which to run, what each depends on, and skipping those that are up to date. Sourced by run.sh
# after its options, which have the same names in every recipe (egs/TEMPLATE/asr1/run.sh lists them):
#
#   start_recipe "$@"                     # checks what was given, fills in what was not
#   if begin_stage 2 "features"; then     # prints the header; true when the stage is selected and not up to date
#     ...
#     end_stage
#   fi
#   end_recipe                            # shows the scores and where they lie
#
# `begin_stage 3:ngram` is a step of stage 3 with a stamp of its own: it makes the language model that the section `ngram` of
# $lm_config describes, and is not there without it. Others are `3:lexicon` and `4:transformer`. `4:align` trains a first model and cuts
# the training set into words, where $train_config has a section training.join. `6:tune` chooses decoding weights on the development
# set: conf/decode_NAME.yaml is tuned on the grid conf/tune_NAME.yaml, if there is one (conf/decode.yaml on conf/tune.yaml).
#
# Stages 6 and 7 run once for each decoding configuration: run.sh loops over $decodings, and $decoding is the one at hand.
#
# start_recipe sets: exp, lm (where language models are made), align (of the first model), joined_words, tokenizer, corpus_sets (what stage 1 makes), all_sets (what stage 2 works on), overrides (--set
# arguments), check_options, decodings, decode_nj, lm_options (of steps/decode.sh and tune.sh). Further arguments of begin_stage go to `speechtx stamp begin` (more inputs: --in FILE,
# --value NAME=VALUE). It sets stage_state to first, changed, extended, interrupted or missing, and
# stage_changed to whether it is `changed`: what an earlier run made is then of no use. A training that could not start because of an
# error stays `changed`, one that was killed on its way is `interrupted`.
# shellcheck disable=SC2154,SC2034  # variables of run.sh, read here, and ours, read there

stage_names=(check data fbank bpe train average decode score)
stage_running=''

say() { printf '[%s] %s\n' "$(date '+%F %T')" "$*"; }

recipe_error() {
  printf 'run.sh: error: %s\n' "$1" >&2
  exit 2
}

# Prints the number of a stage given by number or name.
stage_number() {
  local number
  for number in "${!stage_names[@]}"; do
    if [[ $1 == "$number" || $1 == "${stage_names[number]}" ]]; then
      echo "$number"
      return
    fi
  done
  recipe_error "unknown stage '$1'; stages are: 0 check, 1 data, 2 fbank, 3 bpe, 4 train, 5 average, 6 decode, 7 score"
}

# Prints the default experiment directory: the configuration's name and what deviates from it on the command line, as in
# exp/train_encoder.layers6_seed2, so that two configurations never share one.
experiment_name() {
  local name override key
  name=$(basename "$train_config" .yaml)
  for override in "${set[@]}"; do
    key=${override%%=*}
    [[ $key != *.*.* ]] || key=${key#"${key%.*.*}".} # the last two words tell enough
    name+=_$key${override#*=}
  done
  [[ -z $speeds ]] || name+=_sp
  [[ $seed == 1 ]] || name+=_seed$seed
  echo "exp/${name//[!A-Za-z0-9._+-]/-}"
}

start_recipe() {
  local override
  (($# == 0)) || recipe_error "unexpected argument '$1'; options start with two dashes"
  first_stage=$(stage_number "$stage") || exit
  last_stage=$(stage_number "$stop_stage") || exit
  ((first_stage <= last_stage)) || recipe_error "--stage $stage comes after --stop-stage $stop_stage"
  ((nj > 0)) || recipe_error "--nj must be 1 or more"
  [[ -n $exp ]] || exp=$(experiment_name)
  exp=${exp%/}
  tokenizer=data/tokenizer/$(basename "$exp")
  lm=exp/lm/$(basename "$exp")
  [[ -f $lm_config || $lm_config == conf/lm.yaml ]] || recipe_error "--lm-config $lm_config: no such file"
  corpus_sets=("$train_set" "$dev_set" "${test_sets[@]}")
  [[ -z $speeds ]] || train_set+=_sp
  all_sets=("$train_set" "$dev_set" "${test_sets[@]}")
  overrides=()
  for override in "${set[@]}"; do overrides+=(--set "$override"); done
  decode_nj=$((ngpu > 0 ? 1 : nj))
  decodings=("${decode_config[@]}")
  if ((${#decodings[@]} == 0)); then
    for decoding in conf/decode*.yaml; do # all that this model can do
      if ! grep -qs '^phone_weight:' "$decoding" "$(tune_grid)" || predicts_phones; then decodings+=("$decoding"); fi
    done
  fi
  lm_options=() lm_sections=''
  if [[ -f $lm_config ]] && ! lm_sections=$(speechtx lm sections --config "$lm_config" 2>&1); then
    ((first_stage == 0)) || { printf '%s\n' "$lm_sections" >&2 && exit 1; }
    lm_sections='' # stage 0 tells what is wrong with this configuration, and with the others
  fi
  ! has_section transformer || lm_options+=(--lm "$lm/transformer")
  ngram_name=ngram
  ! has_section lexicon || ngram_name=lexicon # whole words take its place where they are asked for
  ! has_section "$ngram_name" || lm_options+=(--ngram "$lm/$ngram_name")
  joined_words=$(speechtx stamp named --config "$train_config" "${overrides[@]}" --names training.join.words 2>/dev/null) || joined_words=''
  align=$(dirname "${joined_words:-exp/align/words}") # of all experiments: words are where they are, whatever is trained on them
  check_options=(--config "$train_config" "${overrides[@]}" --fbank-config "$fbank_config" --exp "$exp"
    --train-text "data/$train_set/text" --nj "$nj" --ngpu "$ngpu" --speeds "$speeds")
  ! joins_words || check_options+=(--align-config conf/align.yaml)
  [[ ! -f $lm_config ]] || check_options+=(--lm-config "$lm_config")
  for decoding in "${decodings[@]}"; do
    [[ -f $decoding ]] || recipe_error "$decoding: no such decoding configuration"
    check_options+=(--decode-config "$decoding")
    [[ ! -f $(tune_grid) ]] || check_options+=(--tune "$decoding" "$(tune_grid)")
  done
  # What RESULTS.md shows as the command that reproduces it.
  SPEECHTX_RECIPE_COMMAND="cd ${PWD#"$SPEECHTX_ROOT"/} && ./run.sh"
  ((${#_po_arguments[@]} == 0)) || SPEECHTX_RECIPE_COMMAND+=$(printf ' %q' "${_po_arguments[@]}")
  export SPEECHTX_RECIPE_COMMAND
  trap 'stage_failed $?' EXIT
}

# Whether $lm_config asks for that language model.
has_section() { [[ $'\n'$lm_sections$'\n' == *$'\n'$1$'\n'* ]]; }

# Whether the model at hand is trained on words joined anew, which a first model has to find.
joins_words() { [[ -n $joined_words && -f conf/align.yaml ]]; }

# Whether the model at hand predicts phones of a lexicon, which searches with a phone_weight need.
predicts_phones() {
  [[ -n $(speechtx stamp named --config "$train_config" "${overrides[@]}" --names model.intermediate_ctc.lexicon 2>/dev/null) ]]
}

# Prints the directory of one set's hypotheses with the decoding configuration at hand.
decode_dir() { echo "$exp/decode_$1_$(basename "$decoding" .yaml)"; }

# Prints the file with the grid on which the decoding configuration at hand is tuned, if there is such a file.
tune_grid() {
  local name
  name=$(basename "$decoding")
  echo "$(dirname "$decoding")/tune${name#decode}"
}

# Prints where that is done.
tune_dir() { echo "$exp/tune_${dev_set}_$(basename "$decoding" .yaml)"; }

# Prints the configuration to decode with: the tuned one, or the one at hand where there is nothing to tune.
tuned_config() {
  if [[ -f $(tune_grid) ]]; then echo "$(tune_dir)/tuned.yaml"; else echo "$decoding"; fi
}

# Adds what a search reads to stage_inputs: model, configurations $@, and the language models that those give a weight.
list_search_inputs() {
  local file above_zero='.*[1-9]|[[:space:]]*(#|$)' # or the values of a grid, one a line below
  stage_inputs+=(--after "$exp/.stamps/average.json" --in "$exp/model.pt" --config "$exp/config.yaml:model,features")
  for file; do stage_inputs+=(--config "$file"); done
  ! grep -qsE "^lm_weight:($above_zero)" "$@" || stage_inputs+=(--after "$lm/.stamps/transformer.json")
  ! grep -qsE "^ngram_weight:($above_zero)" "$@" || stage_inputs+=(--after "$lm/.stamps/$ngram_name.json")
}

# Adds what a training reads of the data directories to stage_inputs.
list_training_data() {
  local name file
  for name in "$train_set" "$dev_set"; do # the statistics change whenever any feature does
    for file in text utt2spk feats.scp utt2num_frames fbank.yaml global_cmvn.ark; do stage_inputs+=(--in "data/$name/$file"); done
  done
}

# Fills stage_inputs with what the stage or step $1 depends on, in the words of `speechtx stamp`.
list_inputs() {
  local name file texts
  stage_inputs=()
  case $1 in
    data)
      stage_inputs+=(--in local)
      for name in "${corpus_sets[@]}"; do stage_inputs+=(--out "data/$name/wav.scp" --out "data/$name/text"); done
      ;;
    fbank)
      stage_inputs+=(--after data/.stamps/data.json --config "$fbank_config" --value "speeds=$speeds")
      for name in "${corpus_sets[@]}"; do
        for file in wav.scp segments utt2spk utt2speed; do stage_inputs+=(--in "data/$name/$file"); done
      done
      for name in "${all_sets[@]}"; do # of which runs with and without --speeds share all but the training set
        stage_inputs+=(--out "data/$name/feats.scp" --out "data/$name/global_cmvn.ark" --result "data/$name/fbank.yaml")
      done
      ;;
    bpe)
      stage_inputs+=(--in "data/$train_set/text" --config "$train_config:tokenizer" "${overrides[@]}" --out "$tokenizer/tokens.txt")
      ;;
    align)
      list_training_data
      stage_inputs+=(--config conf/align.yaml --names model.intermediate_ctc.lexicon --out "$joined_words/segments")
      ;;
    train)
      list_training_data
      stage_inputs+=(--in "$tokenizer/tokens.txt" --config "$train_config:features,model,training" "${overrides[@]}" --value "seed=$seed")
      stage_inputs+=(--names model.intermediate_ctc.lexicon --names training.join.words)
      for name in epochs average checkpoint_minutes loader_workers max_nonfinite_steps; do
        stage_inputs+=(--soft "training.$name") # `speechtx train` continues an experiment in which only these changed
      done
      stage_inputs+=(--out "$exp/config.yaml")
      ;;
    ngram | lexicon | transformer) # of transcripts without copies at other speeds: they hold no other words
      texts=$(speechtx lm texts --config "$lm_config" --train "data/${corpus_sets[0]}" "$1") || exit
      while read -r file; do stage_inputs+=(--in "$file"); done <<<"$texts"
      stage_inputs+=(--in "data/$dev_set/text" --in "$tokenizer/tokens.txt" --config "$lm_config:$1" --out "$lm/$1/perplexity.json")
      for name in epochs patience checkpoint_minutes max_nonfinite_steps; do
        stage_inputs+=(--soft "transformer.$name")
      done
      ;;
    average)
      stage_inputs+=(--after "$exp/.stamps/train.json" --out "$exp/model.pt")
      ;;
    tune)
      list_search_inputs "$decoding" "$(tune_grid)"
      for file in text feats.scp global_cmvn.ark; do stage_inputs+=(--in "data/$dev_set/$file"); done
      stage_inputs+=(--out "$(tuned_config)")
      ;;
    decode)
      list_search_inputs "$(tuned_config)"
      for name in "$dev_set" "${test_sets[@]}"; do
        for file in feats.scp global_cmvn.ark; do stage_inputs+=(--in "data/$name/$file"); done
        stage_inputs+=(--out "$(decode_dir "$name")/text")
      done
      ;;
    score)
      stage_inputs+=(--after "$exp/.stamps/train.json" --after "$exp/.stamps/decode_$(basename "$decoding" .yaml).json")
      stage_inputs+=(--out "$exp/RESULTS.md")
      for name in "$dev_set" "${test_sets[@]}"; do stage_inputs+=(--in "data/$name/text" --in "$(decode_dir "$name")/text"); done
      ;;
  esac
}

# begin_stage NUMBER[:STEP] TITLE [stamp arguments]: is there work to do? Prints the stage's header line either way.
begin_stage() {
  local number=${1%%:*} title=$2 name answer
  name=${stage_names[number]}
  if [[ $1 == *:* ]]; then
    name=${1#*:}
    case $name in
      tune) [[ -f $(tune_grid) ]] ;;
      align) joins_words ;;
      *) has_section "$name" ;;
    esac || return 1
  fi
  shift 2
  ((first_stage <= number && number <= last_stage)) || return 1
  if [[ $name == check ]]; then # takes seconds, and the machine may have changed: always runs
    say "stage $number $name: $title"
    return 0
  fi
  stage_running="$number $name"
  case $name in
    data) stage_stamp=data/.stamps/data.json ;;
    align) stage_stamp=$align/.stamps/align.json ;;
    ngram | lexicon | transformer) stage_stamp=$lm/.stamps/$name.json ;;
    fbank) stage_stamp=data/.stamps/fbank${speeds:+_sp}.json ;; # copies at any speeds lie in the same directory
    *) stage_stamp=$exp/.stamps/${name}$([[ $name =~ tune|decode|score ]] && echo "_$(basename "$decoding" .yaml)").json ;;
  esac
  list_inputs "$name"
  if $force || [[ $name == train && $restart == true ]]; then stage_inputs+=(--force); fi
  answer=$(speechtx stamp begin --stamp "$stage_stamp" "${stage_inputs[@]}" "$@") || exit
  stage_state=${answer%% *} stage_changed=false stage_made=''
  case $name in
    align) stage_made=$align ;;
    train) stage_made=$exp ;;
    transformer) stage_made=$lm/transformer ;;
  esac
  case $stage_state in
    skip)
      stage_running=''
      answer=${answer#skip }
      say "stage $number $name: up to date (finished ${answer%.*})"
      return 1
      ;;
    changed | extended) title+="; changed: ${answer#* }" ;;
    missing) title+="; gone: ${answer#* }" ;;
    interrupted) title+="; again, because it did not finish" ;;
  esac
  say "stage $number $name: $title"
  if [[ -n $stage_made ]]; then recall_change; fi
  [[ $stage_state != changed ]] || stage_changed=true
}

# What lies in $stage_made was trained otherwise, and a step is about to move it aside. It bears a mark until then, so that a step which
# fails before that does not leave the next run to continue it. A training that began since lies in a new directory, without the mark.
recall_change() {
  local mark=$stage_made/.outdated
  if [[ $stage_state == changed && -f $stage_made/config.yaml ]]; then
    : >"$mark"
  elif [[ $stage_state == interrupted && -f $mark ]]; then
    stage_state=changed
  fi
}

end_stage() {
  [[ -z $stage_made ]] || rm -f "$stage_made/.outdated"
  speechtx stamp end --stamp "$stage_stamp"
  stage_running=''
}

# Called when run.sh ends: if a stage was at work, says which and how to go on.
stage_failed() {
  [[ -n $stage_running && $1 != 0 ]] || return 0
  say "stage $stage_running did not finish (status $1); run it again: what finished before it is skipped" >&2
}

# Prints the scores, and where they, sclite's details and the figures lie.
end_recipe() {
  local path
  ((last_stage == 7)) || return 0
  printf '\n'
  grep '^|' "$exp/RESULTS.md" || true
  printf '\nresults  %s\n' "$PWD/${exp#"$PWD/"}/RESULTS.md"
  for path in "$exp"/decode_*/score_wer; do [[ ! -d $path ]] || printf 'sclite   %s\n' "$PWD/${path#"$PWD/"}"; done
  for path in "$exp"/*.png; do [[ ! -f $path ]] || printf 'figure   %s\n' "$PWD/${path#"$PWD/"}"; done
}
