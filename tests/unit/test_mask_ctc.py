"""Mask-CTC: a decoder that fills in hidden tokens, the search that corrects CTC with it, and how both are configured."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import CROSS
from torch import Tensor
from toy_corpus import make_training_data, tiny_config

import speechtx
from speechtx.bin.main import main
from speechtx.config.decode import DecodeConfig
from speechtx.config.errors import ConfigError
from speechtx.config.load import parse_config
from speechtx.config.penalty import AttentionPenaltyConfig, CrossPenaltyConfig, PenaltyConfig
from speechtx.config.schema import (
    AverageConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    SubsamplingConfig,
    TrainConfig,
)
from speechtx.model.recognizer import Recognizer
from speechtx.search.decode import check_method, decode_batch
from speechtx.search.hypothesis import Hypothesis
from speechtx.search.mask_ctc import mask_ctc
from speechtx.training.averaging import average_checkpoints
from speechtx.training.train import train

VOCAB = 9
BLANK, END = 0, VOCAB - 1
BINS = 20


def make_model(kind: str = "mask_ctc", layers: int = 2, **penalty: PenaltyConfig | str) -> Recognizer:
    """A random model in evaluation mode whose CTC is neither sure nor flat."""
    torch.manual_seed(3)
    config = ModelConfig(
        encoder=EncoderConfig(layers=1, dim=16, heads=2, ff_dim=32, subsampling=SubsamplingConfig(channels=4)),
        decoder=DecoderConfig(type=kind, layers=layers, heads=2, ff_dim=32),
        attention_penalty=AttentionPenaltyConfig(**penalty),
    )
    model = Recognizer(config=config, num_mel_bins=BINS, vocab_size=VOCAB).eval()
    with torch.no_grad():
        model.ctc.weight.mul_(4)
        model.decoder.output.weight.mul_(4)
    return model


def encoded(lens: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Encoder outputs, with padding that would show."""
    enc_out = torch.randn(len(lens), max(lens), 16, generator=torch.Generator().manual_seed(seed))
    return enc_out, torch.tensor(lens)


# ------------------------------------------------------------------------------------------------ the plain twin


@torch.no_grad()
def plain_mask_ctc(model: Recognizer, enc_out: Tensor, config: DecodeConfig) -> Hypothesis:
    """The search for one utterance (S, D), one obvious line after the other, the decoder run from scratch in every round."""
    log_probs = model.ctc_log_probs(enc_out.unsqueeze(0))
    frames = [max((float(p), label) for label, p in enumerate(frame[:END])) for frame in log_probs[0].tolist()]
    tokens: list[int] = []
    decided: list[float] = []
    for label, run in itertools.groupby(frames, key=lambda frame: frame[1]):
        if label != BLANK:
            tokens.append(label)
            decided.append(max(p for p, _ in run))
    hidden = [i for i, p in enumerate(decided) if float(torch.tensor(p).exp()) < config.mask_threshold]
    ctc = sum(p for i, p in enumerate(decided) if i not in hidden)
    att = 0.0 if hidden else None
    for i in hidden:
        tokens[i] = BLANK
    for to_come in range(min(len(hidden), config.mask_iterations), 0, -1):
        logits = model.decoder(
            torch.tensor([tokens]),
            torch.tensor([len(tokens)]),
            enc_out.unsqueeze(0),
            torch.tensor([len(enc_out)]),
            ctc_log_probs=log_probs if model.decoder.needs_ctc else None,
        )[0]
        guesses = []
        for i in hidden:
            p, label = max((float(p), label) for label, p in enumerate(logits[i].log_softmax(-1)) if label not in (BLANK, END))
            guesses.append((-p, i, label))
        for minus, i, label in sorted(guesses)[: math.ceil(len(hidden) / to_come)]:
            tokens[i] = label
            hidden.remove(i)
            att -= minus
    return Hypothesis(tokens=tuple(tokens), score=ctc + (att or 0.0), ctc=ctc, att=att)


def same(found: Hypothesis, wanted: Hypothesis) -> bool:
    scores = [(found.score, wanted.score), (found.ctc, wanted.ctc)]
    assert (found.att is None) == (wanted.att is None)
    if found.att is not None:
        scores.append((found.att, wanted.att))
    return found.tokens == wanted.tokens and all(a == pytest.approx(b, abs=1e-4) for a, b in scores)


