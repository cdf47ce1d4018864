from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechtx.attention.blocks import BlockBias
from speechtx.attention.kernels import attend, attend_eager, attention_weights, padding_bias
from speechtx.attention.penalty import alibi_slopes, bucket_edges, bucket_of
from speechtx.attention.site import AttentionPenalty, build_bias
from speechtx.config.errors import ConfigError
from speechtx.config.penalty import PenaltyConfig

CONFIGS = [
    PenaltyConfig(shape="log"),
    PenaltyConfig(shape="log", scale=(0.5, 1.0, 2.0, 4.0)),
    PenaltyConfig(shape="log", margin=2, step=3, max_distance=2),
    PenaltyConfig(shape="linear", scale=0.25),
    PenaltyConfig(shape="linear", scale="alibi"),
    PenaltyConfig(shape="linear", scale="alibi", symmetric=False, scale_right=(1.0, 2.0, 0.0, 0.5)),
    PenaltyConfig(shape="linear", scale=0.25, symmetric=False, scale_right=0.0),
    PenaltyConfig(shape="gaussian", sigma=5.0),
    PenaltyConfig(shape="gaussian", sigma=(3.0, 10.0, 30.0, 100.0)),
    PenaltyConfig(shape="gaussian", sigma=5.0, symmetric=False, sigma_right=2.0, margin=1),
    PenaltyConfig(shape="power", scale=0.5, exponent=0.5),
    PenaltyConfig(shape="stripe", scale=3.0, margin=2),
    PenaltyConfig(shape="window", window=3),
    PenaltyConfig(shape="log", window=4),
    PenaltyConfig(shape="log", window=4, heads=(1, 3), scale=(1.0, 2.0)),
]
HEADS = 4


def literal(config: PenaltyConfig, head: int, offset: int) -> float:
    """P(o) written once more, from the formulas alone."""
    if head not in config.selected_heads(HEADS):
        return 0.0
    head = config.selected_heads(HEADS).index(head)
    if config.window is not None and abs(offset) > config.window:
        return math.inf

    def of_head(value: object) -> object:
        return value[head] if isinstance(value, tuple) else 2 ** (-8 * (head + 1) / HEADS) if value == "alibi" else value

    right = offset > 0 and not config.symmetric
    scale, sigma = of_head(config.scale_right if right else config.scale), of_head(config.sigma_right if right else config.sigma)
    n = sum(config.margin + k * config.step < abs(offset) for k in range(100))  # stripes that begin before the offset
    n = min(n, config.max_distance or n)
    rho = {
        "log": math.log(1 + n),
        "linear": n,
        "gaussian": n**2,
        "power": n ** (config.exponent or 1),
        "stripe": float(n > 0),
        "window": 0.0,
    }[config.shape]
    return rho / (2 * sigma**2) if config.shape == "gaussian" else scale * rho


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_cell_of_the_bias_is_minus_the_formula_of_its_distance(config: PenaltyConfig) -> None:
    length = 9
    bias = build_bias(config, length=length, num_heads=HEADS)
    assert bias is not None
    bias = bias.expand(1, HEADS, length, length)
    for head in range(HEADS):
        for i in range(length):
            for j in range(length):
                expected = -literal(config, head, j - i)
                assert bias[0, head, i, j].item() == pytest.approx(expected, rel=1e-6), (head, i, j)


def test_log_with_scale_one_is_tensor2tensors_proximity_bias() -> None:
    position = torch.arange(50.0)
    expected = -torch.log1p((position[:, None] - position[None, :]).abs())
    assert torch.equal(build_bias(PenaltyConfig(shape="log"), length=50, num_heads=4)[0, 0], expected)


def test_alibi_slopes_of_eight_heads_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == tuple(2.0**-h for h in range(1, 9))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_subtracting_before_softmax_equals_multiplying_the_weights_and_renormalising(config: PenaltyConfig) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, HEADS, 12, 8, dtype=torch.float64).unbind(0)
    bias = build_bias(config, length=12, num_heads=HEADS, dtype=torch.float64)
    multiplied = attention_weights(q, k) * bias.exp()
    expected = multiplied / multiplied.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attention_weights(q, k, bias=bias), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_padding_gets_no_weight_whatever_the_penalty(config: PenaltyConfig) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, HEADS, 10, 8).unbind(0)
    mask = torch.arange(10) < torch.tensor([10, 6]).unsqueeze(1)
    bias = build_bias(config, length=10, num_heads=HEADS, mask=mask)
    assert bias.shape[0] == 2 and bias.dim() == 4  # a 3-D bias would leave the fused CPU kernel
    weights = attention_weights(q, k, bias=bias)
    assert (weights[1, :, :, 6:] == 0).all()
    alone = attention_weights(q[1:, :, :6], k[1:, :, :6], bias=build_bias(config, length=6, num_heads=HEADS))
    torch.testing.assert_close(weights[1:, :, :6, :6], alone, atol=1e-6, rtol=0)


