"""`lm lexicon`: from transcripts to a word n-gram and the list of its words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from speechtx.config.atomic import write_text
from speechtx.config.errors import ConfigError, DataError
from speechtx.config.lm import LexiconConfig
from speechtx.config.load import dump_config
from speechtx.experiment.language_model import ARPA_FILE, LEXICON_FILE
from speechtx.text.arpa import BOS, EOS, write_arpa
from speechtx.text.kneser_ney import estimate_over
from speechtx.text.lexicon import spell, write_lexicon
from speechtx.text.normalize import split_words
from speechtx.text.tokenizer import Tokenizer
from speechtx.training.lm_text import read_text, read_words
from speechtx.training.perplexity import Perplexity, measure


def make_lexicon(
    config: LexiconConfig, *, train: Path, dev: Path, tokenizer: Path, out: Path, say: Callable[[str], None] = print
) -> Perplexity:
    """Estimates a word n-gram over a closed vocabulary and measures it on dev as a search will see it: read again from its files.

    Args:
        config: order, texts, and files with further words.
        train: data directory whose transcripts are taken where the configuration names no text.
        dev: data directory.
        tokenizer: of stage 3.
        out: the directory to write; a model that is there is replaced.
        say: gets one line at a time about what was done.

    Raises:
        SpeechtxError: see `read_words`, `estimate_over` and `perplexity`.
    """
    opened = Tokenizer.load(tokenizer)
    sentences = read_words(config.text or (train,))
    more = [word for path in config.words for word in _further_words(path)]
    lexicon, impossible = spell((word for sentence in (*sentences, more) for word in sentence), opened)
    if impossible:
        unspelled = set(impossible)
        sentences = [sentence for sentence in sentences if not unspelled.intersection(sentence)]
        some = " ".join(impossible[:10])
        say(f"left out: {len(impossible)} words that the tokenizer cannot spell, and their sentences: {some}")
    words = [BOS, *lexicon, EOS]
    number = {word: i for i, word in enumerate(words)}
    estimate = estimate_over([[number[w] for w in sentence] for sentence in sentences], words=words, order=config.order)
    out.mkdir(parents=True, exist_ok=True)
    opened.save(out / "tokenizer")
    write_text(out / "config.yaml", dump_config(config))
    write_arpa(estimate.arpa, out / ARPA_FILE)
    write_lexicon(lexicon, opened, out / LEXICON_FILE)
    what = f"modified Kneser-Ney of order {config.order}" if config.order else "all equally likely"
    fixed = ", ".join(map(str, estimate.fallback))
    note = f"; order {fixed}: fixed discounts, there is too little text to estimate them" if fixed else ""
    say(f"{out}: {len(lexicon):,} words, {what}, of {len(sentences):,} sentences{note}")
    return measure(out, read_text((dev,), opened), tokens=opened.pieces, say=say)


def _further_words(path: str) -> Sequence[str]:
    try:
        return split_words(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"lexicon.words: {path}: no such file") from None
    except UnicodeDecodeError as err:
        raise DataError(f"lexicon.words: {path}: not UTF-8 at byte {err.start + 1}") from None
