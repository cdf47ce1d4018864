"""The axes of cross-attention: what coordinates they give, and that search computes the coordinates of training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speechtx.config.penalty import CrossPenaltyConfig
from speechtx.model.axis import AXES, Audio, Axis, AxisState, emissions
from speechtx.model.ctc_forward import CtcForward

LAYERS, DIM, VOCAB = 3, 8, 6
SHARED = ["uniform", "rate", "ctc_count", "ctc_prefix"]


def make(axis: str, **options: object) -> Axis:
    config = CrossPenaltyConfig(shape="gaussian", sigma=2.0, axis=axis, **{"rate": 3.0, **options})
    torch.manual_seed(0)
    made = AXES[axis](config=config, num_layers=LAYERS, dim=DIM)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.eval()


def audio(lens: list[int], seed: int = 0, *, sharpness: float = 3.0) -> Audio:
    """Random CTC posteriors; NaN in the padding, where nobody may look."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (sharpness * torch.randn(len(lens), max(lens), VOCAB, generator=generator)).log_softmax(-1)
    for row, length in enumerate(lens):
        log_probs[row, length:] = math.nan
    return Audio(lens=torch.tensor(lens), size=max(lens), log_probs=log_probs)


def certain(labels: list[int]) -> Audio:
    """CTC that is sure of one label a frame."""
    posteriors = torch.nn.functional.one_hot(torch.tensor([labels]), VOCAB).float()
    return Audio(lens=torch.tensor([len(labels)]), size=len(labels), log_probs=posteriors.log())


def coordinates(axis: Axis, state: AxisState, tokens: Tensor, query: Tensor, weights: Tensor) -> tuple[Tensor, AxisState]:
    """x of every layer (layers, N, L), for tokens (N, L), query (N, L, D), weights (layers, N, L, S), N being B * beam."""
    batch, (rows, length) = len(state.y), tokens.shape
    x, state = axis.advance(tokens, state)
    found = [x] * LAYERS
    if axis.by_layer:
        found = []
        for layer in range(LAYERS):
            below = weights[layer - 1].reshape(batch, -1, weights.shape[-1]) if axis.uses_weights and layer else None
            x, state = axis.at_layer(layer, query.reshape(batch, -1, DIM), below, state)
            found.append(torch.zeros(batch, rows * length // batch) if x is None else x)
    return torch.stack([part.reshape(rows, length) for part in found]), state


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 3), st.booleans(), st.integers(0, 99)
)
@pytest.mark.parametrize("name", AXES)
@torch.no_grad()
def test_one_token_at_a_time_gives_the_coordinates_of_all_at_once(name, lens, length, beam, rounded, seed):
    axis = make(name, round_centre=rounded and name not in ("uniform", "monotonic")).double()
    generator = torch.Generator().manual_seed(seed)
    known, rows = audio(lens, seed), len(lens) * beam
    repeated = Audio(
        lens=known.lens.repeat_interleave(beam), size=known.size, log_probs=known.log_probs.repeat_interleave(beam, 0)
    )
    tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
    query = torch.randn(rows, length, DIM, dtype=torch.float64, generator=generator)
    weights = torch.randn(LAYERS, rows, length, known.size, dtype=torch.float64, generator=generator).softmax(-1)
    at_once, _ = coordinates(axis, axis.start(repeated), tokens, query, weights)
    state, steps = axis.start(known, beam=beam), []
    for i in range(length):
        part, state = coordinates(axis, state, tokens[:, i : i + 1], query[:, i : i + 1], weights[:, :, i : i + 1])
        steps.append(part)
    torch.testing.assert_close(torch.cat(steps, -1), at_once, atol=1e-9, rtol=0, check_dtype=False)
    low, high = (end.repeat_interleave(beam, 0) for end in state.ends)
    assert bool((at_once[1:] >= low).all() and (at_once[1:] <= high).all()) and bool(at_once.isfinite().all())
    if rounded:
        assert torch.equal(2 * at_once[1:], (2 * at_once[1:]).round()) or name in ("uniform", "monotonic")


