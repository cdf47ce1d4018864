"""CTC greedy decoding: the best label of every frame, repeats collapsed, blanks dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speechtx.search.hypothesis import Hypothesis


@dataclass(frozen=True)
class BestPath:
    """What CTC finds likeliest in each frame, (B, S) each.

    Attributes:
        ids: label of the frame; the blank in the padding.
        log_probs: of that label; 0 in the padding.
        begins: where a run of a label other than the blank begins, which is where a token is emitted.
    """

    ids: Tensor
    log_probs: Tensor
    begins: Tensor


def ctc_greedy(ctc_log_probs: Tensor, enc_lens: Tensor, *, blank_id: int, sos_eos_id: int) -> list[Hypothesis]:
    """Decodes a batch by best path (Graves et al. 2006, section 3.2).

    Args:
        ctc_log_probs: (B, S, V) log-probabilities.
        enc_lens: (B,) valid frames; what lies beyond has no influence.
        blank_id: the CTC blank.
        sos_eos_id: never emitted by CTC; a frame where it would win takes the next best label.

    Returns:
        One hypothesis an utterance; its score is the log-probability of the best path.
    """
    path = best_path(ctc_log_probs, enc_lens, blank_id=blank_id, sos_eos_id=sos_eos_id)
    scores = path.log_probs.sum(dim=1, dtype=torch.float64).tolist()
    counts = path.begins.sum(dim=1).tolist()
    tokens = path.ids[path.begins].split(counts)  # one flat transfer, then one slice an utterance
    return [Hypothesis(tokens=tuple(t.tolist()), score=s, ctc=s) for t, s in zip(tokens, scores, strict=True)]


def best_path(ctc_log_probs: Tensor, enc_lens: Tensor, *, blank_id: int, sos_eos_id: int) -> BestPath:
    """The best label of every frame; arguments as in `ctc_greedy`."""
    batch, frames, _ = ctc_log_probs.shape
    allowed = ctc_log_probs.index_fill(2, torch.tensor([sos_eos_id], device=ctc_log_probs.device), -torch.inf)
    best, ids = allowed.max(dim=2)  # (B, S) each
    valid = torch.arange(frames, device=ids.device) < enc_lens.to(ids.device).unsqueeze(1)
    ids = ids.masked_fill(~valid, blank_id)
    previous = torch.cat([ids.new_full((batch, 1), blank_id), ids[:, :-1]], dim=1)
    return BestPath(ids=ids, log_probs=torch.where(valid, best, 0.0), begins=(ids != blank_id) & (ids != previous))
