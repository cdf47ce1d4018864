"""The Conformer layer of inference mode is the layer of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from speechtx.config.penalty import PenaltyConfig
from speechtx.config.schema import EncoderConfig, SubsamplingConfig
from speechtx.model import encoder as encoder_module
from speechtx.model.encoder import Encoder

VARIANTS = [{}, {"position": "rotary"}, {"position": "relative"}, {"attention_weights": "relu"}, {"norm": "batch"}]


def random_encoder(**options: str) -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(
        type="conformer",
        layers=2,
        dim=16,
        heads=4,
        ff_dim=32,
        conv_kernel=5,
        subsampling=SubsamplingConfig(channels=4),
        **options,
    )
    made = Encoder(config=config, penalty=PenaltyConfig(shape="log"), num_mel_bins=20)
    with torch.no_grad():
        for parameter in made.parameters():  # no norm stays the identity, no bias zero
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """One entry for each layer that inference computes."""
    found: list[object] = []
    infer = encoder_module.infer
    monkeypatch.setattr(encoder_module, "infer", lambda *args, **named: (found.append(args), infer(*args, **named))[1])
    return found


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("lens", [[60], [45, 60, 12]])
def test_decoding_gets_the_frames_that_training_would_give(options: dict[str, str], lens: list[int], calls: list[object]) -> None:
    encoder = random_encoder(**options)
    feats = torch.randn(len(lens), 66, 20)  # the longest is padded too
    with torch.no_grad():
        plain, enc_lens = encoder(feats, torch.tensor(lens))
    assert not calls
    with torch.inference_mode():
        fast, _ = encoder(feats, torch.tensor(lens))
    assert len(calls) == (0 if "norm" in options else 2)
    for n, length in enumerate(enc_lens.tolist()):
        torch.testing.assert_close(fast[n, :length], plain[n, :length], atol=1e-5, rtol=0)


def test_a_layer_leaves_its_input_alone() -> None:
    encoder = random_encoder()
    x = torch.randn(1, 9, 16)
    before = x.clone()
    with torch.inference_mode():
        mask = torch.ones(1, 9, dtype=torch.bool)
        encoder.layers[0](x, bias=encoder.biases(x, mask)[0], mask=mask)
    assert torch.equal(x, before)


def test_inference_under_autocast_stays_near_float32() -> None:
    encoder, feats = random_encoder(), torch.randn(1, 60, 20)
    with torch.inference_mode():
        precise, _ = encoder(feats, torch.tensor([60]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, _ = encoder(feats, torch.tensor([60]))
    assert (rounded.float() - precise).abs().max() < 0.1


def test_a_compiled_layer_stays_in_one_piece() -> None:
    encoder, x = random_encoder(), torch.randn(1, 9, 16)
    mask = torch.ones(1, 9, dtype=torch.bool)
    arguments = {"bias": encoder.biases(x, mask)[0], "mask": mask}
    compiled = torch.compile(encoder.layers[0].forward, backend="eager", fullgraph=True)  # an error where it is cut
    torch.testing.assert_close(compiled(x, **arguments), encoder.layers[0](x, **arguments))
