"""Speech-Transformer's 2D-attention: attention along time and along frequency of convolutional feature maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechtx.attention.kernels import attend, padding_bias


class Attention2d(nn.Module):
    """One 2D-attention module (Dong, Xu and Xu, ICASSP 2018, section 3.2) on n feature maps of S frames by F bins.

    Queries, keys and values are 3x3 convolutions to c maps each. Every map is a head twice: in time, where a frame's F values
    are the vector that is compared with the other frames', and, transposed, in frequency, where a bin's values over all frames
    are. The 2c maps that come out are concatenated and a 3x3 convolution takes them back to n maps.

    The residual connection around each module and the absence of a norm are this toolkit's choice. The convolutions keep
    PyTorch's initialisation, which makes a module start as a small correction.

    Padding never reaches data: frames behind an utterance's end are zero before both convolutions, as if the batch ended there,
    masked in time, and zero in the products over time of the attention in frequency, whose 1 / sqrt(length) counts the
    utterance's own frames.

    Args:
        maps: n, feature maps in and out.
        channels: c, heads in time and heads in frequency.
    """

    def __init__(self, *, maps: int, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(maps, 3 * channels, kernel_size=3, padding=1)
        self.out = nn.Conv2d(2 * channels, maps, kernel_size=3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, n, S, F), mask (B, S) True where there is data -> (B, n, S, F), rows of padding arbitrary."""
        padding = ~mask[:, None, :, None]
        q, k, v = self.qkv(x.masked_fill(padding, 0.0)).masked_fill(padding, 0.0).chunk(3, dim=1)
        in_time = attend(q, k, v, bias=padding_bias(mask, dtype=q.dtype))
        # attend divides by sqrt(S), of the batch; the utterance's own length must decide.
        precise = torch.promote_types(q.dtype, torch.float32)
        own_length = (mask.shape[1] / mask.sum(dim=1).clamp(min=1).to(precise)).sqrt().to(q.dtype)[:, None, None, None]
        in_frequency = attend((q * own_length).transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)).transpose(2, 3)
        return x + self.out(torch.cat((in_time, in_frequency), dim=1).masked_fill(padding, 0.0))
