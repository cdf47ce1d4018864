"""Language models give on a GPU what they give on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from speechtx.config.lm import TransformerLmConfig
from speechtx.model.language_model import LanguageModel, TransformerLM
from speechtx.model.lexicon import LexiconLM
from speechtx.model.ngram import NgramLM
from speechtx.text.kneser_ney import estimate_ngram, estimate_over

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PIECES = ["<blank>", "<unk>", *"abcdefgh", "<sos/eos>"]


def run(lm: LanguageModel, fed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(U, N, V): scores step by step, the hypotheses reordered after each."""
    state, scores = lm.start(fed.shape[1]), []
    with torch.inference_mode():
        for tokens in fed:
            row, state = lm.step(tokens, state)
            state = state.select(rows)
            scores.append(row[:, 1:].cpu())
    return torch.stack(scores)


def word_model(rng: np.random.Generator) -> LexiconLM:
    """Words over the pieces ▁a ... ▁d, e ... h, some of them beginnings of others."""
    spellings = [[2], [2, 6], [2, 6, 7], [3], [4, 8], [5, 9, 6], [5, 9]]
    names = [f"w{i}" for i in range(len(spellings))]
    text = [rng.integers(1, 8, size=rng.integers(1, 9)).tolist() for _ in range(200)]
    arpa = estimate_over(text, words=["<s>", *names, "</s>"], order=3).arpa
    words = NgramLM(arpa=arpa, tokens=["<blank>", "<unk>", *names, "<sos/eos>"])
    pieces = ["<blank>", "<unk>", *(f"\u2581{c}" for c in "abcd"), *"efgh", "<sos/eos>"]
    return LexiconLM(words=words, spellings=dict(enumerate(spellings, start=2)), tokens=pieces)


@pytest.mark.parametrize("kind", ["ngram", "lexicon", "transformer"])
def test_scores_are_those_of_the_cpu(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "ngram":
        text = [rng.integers(1, 10, size=rng.integers(1, 9)).tolist() for _ in range(200)]
        lm: torch.nn.Module = NgramLM(arpa=estimate_ngram(text, pieces=PIECES, order=4).arpa, tokens=PIECES)
    elif kind == "lexicon":
        lm = word_model(rng)
    else:
        torch.manual_seed(0)
        lm = TransformerLM(config=TransformerLmConfig(dim=64, ff_dim=128), vocab_size=len(PIECES)).eval()
    fed = torch.from_numpy(rng.integers(1, 10, size=(12, 7)))
    fed[0] = len(PIECES) - 1
    rows = torch.tensor([0, 0, 2, 6, 5, 1, 3])
    expected = run(lm, fed, rows)  # type: ignore[arg-type]
    assert torch.allclose(run(lm.cuda(), fed.cuda(), rows.cuda()), expected, atol=1e-4)  # type: ignore[arg-type]
