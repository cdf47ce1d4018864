"""The whole model: encoder, CTC output and decoder, and the joint loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.linear import Linear
from speechtx.attention.site import AttentionPenalty
from speechtx.config.schema import ConsistencyConfig, ModelConfig
from speechtx.model.decoder import Decoder
from speechtx.model.encoder import Encoder
from speechtx.model.intermediate import IntermediateCtc
from speechtx.model.losses import (
    Losses,
    attention_loss,
    consistency_loss,
    ctc_loss,
    decoder_targets,
    draw_hidden,
    every_other,
    hidden_targets,
)
from speechtx.model.subsampling import Subsampling, TimeSubsampling


class Recognizer(nn.Module):
    """Speech-Transformer (Dong, Xu and Xu, ICASSP 2018) trained with CTC and attention.

    Args:
        config: shape, penalty and loss weights.
        num_mel_bins: F, bins of the features.
        vocab_size: V, tokens including <blank> (id 0) and <sos/eos> (id V - 1).
        frame_shift_ms: of the features; penalties in milliseconds need it.
        num_phones: of the lexicon, if `intermediate_ctc` has one.

    Raises:
        ConfigError: see `AttentionPenalty`.
    """

    def __init__(
        self, *, config: ModelConfig, num_mel_bins: int, vocab_size: int, frame_shift_ms: float = 10.0, num_phones: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.blank_id = 0
        self.sos_eos_id = vocab_size - 1
        dim = config.encoder.dim
        penalty = config.attention_penalty
        self.encoder = Encoder(
            config=config.encoder,
            penalty=penalty.encoder_self,
            num_mel_bins=num_mel_bins,
            backend=penalty.backend,
            frame_ms=config.encoder.subsampling.factor * frame_shift_ms,
        )
        self.decoder: Decoder | None = None
        if config.decoder.layers:
            self.decoder = Decoder(
                config=config.decoder,
                dim=dim,
                vocab_size=vocab_size,
                penalty=penalty.decoder_self,
                cross_penalty=penalty.cross,
                backend=penalty.backend,
            )
        self.ctc = Linear(dim, vocab_size)
        self.phones: Linear | None = None
        if config.intermediate_ctc is not None:
            if config.intermediate_ctc.lexicon is not None:
                self.phones = Linear(dim, num_phones + 1)
            self.encoder.intermediate = IntermediateCtc(
                config=config.intermediate_ctc,
                dim=dim,
                vocab_size=(self.phones or self.ctc).out_features,
                log_probs=self._phone_log_probs if self.phones else self.ctc_log_probs,
            )
        initialise(self)

    def at_step(self, step: int) -> None:
        """Tells penalties with a ramp how many training steps are done."""
        for module in self.modules():
            if isinstance(module, AttentionPenalty):
                module.at_step(step)

    @property
    def predicts_phones(self) -> bool:
        """Whether intermediate CTC predicts phones."""
        return self.phones is not None

    def encode(self, feats: Tensor, feat_lens: Tensor, *, phones: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """feats (B, T, F), feat_lens (B,) -> enc_out (B, S, D), enc_lens (B,); see `Encoder.forward`.

        `phones` gets log-probabilities (B, S, P + 1) of phones and, first, the blank, appended for each layer that predicts them.
        """
        return self.encoder(feats, feat_lens, predictions=phones if self.predicts_phones else None)

    def ctc_log_probs(self, enc_out: Tensor) -> Tensor:
        """enc_out (B, S, D) -> log-probabilities (B, S, V), float32."""
        return F.log_softmax(self.ctc(enc_out).float(), dim=-1)

    def ctc_outputs(self, enc_out: Tensor) -> list[Tensor]:
        """What CTC says as a list of one; of an `Ensemble`, one for each member."""
        return [self.ctc_log_probs(enc_out)]

    def _phone_log_probs(self, x: Tensor) -> Tensor:
        """x (B, S, D) -> log-probabilities of phones and, first, the blank (B, S, P + 1), float32."""
        assert self.phones is not None
        return F.log_softmax(self.phones(x).float(), dim=-1)

    def forward(
        self,
        feats: Tensor,
        feat_lens: Tensor,
        tokens: Tensor,
        token_lens: Tensor,
        *,
        phones: Tensor | None = None,
        phone_lens: Tensor | None = None,
        consistency: ConsistencyConfig | None = None,
    ) -> Losses:
        """The joint loss of a padded batch.

        Args:
            feats: (B, T, F) float, normalised features.
            feat_lens: (B,) int64, frames.
            tokens: (B, U) int64 without start or end of sentence; padding may be any value.
            token_lens: (B,) int64.
            phones: (B, P) int64 from 1 on; what intermediate CTC predicts in training if it has a lexicon, else not looked at.
            phone_lens: (B,) int64.
            consistency: the batch is two views of B/2 utterances, rows n and B/2 + n, whose outputs are to agree.
        """
        below: list[Tensor] | None = [] if self.training else None
        enc_out, enc_lens = self.encoder(feats, feat_lens, predictions=below)
        log_probs = self.ctc_log_probs(enc_out)
        ctc = ctc_loss(log_probs, enc_lens, tokens, token_lens, blank_id=self.blank_id)
        regularised = ctc
        if below and self.config.intermediate_ctc is not None:
            targets, target_lens = (tokens, token_lens)
            if self.phones is not None:
                assert phones is not None and phone_lens is not None
                targets, target_lens = phones, phone_lens
            losses = [ctc_loss(lower, enc_lens, targets, target_lens, blank_id=self.blank_id) for lower in below]
            regularised = torch.lerp(ctc, torch.stack(losses).mean(), self.config.intermediate_ctc.weight)
        if consistency is not None:
            regularised = regularised + consistency.weight * consistency_loss(log_probs, enc_lens)
        num_tokens = (token_lens + 1).sum()
        added: Tensor | float = 0.0  # to the decoder's loss
        if self.decoder is None:
            nothing = torch.zeros_like(ctc)
            return Losses(regularised, ctc.detach(), nothing.detach(), num_tokens, torch.zeros_like(num_tokens))
        if self.decoder.causal:
            tokens_in, targets = decoder_targets(tokens, token_lens, sos_eos_id=self.sos_eos_id)
            logits = self.decoder(tokens_in, token_lens + 1, enc_out, enc_lens, ctc_log_probs=log_probs)
            att, num_correct = attention_loss(logits, targets, label_smoothing=self.config.label_smoothing)
            if consistency is not None and consistency.decoder_weight:
                divergence = consistency_loss(logits.float().log_softmax(dim=-1), token_lens + 1, teachers_learn=True)
                added = consistency.decoder_weight * divergence
        else:
            num_tokens = token_lens.sum()  # no end of sentence is asked for
            att, num_correct = self._fill_in(self.decoder, tokens, token_lens, enc_out, enc_lens, log_probs)
        weight = self.config.ctc_weight
        return Losses(weight * regularised + (1.0 - weight) * (att + added), ctc.detach(), att.detach(), num_tokens, num_correct)

    def _fill_in(
        self, decoder: Decoder, tokens: Tensor, token_lens: Tensor, enc_out: Tensor, enc_lens: Tensor, log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and right answers of a decoder that is not causal, on hidden tokens (Higuchi et al. 2020, section 3.1).

        Training hides some at random, and the share that is right stands for all tokens. Evaluation hides each token once.
        """
        if tokens.shape[1] == 0:
            tokens = F.pad(tokens, (0, 1))  # of nothing but empty transcripts, one column of padding
        if self.training:
            passes: tuple[Tensor, ...] = (draw_hidden(token_lens, tokens.shape[1]),)
        else:
            passes = every_other(token_lens, tokens.shape[1])
        losses = []
        for hidden in passes:
            tokens_in, targets = hidden_targets(tokens, token_lens, hidden, blank_id=self.blank_id)
            logits = decoder(tokens_in, token_lens, enc_out, enc_lens, ctc_log_probs=log_probs)
            losses.append(attention_loss(logits, targets, label_smoothing=self.config.label_smoothing))
        att, num_correct = (torch.stack(parts).sum() for parts in zip(*losses, strict=True))
        if self.training:
            num_correct = num_correct * (token_lens.sum() / passes[0].sum().clamp(min=1))
        return att, num_correct


def initialise(model: nn.Module) -> None:
    """Starting weights for deep pre-norm stacks.

    Linear layers are Xavier uniform (Glorot and Bengio 2010) with zero biases; the fused query, key and value projections count
    as one layer of three times the width, which makes attention start flatter. Embeddings are normal with variance 1/D, so that
    they have unit variance after the sqrt(D) of the positions. The convolutional front end keeps its own (see `Subsampling`).
    """
    front_end = {m for part in model.modules() if isinstance(part, Subsampling | TimeSubsampling) for m in part.modules()}
    for module in model.modules():
        if module in front_end:
            continue
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
