"""What penalties cost a whole model, in training and in search."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernels import HEADS, LOG
from benchmarks.side_by_side import Candidates, Report, Size, alternate, ratio, spread
from speechtx.config.decode import DecodeConfig
from speechtx.config.penalty import AttentionPenaltyConfig, CrossPenaltyConfig
from speechtx.config.schema import DecoderConfig, EncoderConfig, ModelConfig, SubsamplingConfig
from speechtx.model.recognizer import Recognizer
from speechtx.search.beam import beam_search


def make_model(size: Size, penalty: AttentionPenaltyConfig) -> Recognizer:
    """ESPnet's AN4 Transformer: 12 + 6 layers of 256, 27 million parameters."""
    wide = size.model_dim >= 256
    config = ModelConfig(
        encoder=EncoderConfig(
            layers=12 if wide else 2,
            dim=size.model_dim,
            heads=HEADS,
            ff_dim=8 * size.model_dim,
            subsampling=SubsamplingConfig(channels=size.model_dim),
        ),
        decoder=DecoderConfig(layers=6 if wide else 1, heads=HEADS, ff_dim=8 * size.model_dim),
        attention_penalty=penalty,
    )
    torch.manual_seed(0)
    return Recognizer(config=config, num_mel_bins=80, vocab_size=30)


def penalties() -> dict[str, AttentionPenaltyConfig]:
    """What a model may pay; the first is the base."""
    return {
        "none": AttentionPenaltyConfig(),
        "log": AttentionPenaltyConfig(encoder_self=LOG, decoder_self=LOG),
        "ctc_count": AttentionPenaltyConfig(cross=CrossPenaltyConfig(shape="gaussian", sigma=3.0, axis="ctc_count")),
    }


def training_step(model: Recognizer, batch: Sequence[Tensor]) -> Callable[[], object]:
    """Forward, backward and optimiser."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = model(*batch)
        (losses.total / losses.num_tokens).backward()
        optimizer.step()

    return step


def measure_model(report: Report, size: Size) -> None:
    """A training step with penalties over one without."""
    count, tokens = 4, max(2, size.frames // 20)
    batch = (
        torch.randn(count, size.frames, 80),
        torch.full((count,), size.frames),
        torch.randint(1, 29, (count, tokens)),
        torch.full((count,), tokens),
    )
    steps = {name: training_step(make_model(size, penalty).train(), batch) for name, penalty in penalties().items()}
    times = alternate(steps, repeats=size.model_repeats)
    report.add(
        f"Training step of the AN4 Transformer, ms ({count} x {size.frames} frames, d {size.model_dim}, with dropout and AdamW)",
        ["penalty", "step", "over none"],
        [[name, f"{statistics.median(times[name]):.0f}", f"{ratio(times, name, 'none'):.3f}"] for name in times],
        f"Ratios of the rounds, smallest to largest: {spread(times)}. `log` is on encoder and decoder self-attention, "
        "`ctc_count` (gaussian, one head) on cross-attention.",
    )


def measure_decoding(report: Report, size: Size) -> None:
    """Beam search of a given number of steps, with the penalty inside and without."""
    torch.manual_seed(1)
    feats, lens = torch.randn(1, size.frames, 80), torch.tensor([size.frames])
    # A bonus that no ending can beat forces the greatest length, the same for all.
    config = DecodeConfig(beam=10, ctc_weight=0.3, length_bonus=50.0, max_len_ratio=0.2)
    searches: Candidates = {}
    for name, penalty in penalties().items():
        model = make_model(size, penalty).eval()
        with torch.inference_mode():
            encoded = model.encode(feats, lens)
        searches[name] = lambda model=model, encoded=encoded: beam_search(model, *encoded, config)
    lengths = {name: len(search()[0][0].tokens) for name, search in searches.items()}  # type: ignore[index]
    assert len(set(lengths.values())) == 1, f"searches of different lengths cannot be compared: {lengths}"
    times = alternate(searches, repeats=size.model_repeats)
    steps = lengths["none"] + 1
    report.add(
        f"Joint CTC/attention beam search, beam 10, ms a step (one utterance of {size.frames} frames, {steps} steps)",
        ["penalty", "a step", "over none"],
        [[name, f"{statistics.median(times[name]) / steps:.2f}", f"{ratio(times, name, 'none'):.3f}"] for name in times],
        f"Ratios of the rounds, smallest to largest: {spread(times)}.",
    )
