"""CTC inside the encoder: losses for the layers below the last one, which may also learn from what those predict."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from speechtx.attention.linear import Linear
from speechtx.config.schema import IntermediateCtcConfig


class IntermediateCtc(nn.Module):
    """Intermediate CTC (Lee and Watanabe, ICASSP 2021) and self-conditioning (Nozaki and Komatsu, Interspeech 2021).

    Both papers use one CTC output for all layers; phones have one of their own. Self-conditioning adds a linear map of an
    intermediate prediction to the frames that the next layer sees; it is part of the model, so it is computed in recognition too.

    Args:
        config: which layers, and whether later ones are conditioned.
        dim: D.
        vocab_size: V, tokens or phones, and the blank.
        log_probs: the CTC output, (B, S, D) -> (B, S, V); its weights belong to the caller.
    """

    def __init__(
        self, *, config: IntermediateCtcConfig, dim: int, vocab_size: int, log_probs: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.layers = frozenset(config.layers)
        self.log_probs = log_probs
        self.condition = Linear(vocab_size, dim) if config.condition else None

    def forward(self, x: Tensor, norm: nn.Module, predictions: list[Tensor] | None) -> Tensor:
        """What the next layer sees (B, S, D).

        Args:
            x: (B, S, D), frames between two layers.
            norm: the encoder's last, whose output is what the CTC output expects.
            predictions: gets the log-probabilities (B, S, V) appended; None if nobody else wants them.
        """
        if predictions is None and self.condition is None:
            return x
        log_probs = self.log_probs(norm(x))
        if predictions is not None:
            predictions.append(log_probs)
        return x if self.condition is None else x + self.condition(log_probs.exp().to(x.dtype))
