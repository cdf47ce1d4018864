from __future__ import annotations

import pytest
import torch
from torch import Tensor

from speechtx.config.penalty import AttentionPenaltyConfig, CrossPenaltyConfig, PenaltyConfig
from speechtx.config.schema import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    SubsamplingConfig,
)
from speechtx.model.recognizer import Recognizer

KINDS = ["transformer", "conformer"]


def make_config(kind: str = "transformer", layers: int = 2, decoder_layers: int = 1, dim: int = 32) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderConfig(
            type=kind,
            layers=layers,
            dim=dim,
            heads=4,
            ff_dim=2 * dim,
            conv_kernel=5,
            dropout=0.0,
            positional_dropout=0.0,
            subsampling=SubsamplingConfig(channels=8),
        ),
        decoder=DecoderConfig(layers=decoder_layers, ff_dim=2 * dim, dropout=0.0, positional_dropout=0.0),
        attention_penalty=AttentionPenaltyConfig(encoder_self=PenaltyConfig(shape="log")),
        ctc_weight=0.3 if decoder_layers else 1.0,
    )


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 11, (4, 6), generator=generator)
    return torch.randn(4, 80, 20, generator=generator), torch.tensor([80, 61, 70, 55]), tokens, torch.tensor([6, 2, 4, 3])


def make_model(config: ModelConfig, seed: int = 0) -> Recognizer:
    torch.manual_seed(seed)
    return Recognizer(config=config, num_mel_bins=20, vocab_size=12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_learns_four_utterances_by_heart_in_a_hundred_steps(kind: str) -> None:
    model, batch = make_model(make_config(kind)), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        losses = model(*batch)
        optimizer.zero_grad()
        (losses.total / losses.num_tokens).backward()
        optimizer.step()
    losses = model.eval()(*batch)
    assert losses.num_correct == losses.num_tokens == 19
    assert losses.ctc / losses.num_tokens < 0.1
    enc_out, enc_lens = model.encode(*batch[:2])
    best = model.ctc_log_probs(enc_out).argmax(-1)
    for row, (length, count) in enumerate(zip(enc_lens, batch[3], strict=True)):
        path = best[row, :length].unique_consecutive()
        assert path[path != 0].tolist() == batch[2][row, :count].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_deep_stacks_start_with_signals_and_gradients_of_one_size(kind: str) -> None:
    model, batch = make_model(make_config(kind, layers=12, decoder_layers=6)), make_batch()
    losses = model(*batch)
    (losses.total / losses.num_tokens).backward()
    sizes = [layer.ff_out.inner if kind == "conformer" else layer.ff.inner for layer in model.encoder.layers]
    norms = torch.stack([layer.weight.grad.norm() for layer in sizes])
    assert norms.min() > 0 and norms.max() / norms.min() < 30
    assert losses.att / losses.num_tokens < 6  # a uniform guess is ln 12 = 2.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder_layers", [0, 1])
def test_losses_of_batches_add_up_to_the_loss_of_the_whole(kind: str, decoder_layers: int) -> None:
    model = make_model(make_config(kind, decoder_layers=decoder_layers))
    feats, feat_lens, tokens, token_lens = make_batch()
    whole = model(feats, feat_lens, tokens, token_lens)
    parts = []
    for row in range(4):
        frames, count = int(feat_lens[row]), int(token_lens[row])
        parts.append(
            model(
                feats[row : row + 1, :frames], feat_lens[row : row + 1], tokens[row : row + 1, :count], token_lens[row : row + 1]
            )
        )
    for name in ("total", "ctc", "att"):
        summed = torch.stack([getattr(part, name) for part in parts]).sum()
        torch.testing.assert_close(getattr(whole, name), summed, atol=1e-3, rtol=1e-5)
    assert whole.num_tokens == sum(p.num_tokens for p in parts) == token_lens.sum() + 4
    assert whole.num_correct == sum(p.num_correct for p in parts)
    assert whole.total.requires_grad and not whole.ctc.requires_grad and not whole.att.requires_grad


def test_the_total_is_the_weighted_sum_of_its_parts() -> None:
    losses = make_model(make_config())(*make_batch())
    torch.testing.assert_close(losses.total, 0.3 * losses.ctc + 0.7 * losses.att)


def test_without_a_decoder_there_is_ctc_alone() -> None:
    model = make_model(make_config(decoder_layers=0))
    losses = model(*make_batch())
    assert model.decoder is None and losses.total == losses.ctc and losses.att == 0 and losses.num_correct == 0


def test_the_an4_shape_has_exactly_as_many_parameters_as_espnets() -> None:
    """12 + 6 layers, d 256, ff 2048, 256 channels, 30 tokens; the fused projections only regroup the same weights."""
    with torch.device("meta"):
        model = Recognizer(config=ModelConfig(), num_mel_bins=80, vocab_size=30)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 27_115_580


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_can_be_checked_without_memory(kind: str) -> None:
    with torch.device("meta"):
        model = Recognizer(config=make_config(kind), num_mel_bins=20, vocab_size=12)
        enc_out, enc_lens = model.encode(torch.empty(2, 80, 20), torch.empty(2, dtype=torch.int64))
    assert enc_out.shape == (2, 19, 32) and enc_lens.shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_computes_the_same_after_loading(kind: str, tmp_path) -> None:
    model, batch = make_model(make_config(kind)).eval(), make_batch()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make_model(make_config(kind), seed=5).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(*batch).total, other(*batch).total)


def test_ctc_probabilities_are_float32_and_sum_to_one() -> None:
    model = make_model(make_config()).bfloat16()
    feats, lens, *_ = make_batch()
    log_probs = model.ctc_log_probs(model.encode(feats.bfloat16(), lens)[0])
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4, 19), atol=1e-5, rtol=0)


AXES = ["uniform", "rate", "ctc_count", "ctc_prefix", "monotonic", "lower_layer"]


def with_cross(axis: str, **options: object) -> ModelConfig:
    cross = CrossPenaltyConfig(shape="gaussian", sigma=0.3 if axis == "uniform" else 2.0, axis=axis, rate=4.0, **options)
    return make_config(decoder_layers=2).model_copy(update={"attention_penalty": AttentionPenaltyConfig(cross=cross)})


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_axis_trains_in_full_and_in_mixed_precision_and_asks_the_ctc_output_once(axis: str, dtype: torch.dtype) -> None:
    model, calls = make_model(with_cross(axis)), []
    model.ctc.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = model(*make_batch())
    losses.total.backward()
    assert len(calls) == 1
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    again = make_model(with_cross(axis)).load_state_dict(model.state_dict())
    assert not again.missing_keys and not again.unexpected_keys


@pytest.mark.parametrize("axis", ["ctc_count", "monotonic"])
def test_a_model_with_a_cross_penalty_learns_four_utterances_by_heart(axis: str) -> None:
    model, batch = make_model(with_cross(axis, heads="all")), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        losses = model(*batch)
        optimizer.zero_grad()
        (losses.total / losses.num_tokens).backward()
        optimizer.step()
    losses = model.eval()(*batch)
    assert losses.num_correct == losses.num_tokens


@pytest.mark.parametrize("axis", AXES)
def test_the_attention_loss_sends_no_gradient_into_the_ctc_output(axis: str) -> None:
    """An axis is read off CTC, it does not teach it: else attention would bend the alignment to its liking."""
    model = make_model(with_cross(axis).model_copy(update={"ctc_weight": 0.0}))
    model(*make_batch()).total.backward()
    assert float(model.ctc.weight.grad.abs().max()) == 0.0