@settings(deadline=None, max_examples=40)
@given(
    lens=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    rounds=st.integers(1, 6),
)
def test_the_batched_search_finds_what_the_plain_one_does(lens: list[int], seed: int, threshold: float, rounds: int) -> None:
    model = make_model()
    enc_out, enc_lens = encoded(lens, seed)
    config = DecodeConfig(method="mask_ctc", mask_threshold=threshold, mask_iterations=rounds)
    for row, nbest in enumerate(mask_ctc(model, enc_out, enc_lens, config)):
        assert same(nbest[0], plain_mask_ctc(model, enc_out[row, : lens[row]], config))


@pytest.mark.parametrize("axis", sorted(set(CROSS) - {"ctc_prefix"}))
def test_the_search_pays_the_penalties_that_training_pays(axis: str) -> None:
    model = make_model(layers=3, cross=CROSS[axis], decoder_self=PenaltyConfig(shape="linear", window=2))
    enc_out, enc_lens = encoded([17, 24, 9], 1)
    config = DecodeConfig(method="mask_ctc", mask_threshold=0.9, mask_iterations=3)
    for row, nbest in enumerate(mask_ctc(model, enc_out, enc_lens, config)):
        assert same(nbest[0], plain_mask_ctc(model, enc_out[row, : enc_lens[row]], config))


# ------------------------------------------------------------------------------------------------ the search


def test_silence_is_an_empty_hypothesis_beside_others() -> None:
    model = make_model()
    enc_out, enc_lens = encoded([12, 12], 0)
    enc_out[0] = 0.0
    with torch.no_grad():
        model.ctc.bias[BLANK] = 5.0  # what a frame of zeros says
        enc_out[1] *= 4.0
    config = DecodeConfig(method="mask_ctc")
    (silence,), (speech,) = mask_ctc(model, enc_out, enc_lens, config)
    assert silence.tokens == () and silence.score == 0.0 and silence.att is None
    assert speech.tokens
    assert [h.tokens for (h,) in mask_ctc(model, enc_out[:1], enc_lens[:1], config)] == [()]


def test_output_that_is_not_finite_gives_no_hypothesis() -> None:
    model = make_model()
    enc_out, enc_lens = encoded([12, 12], 0)
    enc_out[0, 3] = torch.nan
    broken, good = mask_ctc(model, enc_out, enc_lens, DecodeConfig(method="mask_ctc"))
    assert broken == [] and len(good) == 1
    with torch.no_grad():
        model.decoder.output.bias.fill_(torch.nan)
    assert mask_ctc(model, *encoded([12], 0), DecodeConfig(method="mask_ctc", mask_threshold=1.0)) == [[]]


