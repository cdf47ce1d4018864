#!/usr/bin/env bash
# AN4: CMU's census database, 50 minutes of spelled names, digits and dates read by 84 speakers; ESPnet's split.
#
# Usage: ./run.sh [options]
#  e.g.: ./run.sh --stage fbank --stop-stage train --ngpu 1
#
#   --stage STAGE          first stage, number or name: 0 check, 1 data, 2 fbank, 3 bpe, 4 train, 5 average, 6 decode, 7 score
#   --stop-stage STAGE     last stage (default 7)
#   --archive FILE         an4_sphere.tar.gz, if you have it already; else it is downloaded (64 MB)
#   --force                run the selected stages even if nothing changed since they finished
#   --restart              train from nothing; the earlier experiment of that name is kept as exp/NAME.old-1
#   --nj N                 parallel jobs (default: the number of processors)
#   --ngpu N               GPUs to train on (default 0)
#   --procs N              processes to train on without a GPU (default 0: as many as pay, one a processor and at most 4)
#   --seed N               of the weights and of the order of the data (default 1)
#   --set KEY=VALUE        overrides one value of the training configuration, as in model.encoder.layers=6; may be repeated
#   --train-config FILE    default conf/train.yaml
#   --decode-config FILE   how to recognise, may be repeated (default: every conf/decode*.yaml, each tuned on its conf/tune*.yaml)
#   --lm-config FILE       language models to make; default conf/lm.yaml, none where it does not exist
#   --exp DIR              experiment directory (default: exp/ and a name made of the configuration, --set and --seed)
#   --speeds F,F,...       train on copies of the training set at these speeds (default 0.9,1.0,1.1; '' for none)
#
# Stages that are finished and whose inputs did not change are skipped.
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

stage=0 stop_stage=7 force=false restart=false nj=$(env -u OMP_NUM_THREADS nproc) ngpu=0 procs=0 seed=1 set=() exp='' speeds=0.9,1.0,1.1 archive=''
train_config=conf/train.yaml decode_config=() lm_config=conf/lm.yaml fbank_config=conf/fbank.yaml
train_set=train_nodev dev_set=train_dev test_sets=(test) note='' # a plain statement for the top of RESULTS.md

source ./path.sh
source ./cmd.sh
source utils/parse_options.sh
source utils/stages.sh
[[ -z $archive || $archive == /* ]] || archive=$started_in/$archive
start_recipe "$@"

if begin_stage 0 "configuration, model, tools, disk, paths"; then
  utils/steps/check.sh "${check_options[@]}" --corpus-gib 0.2 ${archive:+--archive "$archive"}
fi

if begin_stage 1 "data directories ${corpus_sets[*]}" --out data/local/dict/lexicon.txt ${archive:+--in "$archive"}; then
  local/data.sh ${archive:+--archive "$archive"}
  for name in "${corpus_sets[@]}"; do speechtx data validate "data/$name"; done
  end_stage
fi

if begin_stage 2 "filterbank features and CMVN of ${all_sets[*]}"; then
  if [[ -n $speeds ]]; then speechtx data perturb-speed --speeds "$speeds" "data/${corpus_sets[0]}" "data/$train_set"; fi
  for name in "${all_sets[@]}"; do
    utils/steps/fbank.sh --cmd "$cmd" --nj "$nj" --config "$fbank_config" "data/$name"
  done
  end_stage
fi

if begin_stage 3 "tokenizer in $tokenizer"; then
  utils/steps/bpe.sh --config "$train_config" "${overrides[@]}" --report "data/$dev_set/text" "data/$train_set/text" "$tokenizer"
  end_stage
fi

if begin_stage 3:ngram "n-gram language model in $lm/ngram"; then
  utils/steps/lm.sh --config "$lm_config" ngram "data/${corpus_sets[0]}" "data/$dev_set" "$tokenizer" "$lm/ngram"
  end_stage
fi

if begin_stage 3:lexicon "word n-gram and lexicon in $lm/lexicon"; then
  utils/steps/lm.sh --config "$lm_config" lexicon "data/${corpus_sets[0]}" "data/$dev_set" "$tokenizer" "$lm/lexicon"
  end_stage
fi

if begin_stage 4:align "words of $train_set, by a first model in $align"; then
  utils/steps/align.sh --ngpu "$ngpu" --procs "$procs" --restart="$stage_changed" "data/$train_set" "data/$dev_set" "$align"
  end_stage
fi

if begin_stage 4 "training in $exp"; then
  if [[ $stage_state == changed ]]; then restart=true; fi # other data or another model: not to be continued
  utils/steps/train.sh --config "$train_config" "${overrides[@]}" --seed "$seed" --ngpu "$ngpu" --procs "$procs" --restart=$restart \
    "data/$train_set" "data/$dev_set" "$tokenizer" "$exp"
  end_stage
fi

if begin_stage 4:transformer "Transformer language model in $lm/transformer"; then
  utils/steps/lm.sh --config "$lm_config" --ngpu "$((ngpu > 0))" --restart="$stage_changed" \
    transformer "data/${corpus_sets[0]}" "data/$dev_set" "$tokenizer" "$lm/transformer"
  end_stage
fi

if begin_stage 5 "averaging, training curves"; then
  utils/steps/average.sh "$exp"
  end_stage
fi

for decoding in "${decodings[@]}"; do
  if begin_stage 6:tune "weights of $decoding, chosen on $dev_set"; then
    utils/steps/tune.sh --cmd "$cmd" --nj "$decode_nj" --ngpu "$((ngpu > 0))" "${lm_options[@]}" --config "$decoding" \
      --grid "$(tune_grid)" "$exp" "data/$dev_set" "$(tune_dir)"
    end_stage
  fi

  if begin_stage 6 "recognising $dev_set ${test_sets[*]} with $decoding"; then
    for name in "$dev_set" "${test_sets[@]}"; do
      utils/steps/decode.sh --cmd "$cmd" --nj "$decode_nj" --ngpu "$((ngpu > 0))" "${lm_options[@]}" --config "$(tuned_config)" \
        "$exp" "data/$name" "$(decode_dir "$name")"
    done
    end_stage
  fi
done

for decoding in "${decodings[@]}"; do
  if begin_stage 7 "scoring $decoding with sclite"; then
    for name in "$dev_set" "${test_sets[@]}"; do
      utils/steps/score.sh --note "$note" "$exp" "data/$name" "$(decode_dir "$name")"
    done
    end_stage
  fi
done

end_recipe
