"""What lies in a language model's directory, and how to open it again.

<lm>/ngram/          ngram.arpa                config.yaml  tokenizer/  perplexity.json
<lm>/lexicon/        ngram.arpa, lexicon.txt   config.yaml  tokenizer/  perplexity.json
<lm>/transformer/    model.pt, checkpoints/    config.yaml  tokenizer/  perplexity.json  metrics.jsonl  train.log  run.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from speechtx.config.errors import DataError, ExperimentError
from speechtx.config.lm import TransformerLmConfig
from speechtx.config.load import load_config
from speechtx.experiment.experiment import load_weights
from speechtx.model.kenlm_lm import KenlmLM
from speechtx.model.language_model import TransformerLM
from speechtx.model.lexicon import LexiconLM
from speechtx.model.ngram import NgramLM
from speechtx.text.arpa import BOS, EOS, UNK, read_arpa
from speechtx.text.kenlm_binary import is_kenlm_binary, read_kenlm_binary
from speechtx.text.lexicon import read_lexicon
from speechtx.text.tokenizer import BLANK, SOS_EOS, Tokenizer

ARPA_FILE = "ngram.arpa"
LEXICON_FILE = "lexicon.txt"
WEIGHTS_FILE = "model.pt"


def load_language_model(
    path: str | Path, *, tokens: Sequence[str], device: str | torch.device = "cpu"
) -> TransformerLM | NgramLM | LexiconLM | KenlmLM:
    """Opens a language model of any kind, in evaluation mode; all are a `speechtx.model.language_model.LanguageModel`.

    Args:
        path: the directory of a model that `speechtx lm` made, or any ARPA file or KenLM binary over the tokenizer's tokens.
        tokens: the tokens (`Tokenizer.pieces`) of the model that it is to work with.
        device: where to put it.

    Raises:
        ExperimentError: there is no model at `path`, or it was made with other tokens.
        DataError: the ARPA file is wrong, or has words that are no tokens, or the lexicon is wrong (file and line are named);
            a KenLM binary is damaged.
        ConfigError: a KenLM binary, but the module `kenlm` is not installed.
    """
    path = Path(path)
    if path.is_dir():
        require_same_tokens(path, tokens)
    arpa = path / ARPA_FILE if path.is_dir() else path
    model: TransformerLM | NgramLM | LexiconLM | KenlmLM
    if (path / LEXICON_FILE).is_file():
        model = _load_lexicon(path, tokens)
    elif arpa.is_file() and is_kenlm_binary(arpa):
        model = KenlmLM(file=read_kenlm_binary(arpa), tokens=tokens)
    elif arpa.is_file():
        model = NgramLM(arpa=read_arpa(arpa, vocabulary=tokens[1:-1]), tokens=tokens, source=str(arpa))
    elif (path / WEIGHTS_FILE).is_file():
        config = load_config(path / "config.yaml", TransformerLmConfig)
        model = TransformerLM(config=config, vocab_size=len(tokens))
        load_weights(model, path / WEIGHTS_FILE)
    else:
        raise ExperimentError(
            f"{path}: no language model: neither an ARPA file, nor a KenLM binary, nor a directory with {ARPA_FILE} or "
            f"{WEIGHTS_FILE}"
        )
    return model.to(device).eval()


def _load_lexicon(path: Path, tokens: Sequence[str]) -> LexiconLM:
    """The word n-gram and the spelling of its words."""
    arpa = read_arpa(path / ARPA_FILE)
    lexicon = read_lexicon(path / LEXICON_FILE, Tokenizer.load(path / "tokenizer"))
    names = [BLANK, UNK, *(word for word in arpa.words if word not in (BOS, EOS, UNK)), SOS_EOS]
    number = {name: i for i, name in enumerate(names)}
    for word in lexicon:
        if word not in number:
            raise DataError(f"{path / LEXICON_FILE}: {word!r} is no unigram of {path / ARPA_FILE}, so that it has no probability")
    words = NgramLM(arpa=arpa, tokens=names, source=str(path / ARPA_FILE))
    return LexiconLM(words=words, spellings={number[word]: ids for word, ids in lexicon.items()}, tokens=tokens)


def require_same_tokens(path: Path, tokens: Sequence[str]) -> None:
    """Compares the tokens that a model's directory holds with those it is to score.

    Raises:
        ExperimentError: they differ, or are not there.
    """
    if not (path / "tokenizer").is_dir():
        parts = sorted(part.name for part in path.iterdir() if (part / "tokenizer").is_dir())
        hint = f"; did you mean {path / parts[0]}?" if parts else ": `speechtx lm` makes one with a folder tokenizer"
        raise ExperimentError(f"{path}: no language model's directory{hint}")
    own = Tokenizer.load(path / "tokenizer").pieces
    if list(tokens) == own:
        return
    first = next((i for i, (a, b) in enumerate(zip(own, tokens, strict=False)) if a != b), min(len(own), len(tokens)))
    raise ExperimentError(
        f"{path}: a language model over {len(own)} tokens, but it is to score a model's {len(tokens)}; they differ from "
        f"token {first} on ({_shown(own, first)} and {_shown(tokens, first)}): train it with the tokenizer of that model"
    )


def _shown(tokens: Sequence[str], i: int) -> str:
    return repr(tokens[i]) if i < len(tokens) else "none"