@pytest.mark.parametrize(("rounds", "passes"), [(1, 1), (3, 3), (100, "hidden")])
def test_the_decoder_makes_no_more_passes_than_rounds_and_hidden_tokens(
    rounds: int, passes: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    calls: list[list[int]] = []
    score = model.decoder.score

    def counting(tokens: Tensor, *args: object) -> Tensor:
        calls.append((tokens == BLANK).sum(dim=1).tolist())
        return score(tokens, *args)

    monkeypatch.setattr(model.decoder, "score", counting)
    enc_out, enc_lens = encoded([40], 2)
    mask_ctc(model, enc_out, enc_lens, DecodeConfig(method="mask_ctc", mask_threshold=1.0, mask_iterations=rounds))
    hidden = [row for (row,) in calls]
    assert hidden[0] > 3
    assert len(calls) == (hidden[0] if passes == "hidden" else passes)
    shares = [before - after for before, after in itertools.pairwise([*hidden, 0])]
    assert max(shares) - min(shares) <= 1  # evenly


def test_a_threshold_of_zero_is_the_greedy_output() -> None:
    model = make_model()
    feats, lens = torch.randn(3, 80, BINS), torch.tensor([80, 61, 70])
    ours = decode_batch(model, feats, lens, DecodeConfig(method="mask_ctc", mask_threshold=0.0))
    greedy = decode_batch(model, feats, lens, DecodeConfig(method="ctc_greedy"))
    assert [h.tokens for (h,) in ours] == [h.tokens for (h,) in greedy]


@pytest.mark.parametrize(
    ("kind", "method", "advice"),
    [
        ("attention", "mask_ctc", "has one of type attention; train one with --set model.decoder.type=mask_ctc"),
        ("mask_ctc", "beam", "decode with method mask_ctc"),
        ("mask_ctc", "attention_rescoring", "decode with method mask_ctc"),
    ],
)
def test_a_search_the_decoder_was_not_trained_for_is_refused_with_what_to_do(kind: str, method: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_method(make_model(kind), DecodeConfig(method=method))
    for other in ("ctc_greedy", "ctc_beam"):
        check_method(make_model(kind), DecodeConfig(method=other))


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {decoder: {type: mask_ctc}, ctc_weight: 0.0}", "corrects the CTC output, which ctc_weight 0 never trains"),
        ("model: {decoder: {type: mask_ctc, layers: 0}, ctc_weight: 1.0}", "needs a decoder, but decoder.layers is 0"),
        (
            "model: {decoder: {type: mask_ctc}, attention_penalty: {cross: {shape: gaussian, sigma: 2.0, axis: ctc_prefix}}}",
            "axis ctc_prefix follows the tokens before each position",
        ),
    ],
)
def test_what_mask_ctc_cannot_do_is_refused_before_training(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(text, TrainConfig)


@pytest.mark.parametrize("recipe", ["mini", "an4"])
def test_stage_0_accepts_the_recipes_decoding_file_with_one_switch_and_refuses_it_without(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = Path(__file__).parents[2] / "egs" / recipe / "asr1" / "conf"
    arguments = ["check", "--exp", str(tmp_path / "exp"), "--data", str(tmp_path / "data"), "--config", str(conf / "train.yaml")]
    arguments += ["--fbank-config", str(conf / "fbank.yaml"), "--decode-config"]
    switch = ["--set", "model.decoder.type=mask_ctc"]
    refusal = "method mask_ctc needs a decoder of type mask_ctc"
    main([*arguments, str(conf / "mask_ctc.yaml"), *switch])
    assert refusal not in (out := capsys.readouterr().out) and "parameters" in out
    assert main([*arguments, str(conf / "mask_ctc.yaml")]) == 1
    assert refusal in capsys.readouterr().out
    assert main([*arguments, str(conf / "decode.yaml"), *switch]) == 1
    assert "decode with method mask_ctc" in capsys.readouterr().out


def test_training_decoding_and_transcribing_work_with_the_one_switch(tmp_path: Path) -> None:
    data, exp = make_training_data(tmp_path), tmp_path / "exp"
    train(tiny_config("model.decoder.type=mask_ctc"), data, exp)
    epochs = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0 <= epoch[part]["acc"] <= 1.0 for epoch in epochs for part in ("train", "dev"))
    average_checkpoints(exp, AverageConfig(num=2, by="dev_acc"))
    (tmp_path / "decode.yaml").write_text("method: mask_ctc\nmask_threshold: 1.0\n")
    arguments = ["decode", "--exp", str(exp), "--data", str(data.dev), "--config", str(tmp_path / "decode.yaml")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    nbest = [json.loads(line) for line in (tmp_path / "out/nbest.jsonl").read_text().splitlines()]
    assert len(nbest) == 6
    recognizer = speechtx.load_recognizer(exp, device="cpu")
    assert recognizer.decode.method == "mask_ctc"
    assert isinstance(recognizer.transcribe((np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32), 16000)), str)
    with pytest.raises(ConfigError, match="decode with method mask_ctc"):
        speechtx.load_recognizer(exp, device="cpu", decode=DecodeConfig())


@pytest.mark.parametrize(
    ("backend", "penalty"),
    [
        ("auto", "{shape: log, symmetric: false, scale_right: 3.0}"),
        ("blocks", "{shape: log, window: 2}"),
        ("fold", "{shape: gaussian, sigma: 3.0}"),
    ],
)
def test_penalties_and_backends_that_a_causal_decoder_cannot_have_are_right_for_this_one(backend: str, penalty: str) -> None:
    tokens, lens = torch.tensor([[3, BLANK, 5, 6, 2, 1, 4]]), torch.tensor([7])
    logits = []
    for name in (backend, "eager"):
        text = f"decoder: {{type: mask_ctc}}\nattention_penalty: {{backend: {name}, decoder_self: {penalty}}}"
        sites = parse_config(text, ModelConfig).attention_penalty
        model = make_model(backend=sites.backend, decoder_self=sites.decoder_self)
        with torch.no_grad():
            logits.append(model.decoder(tokens, lens, *encoded([20], 0)))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_cross_attention_penalties_on_every_other_axis_are_accepted() -> None:
    for axis in sorted(set(CROSS) - {"ctc_prefix"}):
        assert isinstance(make_model(layers=3, cross=CROSS[axis]).config.attention_penalty.cross, CrossPenaltyConfig)
