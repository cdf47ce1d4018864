"""Linear layers give the same in inference mode, where weights are packed, and follow changes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speechtx.attention.linear import LARGE_WEIGHT, Linear, PackedLinear
from speechtx.config.schema import DecoderConfig
from speechtx.model.decoder import Decoder

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


def large() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(256, LARGE_WEIGHT // 256)


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (10,), (3, 7), (200,)])
def test_a_packed_layer_computes_what_the_layer_does(rows: tuple[int, ...]) -> None:
    layer, x = large(), torch.randn(*rows, 256)
    with torch.inference_mode():
        packed = PackedLinear.of(layer)
        assert packed.packed is not None
        assert torch.allclose(packed(x), layer(x), atol=1e-5)
        assert packed(x).shape == (*rows, LARGE_WEIGHT // 256)


@needs_onednn
def test_a_weight_is_packed_once_and_again_when_it_has_changed() -> None:
    layer, x = large(), torch.randn(4, 256)
    with torch.inference_mode():
        first, second = PackedLinear.of(layer), PackedLinear.of(layer)
    assert first.packed is second.packed
    with torch.no_grad():
        layer.weight.mul_(2.0)
    other = large()
    for change in (lambda: None, lambda: layer.load_state_dict({k: v + 1.0 for k, v in other.state_dict().items()})):
        change()
        with torch.inference_mode():
            assert torch.allclose(PackedLinear.of(layer)(x), F.linear(x, layer.weight, layer.bias), atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(2,), (40, 15), (4, 0, 9)])
def test_a_layer_gives_the_same_with_and_without_gradients(rows: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(3)
    layer, x = Linear(256, LARGE_WEIGHT // 256, bias=bias), torch.randn(*rows, 256)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        found = layer(x)
        turned = layer(x.transpose(0, -2)).transpose(0, -2)  # (40, 15): rows are not next to one another
        assert PackedLinear.of(layer).packed is not None
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(turned, expected, atol=1e-5)


@needs_onednn
def test_a_layer_that_learns_between_two_inferences_is_packed_anew() -> None:
    torch.manual_seed(4)
    layer, x = Linear(256, LARGE_WEIGHT // 256), torch.randn(60, 256)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(x).square().mean().backward()
        optimizer.step()
        with torch.inference_mode():
            found = layer(x)
        assert torch.allclose(found, F.linear(x, layer.weight, layer.bias), atol=1e-5)


@needs_onednn
def test_a_weight_whose_numbers_are_exchanged_twice_is_not_taken_for_the_first_one() -> None:
    layer, x = Linear(256, LARGE_WEIGHT // 256), torch.randn(3, 256)
    for _ in range(6):  # memory that is given back is soon given out again
        layer.weight.data = torch.randn(LARGE_WEIGHT // 256, 256)
        layer.weight.data = torch.randn(LARGE_WEIGHT // 256, 256)
        with torch.inference_mode():
            found = layer(x)
        assert torch.allclose(found, F.linear(x, layer.weight, layer.bias), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_cannot_be_packed_is_left_as_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(3, 256)
    assert PackedLinear.of(large()).packed is None  # gradients may be wanted
    with torch.inference_mode():
        assert PackedLinear.of(nn.Linear(256, LARGE_WEIGHT // 256 - 1)).packed is None
        layer = large().to(dtype)
        assert PackedLinear.of(layer).packed is None
        assert torch.equal(PackedLinear.of(layer)(x.to(dtype)), layer(x.to(dtype)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert PackedLinear.of(large()).packed is None


@needs_onednn
def test_steps_of_a_large_decoder_are_those_of_its_forward() -> None:
    torch.manual_seed(2)
    decoder = Decoder(config=DecoderConfig(layers=2, heads=4, ff_dim=1024), dim=256, vocab_size=30).eval()
    enc_out, enc_lens = torch.randn(2, 20, 256), torch.tensor([20, 13])
    tokens = torch.randint(1, 29, (2, 6))
    tokens[:, 0] = 29
    with torch.inference_mode():
        state = decoder.start(enc_out, enc_lens, beam=1)
        assert state.steps[0].ff.inner.packed is not None and state.steps[0].own.qkv.packed is not None
        steps = []
        for column in tokens.unbind(1):
            log_probs, state = decoder.step(column, state)
            steps.append(log_probs)
        whole = F.log_softmax(decoder(tokens, torch.tensor([6, 6]), enc_out, enc_lens), dim=-1)
    assert torch.allclose(torch.stack(steps, 1), whole, atol=1e-4)
