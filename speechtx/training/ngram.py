"""`lm ngram`: from transcripts to an n-gram model's directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from speechtx.config.atomic import write_text
from speechtx.config.lm import NgramConfig
from speechtx.config.load import dump_config
from speechtx.experiment.language_model import ARPA_FILE
from speechtx.text.arpa import write_arpa
from speechtx.text.kneser_ney import estimate_ngram
from speechtx.text.tokenizer import Tokenizer
from speechtx.training.lm_text import read_text
from speechtx.training.perplexity import Perplexity, measure


def make_ngram(
    config: NgramConfig, *, train: Path, dev: Path, tokenizer: Path, out: Path, say: Callable[[str], None] = print
) -> Perplexity:
    """Estimates an n-gram and measures it on dev as a search will see it: read again from its file.

    Args:
        config: order and texts.
        train: data directory whose transcripts are taken where the configuration names no text.
        dev: data directory.
        tokenizer: of stage 3.
        out: the directory to write; a model that is there is replaced.
        say: gets one line at a time about what was done.

    Raises:
        SpeechtxError: see `read_text` and `estimate_ngram`.
    """
    opened = Tokenizer.load(tokenizer)
    text = read_text(config.text or (train,), opened)
    say(str(text))
    estimate = estimate_ngram(text.sentences, pieces=opened.pieces, order=config.order)
    out.mkdir(parents=True, exist_ok=True)
    opened.save(out / "tokenizer")
    write_text(out / "config.yaml", dump_config(config))
    write_arpa(estimate.arpa, out / ARPA_FILE)
    counts = ", ".join(f"{count:,}" for count in estimate.arpa.counts)
    fixed = ", ".join(map(str, estimate.fallback))
    note = f"; order {fixed}: fixed discounts, there is too little text to estimate them" if fixed else ""
    say(f"{out / ARPA_FILE}: modified Kneser-Ney, {counts} n-grams of order 1 to {config.order}{note}")
    return measure(out, read_text((dev,), opened), tokens=opened.pieces, say=say)