def test_shape_none_is_bit_for_bit_no_bias_at_all() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, 10, 8).unbind(0)
    none = PenaltyConfig()
    assert build_bias(none, length=10, num_heads=HEADS) is None
    full = torch.ones(2, 10, dtype=torch.bool)
    padding_only = build_bias(none, length=10, num_heads=HEADS, mask=full)
    assert padding_only.shape == (2, 1, 1, 10)
    assert torch.equal(attend(q, k, v, bias=padding_only), attend(q, k, v, bias=padding_bias(full)))
    zero = build_bias(PenaltyConfig(shape="log", scale=0.0), length=10, num_heads=HEADS, mask=full)
    assert torch.equal(attend(q, k, v, bias=zero), attend(q, k, v, bias=padding_only))


@given(st.integers(1, 40), st.floats(-1000, 1000), st.sampled_from(CONFIGS))
def test_only_the_offset_counts_not_where_the_utterance_stands(length: int, shift: float, config: PenaltyConfig) -> None:
    position = torch.arange(length, dtype=torch.float64).unsqueeze(0)
    site = AttentionPenalty(config, num_layers=1, num_heads=HEADS)
    there = site.between(0, position + shift, position + shift, dtype=torch.float64)
    here = build_bias(config, length=length, num_heads=HEADS, dtype=torch.float64)
    if shift == round(shift):  # others may fall on another stair by rounding
        torch.testing.assert_close(there, here.expand_as(there), atol=1e-4, rtol=1e-6)
    assert (here <= 0).all() and (here.diagonal(dim1=2, dim2=3) == 0).all()
    if config.symmetric:
        assert torch.equal(here, here.transpose(2, 3))


def test_the_staircase_is_the_loop_of_bands_that_it_replaces() -> None:
    """Stripes of width s from distance z on, each adding one: the tfsr board, with margin = z - 1 and step = s."""
    length = 30
    ones = torch.ones(length, length)
    for zero_width in (1, 2, 5):
        for stripe in (1, 2, 7):
            board = torch.zeros(length, length)
            for begin in range(zero_width - 1, length, stripe):
                inside = ones.triu(-begin) * ones.tril(begin)
                board += 1 - inside
            config = PenaltyConfig(shape="linear", margin=zero_width - 1, step=stripe)
            assert torch.equal(-build_bias(config, length=length, num_heads=1)[0, 0], board), (zero_width, stripe)


def test_heads_and_layers_that_do_not_pay_are_bit_for_bit_without_penalty() -> None:
    config = PenaltyConfig(shape="log", heads=(2,), layers=(1,), scale=3.0)
    mask = torch.arange(10) < torch.tensor([10, 6]).unsqueeze(1)
    biases = AttentionPenalty(config, num_layers=3, num_heads=HEADS)(length=10, mask=mask)
    q, k, v = torch.randn(3, 2, HEADS, 10, 8).unbind(0)
    plain = attend(q, k, v, bias=padding_bias(mask))
    assert torch.equal(attend(q, k, v, bias=biases[0]), plain) and torch.equal(attend(q, k, v, bias=biases[2]), plain)
    paid = attend(q, k, v, bias=biases[1])
    assert torch.equal(paid[:, [0, 1, 3]], plain[:, [0, 1, 3]]) and not torch.allclose(paid[:, 2], plain[:, 2])


def test_relabelling_heads_permutes_the_outputs() -> None:
    q, k, v = torch.randn(3, 1, HEADS, 10, 8).unbind(0)
    order = [2, 0, 3, 1]
    scales = (0.5, 1.0, 2.0, 4.0)
    out = attend(q, k, v, bias=build_bias(PenaltyConfig(shape="log", scale=scales), length=10, num_heads=HEADS))
    moved = build_bias(PenaltyConfig(shape="log", scale=tuple(scales[i] for i in order)), length=10, num_heads=HEADS)
    torch.testing.assert_close(attend(q[:, order], k[:, order], v[:, order], bias=moved), out[:, order])


LEARNED = [
    PenaltyConfig(shape="log", learnable="layer"),
    PenaltyConfig(shape="log", learnable="head", heads=(0, 3), scale=(1.0, 2.0), layers=(1,)),
    PenaltyConfig(shape="linear", scale="alibi", learnable="head", symmetric=False),
    PenaltyConfig(shape="gaussian", sigma=5.0, learnable="head"),
    PenaltyConfig(shape="power", exponent=0.5, learnable="head", window=4),
    PenaltyConfig(shape="bucket", buckets=6, max_distance=20.0, learnable="head"),
    PenaltyConfig(shape="bucket", buckets=13, max_distance=12.0, learnable="layer", symmetric=False),
]


