"""The line on which tokens and frames both lie, so that cross-attention can be charged for the distance between them.

Queries (tokens) and keys (frames) of cross-attention count different things; |i - j| means nothing there. An axis gives frame j
a coordinate y_j and query i, the one that predicts token i (counted from 0), a coordinate x_i:

    axis         x_i                                                       y_j                                      unit
    uniform      (i + 1/2) / U                                             (j + 1/2) / S                            utterance
    rate         r (i + 1/2) - 1/2                                         j                                        frame
    ctc_count    i + 1/2                                                   tokens CTC emitted up to j's middle      token
    ctc_prefix   mean frame where CTC first emits token i - 1, plus r / 2  j                                        frame
    monotonic    sum over k <= i of softplus(w . h_k + b)                  j                                        frame
    lower_layer  sum over j of j a_ij of the layer below                   j                                        frame

x is clipped to the frames' range: end of sentence, which has no audio of its own, is not charged for that. Nothing but
`monotonic` is learned, and no gradient flows through the others.

Search walks one token at a time and training all at once, by the same code: `advance` takes a state and any number of tokens.
What a query may know is therefore the same in both: the audio and the tokens before it. Only `uniform` needs the number of
tokens U; training makes the true one uncertain, and evaluation estimates it, in search and in teacher forcing alike.

A new axis is one subclass of `Axis` and one entry of `AXES`. docs/attention_penalty.md compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.config.penalty import CrossPenaltyConfig
from speechtx.model.ctc_forward import CtcForward, CtcState

_CREEP = 1.0e-3  # tokens a frame: keeps the order of frames between two emissions, and adds a token in 40 s at 40 ms a frame
_SYLLABLE = 5.0  # encoder frames: 0.2 s at 40 ms a frame, where `monotonic` starts if nothing better is known


@dataclass(frozen=True)
class Audio:
    """What an axis may know of B utterances.

    Attributes:
        lens: (B,) valid frames, each at least 1.
        size: S, frames with padding.
        log_probs: (B, S, V) CTC log-probabilities, detached; None where no axis asks for them.
        blank_id: the CTC blank.
    """

    lens: Tensor
    size: int
    log_probs: Tensor | None = None
    blank_id: int = 0


@dataclass(frozen=True)
class AxisState:
    """Where N = B * beam hypotheses stand; never changed in place.

    Attributes:
        position: tokens fed so far.
        y: (B, S) coordinates of the frames, finite in the padding as well.
        ends: the least and the greatest y of each utterance, (B, 1) each.
        step: (B, 1) distance between two tokens that are evenly spaced, for the axes that use it.
        forward, prefix: CTC forward variables of each hypothesis: ctc_prefix.
        reached: per layer that pays (N,), the last query's coordinate before clipping: monotonic.
        ahead: (B, 1 or H, K, S) biases of the positions around this one, kept for the next steps: even axes.
    """

    position: int
    y: Tensor
    ends: tuple[Tensor, Tensor]
    step: Tensor
    forward: CtcForward | None = None
    prefix: CtcState | None = None
    reached: tuple[Tensor, ...] = ()
    ahead: Tensor | None = None

    def select(self, rows: Tensor) -> AxisState:
        """The state with its hypotheses reordered within their utterances, rows (N,) int64."""
        prefix = None if self.prefix is None else self.prefix.select(rows)
        return replace(self, prefix=prefix, reached=tuple(part[rows] for part in self.reached))

    def keep(self, utterances: Tensor) -> AxisState:
        """The state of some utterances (int64 indices into B), each with all its hypotheses."""
        batch = len(self.y)
        kept = replace(
            self,
            y=self.y[utterances],
            ends=(self.ends[0][utterances], self.ends[1][utterances]),
            step=self.step[utterances],
            reached=tuple(part.unflatten(0, (batch, -1))[utterances].flatten() for part in self.reached),
            ahead=None if self.ahead is None else self.ahead[utterances],
        )
        if self.forward is None or self.prefix is None:
            return kept
        return replace(kept, forward=self.forward.keep(utterances), prefix=self.prefix.select(self.forward.rows_of(utterances)))

    def clip(self, x: Tensor) -> Tensor:
        """x (B, Q), no further than the first and the last frame of its utterance."""
        return torch.minimum(torch.maximum(x, self.ends[0]), self.ends[1])


def emissions(audio: Audio) -> Tensor:
    """How many tokens CTC begins in each frame: a_t = sum over k != blank of p_t(k) (1 - p_{t-1}(k)), (B, S), 0 in the padding.

    Their sum estimates the number of tokens, up to repeated ones without a blank between; no alignment and no text is needed.
    """
    assert audio.log_probs is not None  # `Axis.needs_ctc` said so
    p = audio.log_probs.detach().exp()
    p[..., audio.blank_id] = 0.0
    begun = p.sum(dim=-1)
    begun[:, 1:] -= (p[:, 1:] * p[:, :-1]).sum(dim=-1)
    return begun.masked_fill(~_valid(audio), 0.0)


class Axis(nn.Module):
    """An axis whose frames lie at their index and whose tokens are evenly spaced; the base of all.

    Args:
        config: of the axis; its `round_centre` rounds to whole frames or half tokens, which low precision holds exactly.
        num_layers: of the decoder.
        dim: D, the decoder's width.
    """

    even = True  # whether x depends on the position alone, not on tokens or attention
    shift = 0.0  # of evenly spaced x
    by_layer = False  # whether the coordinates of queries differ from layer to layer, by `at_layer`; else `advance` has them
    uses_weights = False  # whether `at_layer` wants the attention weights of the layer below

    def __init__(self, *, config: CrossPenaltyConfig, num_layers: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.chosen = config.selected_layers(num_layers)  # layers that pay

    def needs_ctc(self) -> bool:
        """Whether `start` wants the CTC log-probabilities, in training or in evaluation as the module stands."""
        return False

    def frames(self, audio: Audio) -> Tensor:
        """y (B, S)."""
        return _index(audio).expand(len(audio.lens), -1)

    def step(self, audio: Audio, token_lens: Tensor | None) -> Tensor:
        """(B, 1) distance between two tokens, for axes whose tokens are evenly spaced."""
        return torch.ones_like(audio.lens, dtype=torch.float32).unsqueeze(1)

    def start(self, audio: Audio, *, beam: int = 1, token_lens: Tensor | None = None) -> AxisState:
        """The state before the first token of `beam` hypotheses an utterance.

        Args:
            audio: what is known of the utterances.
            beam: hypotheses an utterance.
            token_lens: (B,) true number of tokens, without end of sentence; read by `uniform` in training only.
        """
        with torch.no_grad():
            y = self.frames(audio)
            valid = _valid(audio)
            low = y.masked_fill(~valid, math.inf).amin(dim=1, keepdim=True)
            high = y.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)
            return AxisState(position=0, y=y, ends=(low, high), step=self.step(audio, token_lens))

    def advance(self, tokens: Tensor, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """Feeds L tokens to each hypothesis.

        Args:
            tokens: (N, L) int64, the decoder's input; <sos/eos> at position 0.
            state: of `start`, or of the call before.

        Returns:
            x (B, N / B * L) of the queries at these tokens, as they lie in memory, or None if every layer has its own; and the
            new state.
        """
        position = torch.arange(state.position, state.position + tokens.shape[1], device=tokens.device)
        x = self.evenly(position, state).unsqueeze(1).expand(-1, tokens.shape[0] // len(state.y), -1)
        return x.flatten(1), replace(state, position=state.position + tokens.shape[1])

    def evenly(self, position: Tensor, state: AxisState) -> Tensor:
        """x (B, L) of the queries at these positions (L,), whatever the tokens; for axes that are `even`."""
        return self._settle((position + 0.5) * state.step - self.shift, state)

    def at_layer(self, layer: int, query: Tensor, below: Tensor | None, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """The coordinates of queries in one layer, called after `advance`, layer by layer; for `by_layer` axes.

        Args:
            layer: counted from 0.
            query: (B, Q, D), the normed input of the layer's cross-attention.
            below: (B, Q, S) weights of the layer below, where `uses_weights`; None in the first layer.
            state: with the position that `advance` left.

        Returns:
            x (B, Q), or None if nothing is charged in this layer; and the new state.
        """
        raise NotImplementedError(f"the queries of {type(self).__name__} have the same coordinates in all layers")

    def _settle(self, x: Tensor, state: AxisState) -> Tensor:
        x = torch.floor(x + 0.5) if self.config.round_centre else x
        return state.clip(x)


class Uniform(Axis):
    """Both as a share of their length: the diagonal. Wide or annealed only: a wrong U shifts everything behind it."""

    def needs_ctc(self) -> bool:
        """Evaluation with `length: ctc` estimates U."""
        return not self.training and self.config.length == "ctc"

    def frames(self, audio: Audio) -> Tensor:
        """(j + 1/2) / S, S without padding."""
        return (_index(audio) + 0.5) / audio.lens.unsqueeze(1)

    def step(self, audio: Audio, token_lens: Tensor | None) -> Tensor:
        """1 / U, U at least one token: the true one made uncertain in training, an estimate in evaluation."""
        if self.training:
            if token_lens is None:
                raise ValueError("axis uniform needs the number of tokens in training")
            count = token_lens * (1.0 + self.config.length_noise * torch.randn(token_lens.shape, device=token_lens.device))
        elif self.config.length == "ctc":
            count = emissions(audio).sum(dim=1)
        else:
            count = audio.lens / _required(self.config)
        return 1.0 / count.unsqueeze(1).clamp(min=1.0)


class Rate(Axis):
    """Every token takes `rate` frames. The error grows with i: never narrow."""

    shift = 0.5  # frame j, counted from 0, has its middle at j + 1/2

    def step(self, audio: Audio, token_lens: Tensor | None) -> Tensor:
        """r"""
        return super().step(audio, token_lens) * _required(self.config)


class CtcCount(Axis):
    """Frames by the number of tokens CTC has emitted up to the middle of the frame.

    Where CTC is sure, the frame that emits token i lies at i + 1/2, exactly at query i; those before it, back to the emission of
    token i - 1, at i, those after it at i + 1. Frames creep on by a thousandth of a token each, so that silence has an order.
    """

    def needs_ctc(self) -> bool:
        """Always."""
        return True

    def frames(self, audio: Audio) -> Tensor:
        """A_{j-1} + a_j / 2 with A the running sum of `emissions`, and the creep; rounded to half tokens by `round_centre`."""
        begun = emissions(audio)
        y = begun.cumsum(dim=1) - 0.5 * begun + _CREEP * (_index(audio) + 0.5)
        return torch.floor(2.0 * y + 0.5) / 2.0 if self.config.round_centre else y

    def _settle(self, x: Tensor, state: AxisState) -> Tensor:
        return state.clip(x)  # i + 1/2 are half tokens as they are


class CtcPrefix(Axis):
    """Tokens by the mean frame where CTC emits the token before for the first time, given the prefix, plus half a token.

    From the forward variables of the prefix alone: the backward variables see the future, which search does not have. Half a
    token is half the frames per token that CTC finds in the utterance; the first query has no token before it, only that half.
    """

    even = False

    def needs_ctc(self) -> bool:
        """Always."""
        return True

    def step(self, audio: Audio, token_lens: Tensor | None) -> Tensor:
        """r: frames per token of the utterance, at most all of them."""
        return (audio.lens / emissions(audio).sum(dim=1).clamp(min=1.0)).unsqueeze(1)

    def start(self, audio: Audio, *, beam: int = 1, token_lens: Tensor | None = None) -> AxisState:
        """See `Axis.start`."""
        assert audio.log_probs is not None
        with torch.no_grad():
            forward = CtcForward(log_probs=audio.log_probs.detach(), enc_lens=audio.lens, blank_id=audio.blank_id, beam=beam)
            return replace(super().start(audio), forward=forward, prefix=forward.start())

    def advance(self, tokens: Tensor, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """See `Axis.advance`."""
        forward, prefix, means = state.forward, state.prefix, []
        assert forward is not None and prefix is not None
        with torch.no_grad():
            for position, labels in enumerate(tokens.unbind(1), start=state.position):
                if position == 0:  # <sos/eos> is nothing that CTC emits
                    means.append(torch.zeros_like(prefix.log_b[:, 0]))
                    continue
                means.append(forward.first_emission(prefix, labels)[1])
                prefix = forward.extend(prefix, labels)
            x = torch.stack(means, dim=1).float().view(len(state.y), -1) + 0.5 * state.step
        return self._settle(x, state), replace(state, position=state.position + tokens.shape[1], prefix=prefix)


class Monotonic(Axis):
    """Every layer walks forward by learned steps, from the (causal) input of its cross-attention; no CTC is needed.

    Steps are local, so what is learned on short utterances holds in long ones (compare Graves 2013, section 5.1: the windows of
    handwriting synthesis). One step is `rate` frames at the start of training.
    """

    even = False
    by_layer = True

    def __init__(self, *, config: CrossPenaltyConfig, num_layers: int, dim: int) -> None:
        super().__init__(config=config, num_layers=num_layers, dim=dim)
        first = config.rate or _SYLLABLE
        # 1-D, one a layer that pays: weight decay would pull the step towards softplus(0)
        self.weight = nn.ParameterList(torch.zeros(dim) for _ in self.chosen)
        self.bias = nn.Parameter(torch.full((len(self.chosen),), first + math.log(-math.expm1(-first))))  # softplus^-1(first)

    def start(self, audio: Audio, *, beam: int = 1, token_lens: Tensor | None = None) -> AxisState:
        """See `Axis.start`."""
        nowhere = torch.zeros(len(audio.lens) * beam, device=audio.lens.device)
        return replace(super().start(audio), reached=(nowhere,) * len(self.chosen))

    def advance(self, tokens: Tensor, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """See `Axis.advance`."""
        return None, replace(state, position=state.position + tokens.shape[1])

    def at_layer(self, layer: int, query: Tensor, below: Tensor | None, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """See `Axis.at_layer`."""
        batch, count, _ = query.shape
        index = self.chosen.index(layer)
        before = state.reached[index]
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        # a product and a sum, which autocast leaves in full precision
        steps = F.softplus((query * self.weight[index]).sum(dim=-1) + self.bias[index])
        x = before.unsqueeze(1) + steps.view(len(before), -1).cumsum(dim=1)  # (N, L)
        reached = (*state.reached[:index], x[:, -1], *state.reached[index + 1 :])
        return state.clip(x.view(batch, count)), replace(state, reached=reached)


class LowerLayer(Axis):
    """Where the same query looked in the layer below, on average over the heads that pay; the first layer is not charged."""

    even = False
    by_layer = True
    uses_weights = True

    def advance(self, tokens: Tensor, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """See `Axis.advance`."""
        return None, replace(state, position=state.position + tokens.shape[1])

    def at_layer(self, layer: int, query: Tensor, below: Tensor | None, state: AxisState) -> tuple[Tensor | None, AxisState]:
        """See `Axis.at_layer`."""
        if below is None:
            return None, state
        below = below.detach()
        return self._settle((below * state.y.to(below.dtype).unsqueeze(1)).sum(dim=-1), state), state


AXES: dict[str, type[Axis]] = {
    "uniform": Uniform,
    "rate": Rate,
    "ctc_count": CtcCount,
    "ctc_prefix": CtcPrefix,
    "monotonic": Monotonic,
    "lower_layer": LowerLayer,
}


def _index(audio: Audio) -> Tensor:
    """(1, S) frames' indices."""
    return torch.arange(audio.size, dtype=torch.float32, device=audio.lens.device).unsqueeze(0)


def _valid(audio: Audio) -> Tensor:
    """(B, S) True where there is data."""
    return _index(audio) < audio.lens.unsqueeze(1)


def _required(config: CrossPenaltyConfig) -> float:
    assert config.rate is not None  # the schema requires it
    return config.rate
