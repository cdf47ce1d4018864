"""Several models that recognise together: the mean of their probabilities, for CTC and for every step of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from speechtx.config.errors import ConfigError
from speechtx.model.decoder import Decoder
from speechtx.model.decoder_state import DecoderState
from speechtx.model.recognizer import Recognizer


class Ensemble(nn.Module):
    """Looks like a `Recognizer` to a search: the members' encoder outputs lie side by side in D.

    Args:
        models: the members, over one vocabulary and with one subsampling, all with a decoder or all without.

    Raises:
        ConfigError: they do not fit together; members are named by their place, from 1.
    """

    def __init__(self, models: Sequence[Recognizer]) -> None:
        super().__init__()
        first = models[0]
        for number, model in enumerate(models[1:], start=2):
            if model.sos_eos_id != first.sos_eos_id:
                sizes = f"{first.sos_eos_id + 1} and {model.sos_eos_id + 1} tokens"
                raise ConfigError(f"models 1 and {number} of the ensemble have {sizes}; they must share a tokenizer")
            kinds = [_decoder_kind(first), _decoder_kind(model)]
            if kinds[0] != kinds[1]:
                raise ConfigError(
                    f"models 1 and {number} of the ensemble have different decoders ({kinds[0]} and {kinds[1]}); "
                    "they must be of one type, or there must be none"
                )
        self.members = nn.ModuleList(models)
        self.blank_id, self.sos_eos_id = first.blank_id, first.sos_eos_id
        self.widths = [model.config.encoder.dim for model in models]
        self.decoder = None if first.decoder is None else EnsembleDecoder(models, self.widths)

    @property
    def predicts_phones(self) -> bool:
        """Whether all members do."""
        return all(cast(Recognizer, member).predicts_phones for member in self.members)

    def encode(self, feats: Tensor, feat_lens: Tensor, *, phones: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """feats (B, T, F), feat_lens (B,) -> enc_out (B, S, sum of the members' D), enc_lens (B,); phones of all, in turn.

        Raises:
            ConfigError: the members shorten the audio differently.
        """
        outs: list[Tensor] = []
        lengths: list[Tensor] = []
        for number, member in enumerate(self.members, start=1):
            enc_out, enc_lens = cast(Recognizer, member).encode(feats, feat_lens, phones=phones)
            if outs and (enc_out.shape[1] != outs[0].shape[1] or not torch.equal(enc_lens, lengths[0])):
                raise ConfigError(
                    f"models 1 and {number} of the ensemble make {outs[0].shape[1]} and {enc_out.shape[1]} encoder frames of "
                    f"{feats.shape[1]}; they must have the same subsampling"
                )
            outs.append(enc_out)
            lengths.append(enc_lens)
        return torch.cat(outs, dim=-1), lengths[0]

    def ctc_log_probs(self, enc_out: Tensor) -> Tensor:
        """enc_out (B, S, sum of D) -> log-probabilities (B, S, V), float32: of the mean, which is good for checkpoints of one
        training; models that were trained apart see tokens in different frames."""
        return log_mean_prob(self.ctc_outputs(enc_out))

    def ctc_outputs(self, enc_out: Tensor) -> list[Tensor]:
        """enc_out (B, S, sum of D) -> log-probabilities (B, S, V) of each member, float32."""
        shares = enc_out.split(self.widths, dim=-1)
        return [cast(Recognizer, m).ctc_log_probs(share) for m, share in zip(self.members, shares, strict=True)]


@dataclass(frozen=True)
class EnsembleState:
    """The members' `DecoderState`s; never changed in place."""

    states: tuple[DecoderState, ...]

    def select(self, rows: Tensor) -> EnsembleState:
        """See `DecoderState.select`."""
        return EnsembleState(tuple(state.select(rows) for state in self.states))

    def keep(self, utterances: Tensor) -> EnsembleState:
        """See `DecoderState.keep`."""
        return EnsembleState(tuple(state.keep(utterances) for state in self.states))

    def watched(self) -> EnsembleState:
        """See `DecoderState.watched`."""
        return EnsembleState(tuple(state.watched() for state in self.states))

    @property
    def looked(self) -> Tensor | None:
        """(N, S) mean of the members' attention weights, see `DecoderState.looked`."""
        parts = [state.looked for state in self.states if state.looked is not None]
        return torch.stack(parts).mean(dim=0) if parts else None


def _decoder_kind(model: Recognizer) -> str:
    return "none" if model.decoder is None else model.decoder.config.type


class EnsembleDecoder(nn.Module):
    """The members' decoders, each on its share of the encoder output.

    A member whose cross-attention is penalised on an axis that CTC measures takes its own CTC output, not the mean: hence
    `needs_ctc` is False and `ctc_log_probs` of the callers is not read.
    """

    needs_ctc = False

    def __init__(self, models: Sequence[Recognizer], widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.models = list(models)  # registered by the Ensemble: a plain list here, or every weight would be there twice

    def _members(self, enc_out: Tensor) -> list[tuple[Decoder, Tensor, Tensor | None]]:
        """Each member's decoder, its encoder output, and its CTC log-probabilities if it asks for them."""
        found = []
        for model, share in zip(self.models, enc_out.split(self.widths, dim=-1), strict=True):
            decoder = cast(Decoder, model.decoder)
            found.append((decoder, share, model.ctc_log_probs(share) if decoder.needs_ctc else None))
        return found

    @property
    def causal(self) -> bool:
        """Whether the decoders predict the next token (`Decoder.causal`)."""
        return all(cast(Decoder, model.decoder).causal for model in self.models)

    def forward(
        self, tokens_in: Tensor, token_lens: Tensor, enc_out: Tensor, enc_lens: Tensor, *, ctc_log_probs: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing as `Decoder.forward`; returns log-probabilities (B, U, V), whose softmax they are."""
        parts = [
            decoder(tokens_in, token_lens, share, enc_lens, ctc_log_probs=ctc).float().log_softmax(dim=-1)
            for decoder, share, ctc in self._members(enc_out)
        ]
        return log_mean_prob(parts)

    def score(self, tokens_in: Tensor, token_lens: Tensor, state: EnsembleState) -> Tensor:
        """As `Decoder.score`; returns log-probabilities (B, U, V), whose softmax they are."""
        parts = zip(self.models, state.states, strict=True)
        logits = [cast(Decoder, model.decoder).score(tokens_in, token_lens, own) for model, own in parts]
        return log_mean_prob([part.float().log_softmax(dim=-1) for part in logits])

    def start(self, enc_out: Tensor, enc_lens: Tensor, *, beam: int, ctc_log_probs: Tensor | None = None) -> EnsembleState:
        """See `Decoder.start`."""
        members = self._members(enc_out)
        return EnsembleState(tuple(d.start(share, enc_lens, beam=beam, ctc_log_probs=ctc) for d, share, ctc in members))

    def step(self, tokens: Tensor, state: EnsembleState) -> tuple[Tensor, EnsembleState]:
        """See `Decoder.step`: (N,) tokens to log-probabilities (N, V) float32 and the new state."""
        found = [cast(Decoder, model.decoder).step(tokens, own) for model, own in zip(self.models, state.states, strict=True)]
        return log_mean_prob([log_probs for log_probs, _ in found]), EnsembleState(tuple(own for _, own in found))


def log_mean_prob(log_probs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of probabilities, given as logarithms of one shape; equal ones come back unchanged."""
    stacked = torch.stack(list(log_probs))
    greatest = stacked.amax(dim=0)
    finite = greatest.clamp(min=torch.finfo(greatest.dtype).min)  # -inf in all members stays -inf, instead of -inf minus -inf
    return finite + (stacked - finite).exp().mean(dim=0).log()
