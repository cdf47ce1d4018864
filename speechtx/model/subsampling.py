"""Front ends: one encoder frame for every four, six or eight feature frames."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtx.attention.linear import Linear
from speechtx.config.errors import ConfigError
from speechtx.config.schema import SubsamplingConfig
from speechtx.model.attention_2d import Attention2d
from speechtx.model.convolution import conv2d_innermost

LengthT = TypeVar("LengthT", int, Tensor)

CONVOLUTIONS = {4: ((3, 2), (3, 2)), 6: ((3, 2), (5, 3)), 8: ((3, 2), (3, 2), (3, 2))}  # factor -> (width, stride) of each


def subsampled_length(length: LengthT, factor: int) -> LengthT:
    """Frames left of `length` (an int or a LongTensor) after the convolutions of a factor, none of which pads.

    It holds for every type of front end: all of one factor have the same widths and strides in time.
    """
    for width, stride in CONVOLUTIONS[factor]:
        length = (length - width) // stride + 1
    return length.clamp(min=0) if isinstance(length, Tensor) else max(length, 0)


def min_frames(factor: int, outputs: int = 1) -> int:
    """The receptive field of so many subsampled frames, and the fewest frames that leave them: 7, 11 or 15 for one."""
    frames = outputs
    for width, stride in reversed(CONVOLUTIONS[factor]):
        frames = (frames - 1) * stride + width
    return frames


def make_subsampling(config: SubsamplingConfig, *, num_mel_bins: int, dim: int) -> Subsampling | TimeSubsampling:
    """The front end that a configuration describes."""
    if config.type == "conv1d":
        return TimeSubsampling(num_mel_bins=num_mel_bins, channels=config.channels, dim=dim, factor=config.factor)
    return Subsampling(
        num_mel_bins=num_mel_bins,
        channels=config.channels,
        dim=dim,
        factor=config.factor,
        separable=config.type == "separable",
        attention_2d=config.attention_2d.modules,
        attention_2d_channels=config.attention_2d.channels,
    )


class Subsampling(nn.Module):
    """3x3 convolutions of stride 2 in time and frequency with ReLU, then a linear layer (Dong et al. 2018, section 3.1).

    Factor 4 has two of them, factor 8 three; factor 6 has a 5x5 convolution of stride 3 as its second. The convolutions do not
    pad, so with factor 4 subsampled frame s depends on feature frames 4s .. 4s + 6 only, and the first `subsampled_length` frames
    of an utterance never see what lies behind its end. Between them and the linear layer may stand 2D-attention modules
    (`Attention2d`), through which a frame sees all others of its utterance.

    Nearly all of the work lies in the second convolution. `separable` splits it, and the third, into one that treats each
    channel by itself and a linear layer over the channels, as in Fast Conformer (Rekesh et al. 2023, section 2.1).

    PyTorch's default initialisation is kept here on purpose: each of the three layers shrinks the signal's power (by about 6,
    6 and 3), and together they undo the factor D of the power that the positions' sqrt(D) brings, so that the residual stream
    starts near unit variance beside positions of variance 1/2. More layers would shrink it further; see `_shrink_as_two`.

    Args:
        num_mel_bins: F.
        channels: of all convolutions.
        dim: D, the encoder's width.
        factor: feature frames from one subsampled frame to the next: 4, 6 or 8.
        separable: splits all convolutions but the first.
        attention_2d: how many 2D-attention modules.
        attention_2d_channels: c of each.

    Raises:
        ConfigError: too few mel bins for the factor.
    """

    def __init__(
        self,
        *,
        num_mel_bins: int,
        channels: int,
        dim: int,
        factor: int = 4,
        separable: bool = False,
        attention_2d: int = 0,
        attention_2d_channels: int = 32,
    ) -> None:
        super().__init__()
        if subsampled_length(num_mel_bins, factor) < 1:
            raise ConfigError(
                f"num_mel_bins {num_mel_bins} leaves nothing after the convolutions of factor {factor}; {min_frames(factor)} is "
                "the least"
            )
        self.factor = factor
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2)
        rest = CONVOLUTIONS[factor][1:]
        groups = channels if separable else 1
        for number, (width, stride) in enumerate(rest, start=2):
            self.add_module(f"conv{number}", nn.Conv2d(channels, channels, kernel_size=width, stride=stride, groups=groups))
        # Weights with channels innermost make the whole front end run in that layout, so that the linear layer needs no copy;
        # forward and backward then take 15 % less on a CPU at 64 channels, and the same at 32.
        for conv in self.convolutions():
            conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
        self.mix = nn.ModuleList(Linear(channels, channels) for _ in rest if separable)
        self.attention_2d = nn.ModuleList(Attention2d(maps=channels, channels=attention_2d_channels) for _ in range(attention_2d))
        self.linear = Linear(channels * subsampled_length(num_mel_bins, factor), dim)
        _shrink_as_two([*self.convolutions(), *self.mix, self.linear], relus=1 + len(rest))

    def convolutions(self) -> list[nn.Conv2d]:
        """Those that shorten, in order."""
        return [module for module in self.children() if isinstance(module, nn.Conv2d)]

    def forward(self, feats: Tensor, feat_lens: Tensor | None = None) -> Tensor:
        """Shortens a padded batch.

        Args:
            feats: (B, T, F).
            feat_lens: (B,), read by 2D-attention only; None if nothing is padded.

        Returns:
            (B, S, D) with S = subsampled_length(T), at least 1: a shorter batch is padded with zeros.
        """
        # One channel, said to be innermost: else the first convolution takes the other layout and the second one copies, a fifth
        # to two fifths of the front end's time. The convolutions' outputs are nobody else's, so ReLU may overwrite them.
        x = _long_enough(feats, self.factor).unsqueeze(3).permute(0, 3, 1, 2)
        for number, conv in enumerate(self.convolutions()):
            x = conv2d_innermost(x, conv)
            if self.mix and number:
                x = self.mix[number - 1](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = F.relu(x, inplace=True)
        if self.attention_2d:
            full = torch.full((len(x),), x.shape[2], device=x.device)
            lens = full if feat_lens is None else subsampled_length(feat_lens, self.factor)
            mask = torch.arange(x.shape[2], device=x.device) < lens.unsqueeze(1)
            for module in self.attention_2d:
                x = module(x, mask)
        return self.linear(x.permute(0, 2, 3, 1).flatten(2))  # no copy: channels are innermost already


class TimeSubsampling(nn.Module):
    """Convolutions over time with ReLU, whose first has the mel bins as its channels, then a linear layer.

    As in wav2letter and Whisper (Radford et al. 2022, section 2.2), here without padding, with the widths and strides in time
    that `Subsampling` has. Without a frequency axis to slide along it costs a fraction of the others: at 256 channels and 80 bins
    about a fortieth of the multiplications. It has no maps for 2D-attention.

    Args:
        num_mel_bins: F.
        channels: of all convolutions.
        dim: D, the encoder's width.
        factor: as in `Subsampling`.
    """

    def __init__(self, *, num_mel_bins: int, channels: int, dim: int, factor: int = 4) -> None:
        super().__init__()
        self.factor = factor
        self.convs = nn.ModuleList(
            nn.Conv1d(channels if number else num_mel_bins, channels, kernel_size=width, stride=stride)
            for number, (width, stride) in enumerate(CONVOLUTIONS[factor])
        )
        self.linear = Linear(channels, dim)
        _shrink_as_two([*self.convs, self.linear], relus=len(self.convs))

    def forward(self, feats: Tensor, feat_lens: Tensor | None = None) -> Tensor:
        """(B, T, F) -> (B, S, D), as `Subsampling`; `feat_lens` is not needed."""
        x = _long_enough(feats, self.factor).transpose(1, 2)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.linear(x.transpose(1, 2))


def _long_enough(feats: Tensor, factor: int) -> Tensor:
    """Pads (B, T, F) with zeros until one subsampled frame is left."""
    missing = min_frames(factor) - feats.shape[1]
    return F.pad(feats, (0, 0, 0, missing)) if missing > 0 else feats


@torch.no_grad()
def _shrink_as_two(layers: list[nn.Module], *, relus: int) -> None:
    """Makes PyTorch's initialisation shrink power as much as it does in two convolutions with ReLU and a linear layer.

    Uniform weights in +-1/sqrt(fan in) shrink power to a third, a ReLU to half. More layers get larger weights, all by the same
    number; three layers with two ReLUs are left as they are.
    """
    excess = 3.0 ** (len(layers) - 3) * 2.0 ** (relus - 2)
    if excess != 1.0:
        for layer in layers:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weight.mul_(math.sqrt(excess ** (1.0 / len(layers))))
