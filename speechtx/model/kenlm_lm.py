"""A KenLM binary as a scorer of tokens, where its ARPA file is not at hand: `ngram.NgramLM` does the same many times faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from speechtx.config.errors import DataError
from speechtx.text.arpa import BOS, EOS, UNK
from speechtx.text.kenlm_binary import KenlmFile
from speechtx.text.kenlm_process import BEGIN, NOTHING, KenlmProcess

_LN10 = math.log(10.0)
_CACHE_BYTES = 1 << 26  # of rows that were asked for before


@dataclass(frozen=True)
class KenlmState:
    """The contexts of N hypotheses.

    Attributes:
        last: (N, order - 1) int64, the last tokens, oldest first; all that an n-gram can see.
    """

    last: Tensor

    def select(self, rows: Tensor) -> KenlmState:
        """The state whose row i continues hypothesis rows[i]; rows (M,) int64 may repeat, reorder and drop hypotheses."""
        return KenlmState(self.last[rows])

    def put(self, rows: Tensor, other: KenlmState) -> KenlmState:
        """The state in which `rows` (M,) continue the M hypotheses of `other`, and the rest as before."""
        return KenlmState(self.last.index_copy(0, rows, other.last))


class KenlmLM(nn.Module):
    """Scores tokens with KenLM, one query for each token and each context that did not occur before.

    `<sos/eos>`, `<blank>`, and tokens that the model does not list are treated as by `ngram.NgramLM`.

    Args:
        file: the binary.
        tokens: the tokenizer's tokens, `<blank>` first and `<sos/eos>` last.

    Raises:
        ConfigError: the module `kenlm` is not installed.
        DataError: the model has words that are no tokens, or lacks tokens and <unk> as well, or is damaged.
    """

    device_of: Tensor  # nothing but where the answers are to be

    def __init__(self, *, file: KenlmFile, tokens: Sequence[str]) -> None:
        super().__init__()
        self.vocab_size = len(tokens)
        self.order = file.order
        _refuse_other_words(file, tokens)
        words = [UNK, UNK, *tokens[2:-1], EOS]
        self._process = KenlmProcess(file.path, words=words, length=max(1, file.order - 1))
        missing = [words[i] for i in range(2, len(words)) if not self._process.known[i]]
        if missing and not file.knows_unk:
            raise DataError(
                f"{file.path}: lacks {len(missing)} tokens, for example {', '.join(map(repr, missing[:5]))}, and nothing tells "
                "that it knows <unk>; estimate it with <unk>, or with every token"
            )
        self._rows: dict[bytes, np.ndarray] = {}
        self._max_rows = max(1, _CACHE_BYTES // (4 * self.vocab_size))
        self.register_buffer("device_of", torch.zeros(0), persistent=False)

    def start(self, num: int) -> KenlmState:
        """The state of `num` hypotheses before anything was fed; the first token to feed is <sos/eos>."""
        return KenlmState(torch.full((num, self._process.length), NOTHING, device=self.device_of.device))

    def step(self, tokens: Tensor, state: KenlmState) -> tuple[Tensor, KenlmState]:
        """Feeds one token to each hypothesis.

        Args:
            tokens: (N,) int64; <sos/eos> in the first step.
            state: of `start` or of the step before.

        Returns:
            log-probabilities (N, V) float32 of the next token, -inf for <blank>, and the new state.

        Raises:
            DataError: see `KenlmProcess.log10_probs`.
        """
        begun = tokens == self.vocab_size - 1  # whatever follows an end of sentence starts a new one
        last = torch.cat((state.last[:, 1:], tokens.masked_fill(begun, BEGIN).unsqueeze(1)), dim=1)
        last[:, :-1] = last[:, :-1].masked_fill(begun.unsqueeze(1), NOTHING)
        return self._scores(last.cpu().numpy().astype(np.int32)).to(tokens.device), KenlmState(last)

    def _scores(self, contexts: np.ndarray) -> Tensor:
        """(N, V) log-probabilities after contexts (N, order - 1)."""
        keys = [context.tobytes() for context in contexts]
        if len(self._rows) > self._max_rows:
            self._rows.clear()
        new = {key: i for i, key in enumerate(keys) if key not in self._rows}
        if new:
            rows = self._process.log10_probs(contexts[list(new.values())]) * np.float32(_LN10)
            rows[:, 0] = -np.inf
            self._rows.update(zip(new, rows, strict=True))
        return torch.from_numpy(np.stack([self._rows[key] for key in keys]))


def _refuse_other_words(file: KenlmFile, tokens: Sequence[str]) -> None:
    if file.words is None:
        return
    own = {*tokens[1:-1], BOS, EOS, UNK}
    other = [word for word in file.words if word not in own]
    if other:
        raise DataError(
            f"{file.path}: {len(other)} of its {len(file.words)} words are no tokens of the tokenizer, for example "
            f"{', '.join(map(repr, other[:5]))}; the model was made for another one, or over words"
        )
