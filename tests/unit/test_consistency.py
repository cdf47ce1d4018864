"""CR-CTC: two views of an utterance that share their time warp and nothing else, and a loss that makes them agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_corpus import BINS, make_training_data, tiny_config

from speechtx.config.errors import ConfigError
from speechtx.config.schema import ConsistencyConfig, FeaturesConfig, SpecAugmentConfig
from speechtx.data.loader import Corpus, FeatureReader
from speechtx.data.manifest import load_manifest
from speechtx.frontend.specaugment import spec_augment
from speechtx.model.losses import consistency_loss
from speechtx.model.recognizer import Recognizer
from speechtx.training.prepare import TrainingData
from speechtx.training.train import train

ONLY_WARP = SpecAugmentConfig(num_freq_masks=0, num_time_masks=0)
ONLY_MASKS = SpecAugmentConfig(time_warp=0, freq_mask_width=4, time_mask_width=10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_training_data(tmp_path_factory.mktemp("toy"))


def make_corpus(data: TrainingData, specaugment: SpecAugmentConfig | None, *, views: int = 2, epoch: int = 1) -> Corpus:
    utterances = load_manifest(data.train)
    reader = FeatureReader(config=FeaturesConfig(cmvn="none"), num_mel_bins=BINS)
    tokens = [[1 + i % 3, 2] for i in range(len(utterances))]
    return Corpus(utterances=utterances, tokens=tokens, reader=reader, specaugment=specaugment, seed=5, views=views).at_epoch(
        epoch
    )


def random_log_probs(rows: int, frames: int = 6, vocab: int = 5) -> torch.Tensor:
    return torch.randn(rows, frames, vocab, generator=torch.Generator().manual_seed(1)).log_softmax(dim=-1)


# ------------------------------------------------------------------------------------------------ views


def test_a_batch_holds_every_utterance_twice_and_its_tokens_with_it(data: TrainingData) -> None:
    batch = make_corpus(data, ONLY_MASKS).batch([3, 0, 7])
    assert batch.ids[:3] == batch.ids[3:]
    assert torch.equal(batch.feat_lens[:3], batch.feat_lens[3:])
    assert torch.equal(batch.tokens[:3], batch.tokens[3:])
    assert torch.equal(batch.token_lens[:3], batch.token_lens[3:])


def test_views_are_masked_differently(data: TrainingData) -> None:
    first, second = make_corpus(data, ONLY_MASKS).batch([3, 0, 7]).feats.chunk(2)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_share_the_time_warp_so_that_their_frames_correspond(data: TrainingData) -> None:
    first, second = make_corpus(data, ONLY_WARP).batch([3, 0, 7]).feats.chunk(2)
    unwarped = make_corpus(data, None).batch([3, 0, 7]).feats[:3]
    assert torch.equal(first, second)
    assert not torch.equal(first, unwarped)


def test_views_depend_on_the_utterance_and_the_epoch_not_on_the_batch(data: TrainingData) -> None:
    corpus = make_corpus(data, SpecAugmentConfig())
    length = corpus.utterances[3].num_frames
    alone = corpus.batch([3]).feats
    among = corpus.batch([0, 3, 7]).feats[[1, 4], :length]
    assert torch.equal(alone, among)
    assert not torch.equal(alone, make_corpus(data, SpecAugmentConfig(), epoch=2).batch([3]).feats)


def test_one_view_is_drawn_as_it_was_before_there_were_two(data: TrainingData) -> None:
    corpus = make_corpus(data, SpecAugmentConfig(), views=1)
    feats = corpus.reader(corpus.utterances[3])
    expected = spec_augment(feats, SpecAugmentConfig(), np.random.default_rng([5, 1, 3]))
    assert np.array_equal(corpus.batch([3]).feats[0].numpy(), expected)


# ------------------------------------------------------------------------------------------------ loss


def test_consistency_is_the_papers_sum_over_frames_of_both_directions() -> None:
    log_probs, lens = random_log_probs(4), torch.tensor([6, 3, 6, 3])
    expected = 0.0
    for utterance in range(2):
        for frame in range(int(lens[utterance])):
            a, b = log_probs[utterance, frame].double(), log_probs[2 + utterance, frame].double()
            expected += float((b.exp() * (b - a)).sum() + (a.exp() * (a - b)).sum())
    assert float(consistency_loss(log_probs, lens)) == pytest.approx(expected, rel=1e-5)


def test_equal_views_have_no_consistency_loss_and_padding_never_counts() -> None:
    view, lens = random_log_probs(2), torch.tensor([6, 3])
    assert float(consistency_loss(torch.cat((view, view)), torch.cat((lens, lens)))) == pytest.approx(0.0, abs=1e-6)
    other = view.clone()
    other[1, 3:] = -torch.inf
    assert float(consistency_loss(torch.cat((view, other)), torch.cat((lens, lens)))) == pytest.approx(0.0, abs=1e-6)


def test_the_view_that_teaches_gets_no_gradient() -> None:
    """As cross entropy with the other view's distribution as a fixed target: the entropy of the target is a constant."""
    logits, lens = random_log_probs(4).requires_grad_(), torch.tensor([6, 3, 6, 3])
    (ours,) = torch.autograd.grad(consistency_loss(logits.log_softmax(dim=-1), lens), logits)
    mask = (torch.arange(6) < lens.unsqueeze(1)).unsqueeze(-1)
    targets = logits.detach().softmax(dim=-1).roll(2, dims=0)
    (plain,) = torch.autograd.grad(-(mask * targets * logits.log_softmax(dim=-1)).sum(), logits)
    torch.testing.assert_close(ours, plain)