@pytest.mark.parametrize("config", LEARNED, ids=str)
def test_a_learned_strength_starts_at_the_configured_one_and_gradcheck_agrees(config: PenaltyConfig) -> None:
    site = AttentionPenalty(config, num_layers=2, num_heads=HEADS).double()
    assert [p.ndim for p in site.parameters()] == [1], "one dimension is what spares it from weight decay"
    offset = torch.arange(-11.0, 12.0, dtype=torch.float64)
    layer = site.config.selected_layers(2)[-1]
    if config.shape != "bucket":
        fixed = AttentionPenalty(config.model_copy(update={"learnable": "none"}), num_layers=2, num_heads=HEADS).double()
        if config.symmetric:
            torch.testing.assert_close(
                site.values(layer, offset).expand(HEADS, -1), fixed.values(layer, offset).expand(HEADS, -1), atol=1e-6, rtol=1e-6
            )
    q, k, v = torch.randn(3, 1, HEADS, 12, 8, dtype=torch.float64).unbind(0)

    def out(learned: torch.Tensor) -> torch.Tensor:
        biases = torch.func.functional_call(site, {"strength.learned": learned}, (), {"length": 12, "dtype": torch.float64})
        return attend(q, k, v, bias=biases[layer])

    learned = site.strength.learned.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(out, (learned,), atol=1e-4, rtol=1e-2)  # the penalty itself is computed in float32


def test_pdp_is_a_weight_per_distance_times_log1p() -> None:
    site = AttentionPenalty(
        PenaltyConfig(shape="bucket", buckets=9, max_distance=8.0, learnable="head"), num_layers=1, num_heads=2
    )
    with torch.no_grad():
        site.strength.learned.uniform_(-1, 1)
    weights = torch.nn.functional.softplus(site.strength.learned).view(2, 9)
    for distance in range(15):
        n = min(distance, 8)
        expected = weights[:, n] * math.log1p(n)
        torch.testing.assert_close(site.values(0, torch.tensor([float(distance)]))[:, 0], expected)


def test_buckets_are_exact_near_and_logarithmic_far() -> None:
    config = PenaltyConfig(shape="bucket", buckets=32, max_distance=128.0, learnable="head")
    edges = bucket_edges(config)
    assert torch.equal(edges[:16], torch.arange(16.0)) and (edges.diff() > 0).all() and edges[-1] < 128
    distance = torch.arange(300.0)
    bucket = bucket_of(distance.clamp(max=128.0), config)
    assert (edges[bucket] <= distance).all() and (bucket.diff() >= 0).all() and bucket[-1] == 31


def test_a_ramp_scales_the_penalty_but_never_opens_the_window_and_is_kept_in_checkpoints() -> None:
    config = PenaltyConfig(shape="log", window=3, ramp={"from": 0.0, "to": 1.0, "steps": 10})
    site = AttentionPenalty(config, num_layers=1, num_heads=1)
    offset = torch.tensor([1.0, 3.0, 4.0])
    assert site.values(0, offset).tolist() == [[0.0, 0.0, math.inf]]
    site.at_step(5)
    assert site.values(0, offset)[0, 1].item() == pytest.approx(0.5 * math.log(4))
    again = AttentionPenalty(config, num_layers=1, num_heads=1)
    again.load_state_dict(site.state_dict())
    assert torch.equal(again.values(0, offset), site.values(0, offset))
    site.at_step(1000)
    assert site.values(0, offset)[0, 1].item() == pytest.approx(math.log(4))


def test_milliseconds_mean_the_same_whatever_the_subsampling_and_disagreeing_lengths_are_refused() -> None:
    config = PenaltyConfig(shape="gaussian", sigma=200.0, window=400, unit="ms")
    coarse = AttentionPenalty(config, num_layers=1, num_heads=1, spacing=40.0)
    fine = AttentionPenalty(config, num_layers=1, num_heads=1, spacing=20.0)
    assert coarse.window_frames == 10 and fine.window_frames == 20
    torch.testing.assert_close(coarse.by_offset(0, 15), fine.by_offset(0, 29)[:, ::2])
    with pytest.raises(ConfigError, match=r"encoder_self.window is 90 ms, but an encoder frame lasts 40 ms"):
        AttentionPenalty(PenaltyConfig(shape="log", window=90, unit="ms"), num_layers=1, num_heads=1, spacing=40.0)


