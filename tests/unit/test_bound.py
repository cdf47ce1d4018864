from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechtx.attention.bound import effective_window
from speechtx.attention.kernels import attend_eager, attention_weights
from speechtx.attention.penalty import penalty
from speechtx.attention.site import AttentionPenalty
from speechtx.config.errors import ConfigError
from speechtx.config.penalty import PenaltyConfig


def strength_of(config: PenaltyConfig) -> Tensor:
    """(sides, 1, 1) of numbers in the configuration."""
    name = "sigma" if config.shape == "gaussian" else "scale"
    values = [getattr(config, name)] + ([] if config.symmetric else [getattr(config, f"{name}_right")])
    s = torch.tensor(values, dtype=torch.float64)[:, None, None]
    return 1.0 / (2.0 * s.square()) if config.shape == "gaussian" else s


def window_of(config: PenaltyConfig, bound: float, epsilon: float, spacing: float = 1.0) -> int:
    return effective_window(config, strength_of(config), logit_bound=bound, epsilon=epsilon, spacing=spacing)


@pytest.mark.parametrize("bound", [3.0, 5.0, 10.0])
@pytest.mark.parametrize("epsilon", [2.0**-9, 2.0**-24])
def test_linear_windows_are_the_closed_form(bound: float, epsilon: float) -> None:
    for m in (1 / 2, 1 / 4, 1 / 16, 1 / 256):
        # R_W = 2a / (1 + e^-m - 2a), a = e^(-m (W + 1)), the geometric series of both sides
        ratio = epsilon / (1 - epsilon) * math.exp(-2 * bound)
        a = ratio * (1 + math.exp(-m)) / (2 * (1 + ratio))
        assert window_of(PenaltyConfig(shape="linear", scale=m), bound, epsilon) == math.ceil(-math.log(a) / m - 1)
        assert window_of(PenaltyConfig(shape="linear", scale=m), bound, epsilon) <= math.ceil(
            (2 * bound + math.log(2 / epsilon)) / m
        )


@pytest.mark.parametrize(
    ("sigma", "bound", "epsilon", "loose"),
    [(5, 3, 2**-9, 25), (10, 3, 2**-9, 51), (30, 3, 2**-9, 153), (5, 10, 2**-24, 43), (10, 5, 2**-24, 74), (30, 10, 2**-24, 259)],
)
def test_gaussian_windows_are_the_sums_and_below_the_closed_bound(sigma: float, bound: float, epsilon: float, loose: int) -> None:
    weight = [math.exp(-d * d / (2 * sigma**2)) for d in range(40 * sigma)]
    exact = next(
        w
        for w in range(1, len(weight))
        if math.exp(2 * bound) * 2 * math.fsum(weight[w + 1 :]) / (1 + 2 * math.fsum(weight[1 : w + 1]))
        <= epsilon / (1 - epsilon)
    )
    assert window_of(PenaltyConfig(shape="gaussian", sigma=sigma), bound, epsilon) == exact
    assert 0.85 * loose < exact <= loose


def test_log_windows_follow_the_zeta_tail() -> None:
    # s = 4: sum_(d >= 1) d^-4 = pi^4 / 90, so both sums are known without summing to infinity
    partial = [0.0]
    for d in range(1, 500):
        partial.append(partial[-1] + d**-4.0)
    total = math.pi**4 / 90
    exact = next(
        w for w in range(1, 400) if math.exp(6) * 2 * (total - partial[w + 1]) / (2 * partial[w + 1] - 1) <= 1e-3 / 0.999
    )
    assert window_of(PenaltyConfig(shape="log", scale=4.0), 3.0, 1e-3) == exact


