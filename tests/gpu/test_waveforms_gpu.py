"""Features of a padded batch on a CUDA device are those of the CPU."""

from __future__ import annotations

import pytest
import torch

from speechtx.config.schema import FbankConfig
from speechtx.frontend.fbank_torch import BatchFbank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("snip_edges", [True, False])
def test_features_do_not_depend_on_the_device(snip_edges: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([16000, 9001, 401])
    samples = 0.1 * torch.randn(3, 16000)
    config = FbankConfig(snip_edges=snip_edges)
    there = BatchFbank(config=config, device=torch.device("cuda"))(samples.cuda(), lengths.cuda()).cpu()
    fbank = BatchFbank(config=config, device=torch.device("cpu"))
    for one, other, length in zip(there, fbank(samples, lengths), lengths.tolist(), strict=True):
        frames = fbank.framing.num_frames(length)
        torch.testing.assert_close(one[:frames], other[:frames], atol=5e-3, rtol=0)
