"""CTC greedy decoding: the best label of every frame, repeats collapsed, blanks dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from speechtx.search.hypothesis import Hypothesis


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
    batch, frames, _ = ctc_log_probs.shape
    allowed = ctc_log_probs.index_fill(2, torch.tensor([sos_eos_id], device=ctc_log_probs.device), -torch.inf)
    best, ids = allowed.max(dim=2)  # (B, S) each
    valid = torch.arange(frames, device=ids.device) < enc_lens.to(ids.device).unsqueeze(1)
    previous = torch.cat([ids.new_full((batch, 1), blank_id), ids[:, :-1]], dim=1)
    keep = valid & (ids != blank_id) & (ids != previous)
    scores = torch.where(valid, best, 0.0).sum(dim=1, dtype=torch.float64).tolist()
    counts = keep.sum(dim=1).tolist()
    tokens = ids[keep].split(counts)  # one flat transfer, then one slice an utterance
    return [Hypothesis(tokens=tuple(t.tolist()), score=s, ctc=s) for t, s in zip(tokens, scores, strict=True)]