def test_views_of_the_decoder_teach_each_other_and_learn_from_it() -> None:
    """R-Drop has no stop-gradient: its gradient is that of the formula as it is written, and not that of CR-CTC."""
    logits, lens = random_log_probs(4).requires_grad_(), torch.tensor([6, 3, 6, 3])
    log_probs = logits.log_softmax(dim=-1)
    (ours,) = torch.autograd.grad(consistency_loss(log_probs, lens, teachers_learn=True), logits, retain_graph=True)
    (one_sided,) = torch.autograd.grad(consistency_loss(log_probs, lens), logits, retain_graph=True)
    a, b = log_probs.chunk(2)
    mask = (torch.arange(6) < lens[:2].unsqueeze(1)).unsqueeze(-1)
    (plain,) = torch.autograd.grad((mask * (a.exp() - b.exp()) * (a - b)).sum(), logits)
    torch.testing.assert_close(ours, plain)
    assert not torch.allclose(ours, one_sided)


def test_the_decoders_weight_multiplies_what_is_added_to_its_loss() -> None:
    quiet = [f"model.{part}.{kind}=0.0" for part in ("encoder", "decoder") for kind in ("dropout", "positional_dropout")]
    torch.manual_seed(0)
    model = Recognizer(config=tiny_config(*quiet).model, num_mel_bins=BINS, vocab_size=7).train()
    feats, lens = torch.randn(4, 60, BINS), torch.tensor([60, 40, 60, 40])
    batch = (feats, lens, torch.tensor([[1, 2, 3], [4, 1, 0]] * 2), torch.tensor([3, 2, 3, 2]))
    logits = []
    model.decoder.output.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    without, both = (
        model(*batch, consistency=ConsistencyConfig(weight=0.2, decoder_weight=weight)).total.detach() for weight in (0.0, 1e4)
    )
    a, b = logits[0].detach().double().log_softmax(dim=-1).chunk(2)
    mask = (torch.arange(4) < torch.tensor([[4], [3]])).unsqueeze(-1)  # tokens and <eos>
    divergence = float((mask * (a.exp() - b.exp()) * (a - b)).sum())
    assert float(both - without) == pytest.approx(0.7 * 1e4 * divergence, rel=1e-3)


@pytest.mark.parametrize("without", [("model.decoder.layers=0", "model.ctc_weight=1.0"), ("model.decoder.type=mask_ctc",)])
def test_consistency_of_a_decoder_that_has_no_next_token_is_refused(without: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="decoder_weight needs a decoder of type attention"):
        tiny_config("training.consistency.decoder_weight=1.0", "training.average.by=dev_loss", *without)


@pytest.mark.parametrize("layers", [1, 0])
def test_the_weight_multiplies_what_is_added_to_ctc(layers: int) -> None:
    alone = ("model.ctc_weight=1.0", "training.average.by=dev_loss") if layers == 0 else ()
    config = tiny_config(f"model.decoder.layers={layers}", *alone).model
    torch.manual_seed(0)
    model = Recognizer(config=config, num_mel_bins=BINS, vocab_size=7).eval()
    feats, lens = torch.randn(4, 60, BINS), torch.tensor([60, 40, 60, 40])
    tokens, token_lens = torch.tensor([[1, 2, 3], [4, 1, 0]] * 2), torch.tensor([3, 2, 3, 2])
    enc_out, enc_lens = model.encode(feats, lens)
    divergence = consistency_loss(model.ctc_log_probs(enc_out), enc_lens).detach()
    without = model(feats, lens, tokens, token_lens)
    losses = model(feats, lens, tokens, token_lens, consistency=ConsistencyConfig(weight=0.5))
    assert float(divergence) > 0.0
    assert float((losses.total - without.total).detach()) == pytest.approx(config.ctc_weight * 0.5 * float(divergence), rel=1e-4)
    assert float(losses.ctc) == float(without.ctc)


def test_consistency_without_ctc_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compares CTC outputs, which model\.ctc_weight 0 never trains"):
        tiny_config("training.consistency.weight=0.2", "model.ctc_weight=0.0")


def test_training_pays_for_views_that_disagree_and_judges_dev_without_views(data: TrainingData, tmp_path: Path) -> None:
    train(tiny_config("training.consistency.weight=0.2", "training.epochs=1"), data, tmp_path)
    (epoch,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    def beyond_the_joint_loss(part: dict[str, float]) -> float:
        return part["loss"] - 0.3 * part["ctc"] - 0.7 * part["att"]

    assert beyond_the_joint_loss(epoch["train"]) > 1e-3
    assert beyond_the_joint_loss(epoch["dev"]) == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < epoch["train"]["acc"] < 1.0  # of both views' tokens
