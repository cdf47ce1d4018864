"""Mask-CTC: the greedy CTC output, its doubtful tokens filled in again by a decoder that sees all the others.

Non-autoregressive search of Higuchi et al. (Interspeech 2020): however long the sentence, the decoder makes at most
`mask_iterations` passes, each over all tokens of all utterances at once. It can replace tokens, not insert or delete them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speechtx.config.decode import DecodeConfig
from speechtx.model.decoder import Decoder
from speechtx.model.decoder_state import DecoderState
from speechtx.model.recognizer import Recognizer
from speechtx.search.greedy import BestPath, best_path
from speechtx.search.hypothesis import Hypothesis


@dataclass
class _Draft:
    """Sentences in the making: (B, U) each but lens (B,).

    Attributes:
        tokens: the blank where hidden, and in the padding.
        lens: tokens of each utterance.
        log_probs: with which each token was decided; 0 where hidden, and in the padding.
        hidden: tokens that are still to be filled in.
    """

    tokens: Tensor
    lens: Tensor
    log_probs: Tensor
    hidden: Tensor


def mask_ctc(model: Recognizer, enc_out: Tensor, enc_lens: Tensor, config: DecodeConfig) -> list[list[Hypothesis]]:
    """Recognises a batch of encoded utterances.

    Tokens of the greedy CTC output less probable than `mask_threshold` (in their best frame) are hidden. In each of at most
    `mask_iterations` rounds the decoder predicts all that are hidden, and those it is surest of stay: an even share of an
    utterance's (the paper leaves what remains of the division to the last round). The result of an utterance does not depend
    on the others of its batch.

    Args:
        model: in evaluation mode, with a decoder of type mask_ctc.
        enc_out: (B, S, D) encoder output.
        enc_lens: (B,) valid frames, each at least 1.
        config: threshold and number of rounds.

    Returns:
        For every utterance one hypothesis, whose score is the sum of its parts: `ctc`, of the tokens that CTC decided, and
        `att`, of those that the decoder did (None if it was not asked); none where the model's output is not finite.
    """
    decoder = model.decoder
    assert decoder is not None and not decoder.causal  # `check_method` said so
    with torch.inference_mode():
        log_probs = model.ctc_log_probs(enc_out)
        path = best_path(log_probs, enc_lens, blank_id=model.blank_id, sos_eos_id=model.sos_eos_id)
        draft = read_path(path, blank_id=model.blank_id, threshold=config.mask_threshold)
        ctc = draft.log_probs.sum(dim=1, dtype=torch.float64)
        asked = draft.hidden.any(dim=1)
        rows = asked.nonzero().squeeze(1)
        if len(rows):
            of_rows = log_probs[rows] if decoder.needs_ctc else None
            state = decoder.start(enc_out[rows], enc_lens[rows], beam=1, ctc_log_probs=of_rows)
            _fill_in(draft, rows, decoder, state, config.mask_iterations, never=[model.blank_id, model.sos_eos_id])
        att = draft.log_probs.sum(dim=1, dtype=torch.float64) - ctc
        return _hypotheses(draft, path, ctc, att, asked)


def read_path(path: BestPath, *, blank_id: int, threshold: float) -> _Draft:
    """The tokens of CTC's best path, those hidden whose probability in their best frame is below `threshold`."""
    lens = path.begins.sum(dim=1)
    size = int(lens.max())
    batch = len(lens)
    # Which token a frame belongs to, counted from 0; blanks go to a column of their own behind the others.
    index = (path.begins.cumsum(dim=1) - 1).masked_fill(path.ids == blank_id, size)
    tokens = path.ids.new_full((batch, size + 1), blank_id).scatter(1, index, path.ids)[:, :size]
    best = path.log_probs.new_full((batch, size + 1), -torch.inf).scatter_reduce(1, index, path.log_probs, "amax")[:, :size]
    valid = torch.arange(size, device=lens.device) < lens.unsqueeze(1)
    hidden = valid & (best.exp() < threshold)
    shown = valid & ~hidden
    return _Draft(tokens.masked_fill(~shown, blank_id), lens, best.masked_fill(~shown, 0.0), hidden)


def _fill_in(draft: _Draft, rows: Tensor, decoder: Decoder, state: DecoderState, rounds: int, *, never: list[int]) -> None:
    """Easy-first (Higuchi et al. 2020, section 3.2): decides what is hidden in `rows` of a draft, in place.

    Args:
        draft: of the whole batch.
        rows: (R,) utterances with something hidden.
        decoder: not causal.
        state: of the decoder, of these utterances.
        rounds: at most so many passes.
        never: ids that are no tokens of a sentence.
    """
    left = draft.hidden[rows].sum(dim=1)
    to_come = left.clamp(max=rounds)  # rounds, at least one token each
    while len(rows):
        size = int(draft.lens[rows].max())
        tokens, hidden = draft.tokens[rows, :size], draft.hidden[rows, :size]
        log_probs = F.log_softmax(decoder.score(tokens, draft.lens[rows], state).float(), dim=-1)
        best, ids = log_probs.index_fill(2, torch.tensor(never, device=rows.device), -torch.inf).max(dim=2)
        share = (left + to_come - 1) // to_come
        rank = best.masked_fill(~hidden, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        sure = hidden & (rank < share.unsqueeze(1))
        draft.tokens[rows, :size] = torch.where(sure, ids, tokens)
        draft.log_probs[rows, :size] += torch.where(sure, best, 0.0)
        draft.hidden[rows, :size] = hidden & ~sure
        left, to_come = left - share, to_come - 1
        remaining = to_come.nonzero().squeeze(1)
        if len(remaining) < len(rows):
            rows, left, to_come, state = rows[remaining], left[remaining], to_come[remaining], state.keep(remaining)


def _hypotheses(draft: _Draft, path: BestPath, ctc: Tensor, att: Tensor, asked: Tensor) -> list[list[Hypothesis]]:
    finite = path.log_probs.sum(dim=1).isfinite() & att.isfinite()
    columns = (draft.tokens, draft.lens, ctc, att, asked, finite)
    nbests: list[list[Hypothesis]] = []
    for tokens, length, of_ctc, of_att, decoded, good in zip(*(column.tolist() for column in columns), strict=True):
        hypothesis = Hypothesis(tokens=tuple(tokens[:length]), score=of_ctc + of_att, ctc=of_ctc, att=of_att if decoded else None)
        nbests.append([hypothesis] if good else [])
    return nbests