configs = st.one_of(
    st.builds(
        PenaltyConfig, shape=st.just("linear"), scale=st.floats(0.2, 3.0), margin=st.integers(0, 3), step=st.integers(1, 3)
    ),
    st.builds(PenaltyConfig, shape=st.just("gaussian"), sigma=st.floats(0.5, 6.0), margin=st.integers(0, 3)),
    st.builds(PenaltyConfig, shape=st.just("power"), scale=st.floats(0.8, 3.0), exponent=st.sampled_from([0.6, 1.5, 3.0])),
    st.builds(PenaltyConfig, shape=st.just("log"), scale=st.floats(4.0, 9.0)),
    st.builds(
        PenaltyConfig,
        shape=st.just("linear"),
        scale=st.floats(0.3, 2.0),
        scale_right=st.floats(0.3, 2.0),
        symmetric=st.just(False),
    ),
    st.builds(
        PenaltyConfig,
        shape=st.just("gaussian"),
        sigma=st.floats(1.0, 5.0),
        sigma_right=st.floats(1.0, 5.0),
        symmetric=st.just(False),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    config=configs,
    bound=st.floats(0.0, 2.0),
    epsilon=st.floats(1e-6, 0.3),
    query=st.floats(0.0, 1.0),
    adversarial=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_what_a_window_cuts_off_stays_within_the_bound(
    config: PenaltyConfig, bound: float, epsilon: float, query: float, adversarial: bool, causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    window = window_of(config, bound, epsilon)
    length = min(2 * window + 300, 3000)
    i = round(query * (length - 1))
    offset = torch.arange(length, dtype=torch.float64) - i
    if adversarial:  # d_k = 1: q.k is B for keys beyond the window, -B within
        q, k = torch.ones(1, 1, 1, 1).double(), torch.where(offset.abs() > window, bound, -bound)[None, None, :, None]
        v = torch.where(offset.abs() > window, 1.0, -1.0)[None, None, :, None]
    else:
        q, k = torch.randn(1, 1, 1, 4, generator=generator).double(), torch.randn(1, 1, length, 4, generator=generator).double()
        content = (q @ k.transpose(-2, -1)).abs().max() / 2.0
        q, v = q * bound / content, torch.randn(1, 1, length, 3, generator=generator).double()
    bias = -penalty(config, offset, strength_of(config))[None, :, None, :]
    if causal:
        bias = bias.masked_fill(offset > 0, -math.inf)
    outside = attention_weights(q, k, bias=bias)[..., offset.abs() > window].sum().item()
    cut = bias.masked_fill(offset.abs() > window, -math.inf)
    error = (attend_eager(q, k, v, bias=bias) - attend_eager(q, k, v, bias=cut)).norm().item()
    assert outside <= epsilon * (1 + 1e-9)
    assert error <= 2 * epsilon * v.norm(dim=-1).max().item() * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(config=configs, bound=st.floats(0.0, 2.0), epsilon=st.floats(1e-5, 0.3))
def test_a_window_smaller_by_one_is_broken_by_some_keys(config: PenaltyConfig, bound: float, epsilon: float) -> None:
    window = window_of(config, bound, epsilon) - 1
    if window < 1 or window > 2000:
        return  # one position is the smallest there is
    worst = 0.0
    reach = 60 * window + 3000  # instead of infinity
    for left, right in ((reach, reach), (reach, 0), (0, reach)):
        offset = torch.arange(-left, right + 1, dtype=torch.float64)
        content = torch.where(offset.abs() > window, bound, -bound)
        weights = torch.softmax(content - penalty(config, offset, strength_of(config))[0], dim=-1)
        worst = max(worst, weights[offset.abs() > window].sum().item())
    assert worst > epsilon * 0.999


def test_the_steepest_head_does_not_decide_for_the_others() -> None:
    both = effective_window(
        PenaltyConfig(shape="linear", scale=(0.5, 0.25)), torch.tensor([[[0.5], [0.25]]]), logit_bound=3.0, epsilon=2.0**-9
    )
    assert both == window_of(PenaltyConfig(shape="linear", scale=0.25), 3.0, 2.0**-9) == 49


def test_the_weaker_side_decides() -> None:
    sided = PenaltyConfig(shape="linear", symmetric=False, scale=4.0, scale_right=0.25)
    # keys on the right only: R_W = a / (1 - a); the strong left side adds weight within the window when it is there
    ratio = 1e-3 / 0.999 * math.exp(-6)
    assert window_of(sided, 3.0, 1e-3) == math.ceil(-math.log(ratio / (1 + ratio)) / 0.25 - 1)


def test_milliseconds_give_whole_frames() -> None:
    frames = window_of(PenaltyConfig(shape="gaussian", sigma=5.0), 3.0, 1e-3)
    assert window_of(PenaltyConfig(shape="gaussian", sigma=200.0, unit="ms"), 3.0, 1e-3, spacing=40.0) == 40 * frames


def test_a_ready_window_is_not_counted_on_and_auto_is_accepted() -> None:
    soft = PenaltyConfig(shape="linear", scale=0.5)
    auto = PenaltyConfig(shape="linear", scale=0.5, window="auto", logit_bound=3.0)
    assert window_of(soft.model_copy(update={"window": 4}), 3.0, 1e-3) == window_of(auto, 3.0, 1e-3) == window_of(soft, 3.0, 1e-3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (PenaltyConfig(), "shape none does not grow"),
        (PenaltyConfig(shape="window", window=8), "shape window does not grow"),
        (PenaltyConfig(shape="stripe"), "shape stripe does not grow"),
        (PenaltyConfig(shape="bucket", buckets=9, max_distance=8, learnable="head"), "shape bucket does not grow"),
        (PenaltyConfig(shape="linear", max_distance=20), "max_distance 20 ends"),
        (PenaltyConfig(shape="linear", scale=0.0), "strength 0"),
        (PenaltyConfig(shape="linear", apply="after_softmax"), "after_softmax"),
        (PenaltyConfig(shape="log", scale=1.0), "log with scale 1: .*no limit"),
        (PenaltyConfig(shape="log", scale=1.01), "too weak"),
        (PenaltyConfig(shape="power", scale=0.5, exponent=0.05), "too weak"),
    ],
)
def test_a_penalty_that_bounds_nothing_is_refused_with_the_reason(config: PenaltyConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        window_of(config, 3.0, 1e-3)


def test_a_window_that_cannot_be_proved_is_an_error_of_the_configuration_that_names_the_site() -> None:
    weak = PenaltyConfig(shape="linear", scale=1e-9, window="auto", logit_bound=5.0)
    with pytest.raises(
        ConfigError, match=r"attention_penalty\.decoder_self\.window: auto: .*too weak; give the window as a number"
    ):
        AttentionPenalty(weak, num_layers=1, num_heads=2, site="decoder_self")


@pytest.mark.parametrize(("epsilon", "bound"), [(0.0, 3.0), (1.0, 3.0), (1e-3, -1.0), (1e-3, math.inf)])
def test_impossible_bounds_are_refused(epsilon: float, bound: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        window_of(PenaltyConfig(shape="linear"), bound, epsilon)