def test_window_auto_becomes_a_number_that_its_bound_certifies() -> None:
    config = PenaltyConfig(shape="linear", scale=0.25, window="auto", logit_bound=3.0, epsilon=2**-9)
    site = AttentionPenalty(config, num_layers=1, num_heads=1)
    assert site.window_frames is not None and 45 <= site.window_frames <= 52, "52 is what the closed form certifies"


def test_additive_after_softmax_does_what_it_is_blamed_for() -> None:
    """Of each row almost nothing depends on the content any more, and padding receives weight."""
    torch.manual_seed(0)
    length, real = 300, 220
    mask = torch.arange(length).unsqueeze(0) < real
    q, k = torch.randn(2, 1, 1, length, 64).unbind(0)
    broken = AttentionPenalty(PenaltyConfig(shape="linear", apply="after_softmax"), num_layers=1, num_heads=1)
    weights = broken(length=length, mask=mask)[0].weights(q, k)[0, 0]
    other = broken(length=length, mask=mask)[0].weights(torch.randn_like(q), k)[0, 0]
    assert 0.1 < weights[:real, real:].sum(dim=-1).mean() < 0.3
    assert (weights - other)[:real].abs().sum(dim=-1).max() < 1e-4
    right = attention_weights(q, k, bias=build_bias(PenaltyConfig(shape="linear"), length=length, num_heads=1, mask=mask))[0, 0]
    assert (right[:, real:] == 0).all()


BACKENDS = [
    ("eager", PenaltyConfig(shape="log")),
    ("sdpa", PenaltyConfig(shape="log", scale=(0.5, 1.0, 2.0, 4.0))),
    ("blocks", PenaltyConfig(shape="log", window=4)),
    ("blocks", PenaltyConfig(shape="linear", scale="alibi", window=3, symmetric=False, scale_right=0.5)),
    ("fold", PenaltyConfig(shape="gaussian", sigma=5.0)),
    ("fold", PenaltyConfig(shape="linear", scale="alibi")),
]


@pytest.mark.parametrize(("backend", "config"), BACKENDS, ids=str)
def test_every_backend_computes_the_one_definition(backend: str, config: PenaltyConfig) -> None:
    torch.manual_seed(0)
    mask = torch.arange(21) < torch.tensor([21, 9, 0]).unsqueeze(1)
    q, k, v = (torch.randn(3, HEADS, 21, 16, requires_grad=True) for _ in range(3))
    expected = attend_eager(q, k, v, bias=build_bias(config, length=21, num_heads=HEADS, mask=mask))
    bias = AttentionPenalty(config, num_layers=1, num_heads=HEADS, backend=backend)(length=21, mask=mask)[0]
    out = attend(q, k, v, bias=bias)
    valid = mask[:, None, :, None]  # what padded queries get is nobody's business, except that it is finite
    torch.testing.assert_close(out * valid, expected * valid, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(out).all()
    expected_grads = torch.autograd.grad((expected * valid).square().sum(), (q, k, v))
    for grad, wanted in zip(torch.autograd.grad((out * valid).square().sum(), (q, k, v)), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-4, rtol=1e-4)


def test_auto_takes_blocks_for_long_windows_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    site = AttentionPenalty(PenaltyConfig(shape="log", window=16), num_layers=2, num_heads=2, site="a test")
    assert isinstance(site(length=100)[0], torch.Tensor)
    assert isinstance(site(length=2000)[0], BlockBias) and isinstance(site(length=2000)[1], BlockBias)
    assert [r.getMessage().partition(": backend ")[2].split(",")[0] for r in caplog.records] == ["sdpa", "blocks"]


@pytest.mark.parametrize("config", [PenaltyConfig(shape="log"), PenaltyConfig(shape="linear", scale="alibi", window=5)], ids=str)
def test_causal_rows_of_step_by_step_decoding_are_those_of_training(config: PenaltyConfig) -> None:
    site = AttentionPenalty(config, num_layers=2, num_heads=HEADS)
    full = site(length=9, causal=True)[1]
    for length in range(1, 10):
        row = site.last_row(length, "cpu", torch.float32)[1]
        assert torch.equal(row[0, :, 0], full[0, :, length - 1, :length])
        assert (full[0, :, length - 1, length:] == -math.inf).all()


def test_the_bias_is_computed_in_float32_and_rounded_once() -> None:
    config = PenaltyConfig(shape="gaussian", sigma=7.0)
    exact = build_bias(config, length=300, num_heads=HEADS)
    assert torch.equal(build_bias(config, length=300, num_heads=HEADS, dtype=torch.bfloat16), exact.bfloat16())
