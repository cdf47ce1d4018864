"""Everything that scores the extensions of hypotheses by one token: decoder, CTC, language models, hot words, coverage.

Each is asked once a step for all hypotheses; tensors hold N = B * beam rows, row i belonging to utterance i // beam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.model.decoder import Decoder
from speechtx.model.decoder_state import DecoderState
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam_state import gather_slots
from speechtx.search.ctc_prefix import CtcPrefixScorer, PrefixState
from speechtx.search.scorers import Weighted


class JointScores:
    """The parts of the score with their states, which follow the hypotheses.

    Attributes:
        names: (P) of the parts, as fields of `Hypothesis`, in the order of every (..., P) tensor.
        weights: (P,) float64.
    """

    def __init__(
        self, *, model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig, scorers: tuple[Weighted, ...]
    ) -> None:
        self.batch, self.beam = len(enc_out), config.beam
        self.end_id = model.sos_eos_id
        self._threshold = config.coverage_threshold
        weights: dict[str, float] = {}
        outputs: list[Tensor] = []  # of CTC, computed once, for the prefix scores and for a penalty whose axis CTC measures
        self._decoder: Decoder | None = model.decoder if config.ctc_weight < 1 else None
        if config.ctc_weight > 0 or (self._decoder is not None and self._decoder.needs_ctc):
            outputs = model.ctc_outputs(enc_out)
        self._decoder_state: DecoderState | None = None
        self._covered: Tensor | None = None  # (N, S) attention that each frame has had so far
        if self._decoder is not None:
            weights["att"] = 1 - config.ctc_weight
            self._decoder_state = self._decoder.start(
                enc_out, enc_lens, beam=self.beam, ctc_log_probs=outputs[0] if outputs else None
            )
            if config.coverage_weight > 0:
                weights["coverage"] = config.coverage_weight
                self._decoder_state = self._decoder_state.watched()
                self._covered = enc_out.new_zeros(self.batch * self.beam, enc_out.shape[1], dtype=torch.float32)
        self._ctc: list[CtcPrefixScorer] = []  # of each model of an ensemble
        if config.ctc_weight > 0:
            weights["ctc"] = config.ctc_weight
            known: dict[str, Any] = {"enc_lens": enc_lens, "blank_id": model.blank_id, "beam": self.beam}
            self._ctc = [CtcPrefixScorer(log_probs=log_probs, **known) for log_probs in outputs]
        self._ctc_states: list[PrefixState] = [scorer.start() for scorer in self._ctc]
        self._ctc_scores: list[Tensor] = []  # (N, V) of each, as they are in the mean that counts
        self._scorers = scorers
        self._states: list[Any] = [scorer.scorer.start(self.batch * self.beam) for scorer in scorers]
        weights |= {scorer.name: scorer.weight for scorer in scorers}
        self.names = tuple(weights)
        self.weights = torch.tensor(list(weights.values()), dtype=torch.float64, device=enc_out.device)
        sums = [name not in ("ctc", "coverage") for name in weights]  # the others say what the whole hypothesis has
        self._sums = torch.tensor(sums, device=enc_out.device)
        self._kept = torch.zeros(0)  # (B, beam, P) what of the parts stays whatever follows
        self._new = torch.zeros(0)  # (P, N, V) what of them comes with each token

    def extend(self, last: Tensor, so_far: Tensor, dead: Tensor) -> Tensor:
        """Scores all extensions.

        Args:
            last: (N,) the tokens that the hypotheses took last.
            so_far: (B, beam, P) the parts of their scores.
            dead: (B, beam) slots without a hypothesis.

        Returns:
            (B, beam, V) float64, the weighted sum of all parts for each token; the last column for the end of the sentence. -inf
            for the dead, and instead of NaN.
        """
        new: dict[str, Tensor] = {}
        if self._decoder is not None:
            assert self._decoder_state is not None
            new["att"], self._decoder_state = self._decoder.step(last, self._decoder_state)
            if self._covered is not None:
                assert self._decoder_state.looked is not None
                self._covered = self._covered + self._decoder_state.looked
                new["coverage"] = (self._covered > self._threshold).sum(dim=1, keepdim=True).expand_as(new["att"])
        if self._ctc:
            new["ctc"] = self._prefix_scores()
        for i, (name, _, scorer) in enumerate(self._scorers):
            new[name], self._states[i] = scorer.step(last, self._states[i])
        self._new = torch.stack([new[name].to(torch.float64) for name in self.names])
        self._kept = torch.where(self._sums, so_far, 0.0)
        return self._total(dead)

    def _prefix_scores(self) -> Tensor:
        """(N, V) float64 of CTC, the last column for the end of the sentence; of an ensemble, the mean of the logarithms.

        Models that were trained apart agree on the labels of a prefix, not on the frames in which they are seen: their outputs
        cannot be put together frame by frame.
        """
        self._ctc_scores = []
        for scorer, state in zip(self._ctc, self._ctc_states, strict=True):
            scores, log_end = scorer.score(state)
            scores[:, self.end_id] = log_end
            self._ctc_scores.append(scores)
        return self._ctc_scores[0] if len(self._ctc) == 1 else torch.stack(self._ctc_scores).mean(dim=0)

    def _total(self, dead: Tensor) -> Tensor:
        """What `extend` returns."""
        kept = (self._kept @ self.weights).masked_fill_(dead, -torch.inf).unsqueeze(2)
        total = (self.weights @ self._new.flatten(1)).view(self.batch, self.beam, -1).add_(kept)
        return total.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def doubtful(self, score: Tensor, extensions: Tensor) -> bool:
        """Whether any of the extensions that were chosen may have been overrated: then CTC must look at more frames.

        Args:
            score: (B, beam) of the extensions, -inf for none.
            extensions: (B, beam) where slot and label stand among the beam * V of an utterance.
        """
        for scorer, state, scores in zip(self._ctc, self._ctc_states, self._ctc_scores, strict=True):
            if scorer.is_windowed(state):
                chosen = scores.view(self.batch, -1).gather(1, extensions)
                if (scorer.doubtful(state, chosen) & (score > -torch.inf)).any():
                    return True
        return False

    def extend_again(self, tokens: Tensor, dead: Tensor) -> Tensor:
        """What `extend` returned, from more frames.

        Args:
            tokens: (B, beam, L) of the hypotheses.
            dead: (B, beam) slots without a hypothesis.
        """
        self._ctc_states = [scorer.restart(tokens, dead) for scorer in self._ctc]
        self._new[self.names.index("ctc")] = self._prefix_scores()
        return self._total(dead)

    def parts_of(self, slots: Tensor, extensions: Tensor) -> Tensor:
        """The parts (B, beam, P) of extensions that `extend` has just scored.

        Args:
            slots: (B, beam) of the hypotheses that are extended.
            extensions: (B, beam) where slot and label stand among the beam * V of an utterance.
        """
        new = self._new.view(len(self.names), self.batch, -1)
        return gather_slots(self._kept, slots) + new.gather(2, extensions.expand(len(new), -1, -1)).permute(1, 2, 0)

    def follow(self, rows: Tensor, labels: Tensor, dead: Tensor) -> None:
        """Makes row i of all states the hypothesis `rows[i]` after it took `labels[i]`; dead (N,): rows without a hypothesis."""
        if self._decoder_state is not None:
            self._decoder_state = self._decoder_state.select(rows)
        if self._covered is not None:
            self._covered = self._covered[rows]
        pairs = zip(self._ctc, self._ctc_states, strict=True)
        self._ctc_states = [scorer.extend(state, rows, labels, dead) for scorer, state in pairs]
        self._states = [state.select(rows) for state in self._states]

    def keep(self, utterances: Tensor) -> None:
        """Drops all utterances but these (int64 indices into B)."""
        rows = (utterances.unsqueeze(1) * self.beam + torch.arange(self.beam, device=utterances.device)).view(-1)
        if self._decoder_state is not None:
            self._decoder_state = self._decoder_state.keep(utterances)
        if self._covered is not None:
            self._covered = self._covered[rows]
        pairs = zip(self._ctc, self._ctc_states, strict=True)
        self._ctc_states = [scorer.keep(state, utterances) for scorer, state in pairs]
        self._states = [state.select(rows) for state in self._states]
        self.batch = len(utterances)