@pytest.mark.parametrize("name", AXES)
@torch.no_grad()
def test_hypotheses_are_followed_when_they_move_and_when_others_leave(name):
    axis, known = make(name), audio([9, 4, 7], 3)
    tokens, query = torch.randint(1, VOCAB, (6, 3)), torch.randn(6, 3, DIM)
    weights = torch.rand(LAYERS, 6, 3, 9).softmax(-1)

    def feed(state: AxisState, rows: Tensor, position: int) -> tuple[Tensor, AxisState]:
        now = slice(position, position + 1)
        return coordinates(axis, state, tokens[rows, now], query[rows, now], weights[:, rows, now])

    everybody = torch.arange(6)
    _, first = feed(axis.start(known, beam=2), everybody, 0)
    _, second = feed(first, everybody, 1)
    plain, _ = feed(second, everybody, 2)
    swapped, _ = feed(second.select(torch.tensor([1, 0, 3, 2, 5, 4])), torch.tensor([1, 0, 3, 2, 5, 4]), 2)
    torch.testing.assert_close(swapped, plain[:, [1, 0, 3, 2, 5, 4]], atol=1e-5, rtol=0)
    kept, _ = feed(second.keep(torch.tensor([0, 2])), torch.tensor([0, 1, 4, 5]), 2)
    torch.testing.assert_close(kept, plain[:, [0, 1, 4, 5]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", AXES)
def test_an_utterance_lies_the_same_alone_and_padded_in_a_batch(name):
    axis, tokens = make(name), torch.randint(1, VOCAB, (2, 5))
    together, long = audio([5, 14], 1), 14
    alone = Audio(lens=torch.tensor([5]), size=5, log_probs=together.log_probs[:1, :5])
    query = torch.randn(2, 5, DIM)
    weights = torch.zeros(LAYERS, 2, 5, long)
    weights[..., :5] = torch.rand(LAYERS, 2, 5, 5).softmax(-1)
    both, state = coordinates(axis, axis.start(together), tokens, query, weights)
    one, single = coordinates(axis, axis.start(alone), tokens[:1], query[:1], weights[:, :1, :, :5])
    torch.testing.assert_close(both[:, :1], one, atol=1e-5, rtol=0)
    torch.testing.assert_close(state.y[:1, :5], single.y, atol=1e-6, rtol=0)
    assert bool(state.y.isfinite().all())


def test_uniform_is_the_diagonal_and_rate_the_same_in_frames():
    uniform, known = make("uniform", length="rate", rate=2.5), audio([10])
    state = uniform.start(known)
    assert state.y[0].tolist() == pytest.approx([(j + 0.5) / 10 for j in range(10)])
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    x, _ = uniform.advance(tokens, state)
    assert x[0].tolist() == pytest.approx([(i + 0.5) / 4 for i in range(4)])  # 10 frames at 2.5 a token are 4 tokens
    frames, _ = make("rate", rate=2.5).advance(tokens, make("rate", rate=2.5).start(known))
    assert frames[0].tolist() == pytest.approx([10 * v - 0.5 for v in x[0].tolist()])
    beyond, _ = uniform.advance(torch.zeros(1, 9, dtype=torch.int64), state)
    assert beyond[0, -1] == state.y[0, -1]  # end of sentence, and what comes after a wrong estimate, stays with the last frame


def test_uniform_never_looks_at_the_true_length_in_evaluation_and_blurs_it_in_training():
    axis, known = make("uniform", length_noise=0.2), audio([12, 12])
    assert axis.needs_ctc() and torch.equal(axis.start(known).step, axis.start(known, token_lens=torch.tensor([3, 5])).step)
    assert axis.start(known).step.squeeze(1).tolist() == pytest.approx((1 / emissions(known).sum(1)).tolist())
    axis.train()
    assert not axis.needs_ctc()
    torch.manual_seed(1)
    counts = 1 / axis.start(Audio(lens=torch.full((4000,), 12), size=12), token_lens=torch.full((4000,), 100)).step
    assert float(counts.mean()) == pytest.approx(100, rel=0.02) and float(counts.std()) == pytest.approx(20, rel=0.1)
    exact = make("uniform", length_noise=0.0).train()
    assert exact.start(known, token_lens=torch.tensor([4, 0])).step.flatten().tolist() == [0.25, 1.0]
    with pytest.raises(ValueError, match="number of tokens"):
        axis.start(known)


def test_ctc_count_counts_what_a_sure_ctc_emits_and_places_the_emitting_frame_at_its_query():
    known = certain([0, 0, 2, 2, 0, 2, 3, 0])
    assert emissions(known)[0].tolist() == [0, 0, 1, 0, 0, 1, 1, 0]
    axis = make("ctc_count", round_centre=True)
    state = axis.start(known)
    assert state.y[0].tolist() == [0, 0, 0.5, 1, 1, 1.5, 2.5, 3]
    x, _ = axis.advance(torch.ones(1, 4, dtype=torch.int64), state)
    assert x[0].tolist() == [0.5, 1.5, 2.5, 3]
    smooth = make("ctc_count").start(known).y[0]
    assert bool((smooth.diff() > 0).all()) and torch.allclose(smooth, state.y[0], atol=0.01)


@pytest.mark.parametrize(("share", "frames"), [(1.0, 5), (0.5, 12), (0.2, 20)])
def test_ctc_count_equals_uniform_up_to_its_unit_when_ctc_emits_evenly(share, frames):
    posteriors = torch.zeros(1, frames, VOCAB)
    posteriors[..., 0] = 1 - share
    for t in range(frames):
        posteriors[0, t, 1 + t % 2] = share  # another token every frame, as if every frame emitted `share` of a token
    known = Audio(lens=torch.tensor([frames]), size=frames, log_probs=posteriors.log())
    count, uniform = make("ctc_count"), make("uniform", length="ctc")
    tokens = torch.ones(1, 4, dtype=torch.int64)
    state, shares = count.start(known), uniform.start(known)
    creep = 0.001 * (torch.arange(frames) + 0.5)
    torch.testing.assert_close(state.y[0] - creep, shares.y[0] * share * frames, atol=1e-5, rtol=0)
    inside = [i for i in range(4) if i + 0.5 <= share * (frames - 0.5)]
    ours, theirs = count.advance(tokens, state)[0], uniform.advance(tokens, shares)[0]
    torch.testing.assert_close(ours[:, inside], theirs[:, inside] * share * frames, atol=1e-3, rtol=0)  # the creep
    assert len(inside) > 1


def by_enumeration(log_probs: Tensor, prefix: tuple[int, ...]) -> float:
    """Mean frame, over all paths that begin with `prefix`, of the first frame by which its last label is complete."""
    frames, vocab = log_probs.shape
    total = mean = 0.0
    for path in itertools.product(range(vocab), repeat=frames):
        probability = math.exp(sum(float(log_probs[t, label]) for t, label in enumerate(path)))
        for t in range(frames):
            emitted = tuple(label for label, _ in itertools.groupby(path[: t + 1]) if label != 0)
            if emitted == prefix:
                total, mean = total + probability, mean + probability * t
                break
    return mean / total


@pytest.mark.parametrize("prefix", [(1,), (2,), (1, 2), (2, 2), (1, 2, 1)])
def test_ctc_prefix_is_the_mean_first_emission_over_all_paths(prefix):
    log_probs = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).mul(2).log_softmax(-1)
    known = Audio(lens=torch.tensor([5]), size=5, log_probs=log_probs.unsqueeze(0))
    axis = make("ctc_prefix")
    x, _ = axis.advance(torch.tensor([[VOCAB - 1, *prefix]]), axis.start(known))
    half = 0.5 * 5 / max(1.0, float(emissions(known).sum()))
    assert float(x[0, 0]) == pytest.approx(min(half, 4.0), abs=1e-5)
    for i in range(1, len(prefix) + 1):
        assert float(x[0, i]) == pytest.approx(min(by_enumeration(log_probs, prefix[:i]) + half, 4.0), abs=1e-4)


def test_ctc_prefix_follows_a_sure_ctc_and_ends_at_the_last_frame_when_no_frame_is_left():
    axis, known = make("ctc_prefix"), certain([0, 0, 2, 2, 0, 0, 3, 0, 0, 0])
    x, _ = axis.advance(torch.tensor([[VOCAB - 1, 2, 3, 1]]), axis.start(known))
    assert x[0, :3].tolist() == pytest.approx([2.5, 4.5, 8.5])  # two tokens in ten frames: half a token is 2.5 frames
    tiny = audio([1, 6])
    x, _ = axis.advance(torch.tensor([[VOCAB - 1, 2, 2, 2]] * 2), axis.start(tiny))
    assert x[0].tolist() == [0.0] * 4 and bool(x.isfinite().all())
    forward = CtcForward(log_probs=tiny.log_probs, enc_lens=tiny.lens, blank_id=0, beam=1)
    state = forward.extend(forward.start(), torch.tensor([2, 2]))
    mass, _ = forward.first_emission(state, torch.tensor([2, 2]))
    assert bool((mass[0] == -math.inf).all()) and bool((mass[1, 2:] > -math.inf).all())


def test_a_token_that_has_not_been_fed_yet_moves_nothing():
    for name in AXES:
        axis, known = make(name), audio([9, 7], 5)
        tokens, query = torch.randint(1, VOCAB, (2, 6)), torch.randn(2, 6, DIM)
        weights = torch.rand(LAYERS, 2, 6, 9).softmax(-1)
        before, _ = coordinates(axis, axis.start(known), tokens, query, weights)
        tokens[:, 4:], query[:, 4:] = 1 + tokens[:, 4:] % (VOCAB - 1), -query[:, 4:]
        after, _ = coordinates(axis, axis.start(known), tokens, query, weights)
        torch.testing.assert_close(after[..., :4], before[..., :4], atol=1e-6, rtol=0)


def test_monotonic_starts_with_steps_of_rate_frames_and_learns_them():
    config = CrossPenaltyConfig(shape="gaussian", sigma=2.0, axis="monotonic", rate=3.5)
    axis = AXES["monotonic"](config=config, num_layers=2, dim=DIM)
    state, query = axis.start(audio([20])), torch.randn(1, 4, DIM)
    x, _ = axis.at_layer(1, query, None, state)
    assert x[0].tolist() == pytest.approx([3.5, 7.0, 10.5, 14.0], abs=1e-5)
    x.sum().backward()
    assert all(p.ndim == 1 for p in axis.parameters()), "a 2-D parameter would be decayed towards another step"
    assert axis.bias.grad[0] == 0 and axis.bias.grad[1] > 0 and bool((axis.weight[1].grad != 0).all())
    plain = CrossPenaltyConfig(shape="gaussian", sigma=2.0, axis="monotonic")
    first, _ = AXES["monotonic"](config=plain, num_layers=1, dim=DIM).at_layer(0, query, None, axis.start(audio([20])))
    assert first[0, 0].item() == pytest.approx(5.0, abs=1e-5)


def test_monotonic_has_the_gradient_it_says():
    axis = make("monotonic").double()
    query = torch.randn(1, 3, DIM, dtype=torch.float64, requires_grad=True)

    def centres(query: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in axis.named_parameters()]
        state = axis.start(audio([200]))
        return torch.func.functional_call(
            _AtLayer(axis, state), {f"axis.{n}": p for n, p in zip(names, parameters, strict=True)}, (query,)
        )

    assert torch.autograd.gradcheck(centres, (query, *axis.parameters()))


class _AtLayer(torch.nn.Module):
    def __init__(self, axis: Axis, state: AxisState) -> None:
        super().__init__()
        self.axis, self.state = axis, state

    def forward(self, query: Tensor) -> Tensor:
        x, _ = self.axis.at_layer(1, query, None, self.state)
        assert x is not None
        return x


def test_lower_layer_looks_where_the_layer_below_looked_and_passes_no_gradient_on():
    axis = make("lower_layer")
    state = axis.start(audio([4]))
    assert axis.at_layer(0, torch.zeros(1, 1, DIM), None, state)[0] is None
    below = torch.tensor([[[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]], requires_grad=True)
    x, _ = axis.at_layer(1, torch.zeros(1, 2, DIM), below, state)
    assert x.tolist() == [[1.5, 3.0]] and not x.requires_grad


@pytest.mark.parametrize("name", SHARED)
def test_axes_measured_by_ctc_pass_no_gradient_on_and_ask_for_ctc_only_when_they_need_it(name):
    axis = make(name, length="rate") if name in ("uniform", "rate") else make(name)
    assert axis.needs_ctc() == (name in ("ctc_count", "ctc_prefix"))
    known = audio([6])
    known.log_probs.requires_grad_(True)
    given_ctc = known if axis.needs_ctc() else Audio(lens=known.lens, size=known.size)
    x, state = axis.advance(torch.ones(1, 3, dtype=torch.int64), axis.start(given_ctc))
    assert not x.requires_grad and not state.y.requires_grad and not emissions(known).requires_grad
