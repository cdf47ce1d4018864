"""What is decoded: a model and features, written to one file that workers of every toolkit read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speechtx.config.schema import DecoderConfig, EncoderConfig, ModelConfig, SubsamplingConfig
from speechtx.data.loader import FeatureReader
from speechtx.data.manifest import load_manifest
from speechtx.experiment.experiment import Experiment
from speechtx.model.recognizer import Recognizer

MEL_BINS = 80
VOCAB = 30
NEVER = -1.0e4


def _shape(*, dim: int, ff_dim: int, encoder: int, decoder: int) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderConfig(
            layers=encoder, dim=dim, heads=4, ff_dim=ff_dim, subsampling=SubsamplingConfig(channels=dim), dropout=0.0
        ),
        decoder=DecoderConfig(layers=decoder, heads=4, ff_dim=ff_dim, dropout=0.0),
    )


SHAPES = {
    "small": _shape(dim=144, ff_dim=576, encoder=6, decoder=3),
    "AN4": _shape(dim=256, ff_dim=2048, encoder=12, decoder=6),
    "tiny": _shape(dim=16, ff_dim=32, encoder=1, decoder=1),  # only shows that everything runs
}


@dataclass
class Case:
    """One thing to decode.

    Attributes:
        config: `ModelConfig` as JSON.
        weights: of the `Recognizer`.
        pieces: the tokens, `<blank>` first and `<sos/eos>` last.
        feats: per utterance (T, F), normalised.
        tokens: per utterance how many tokens its reference has: the length of a forced search.
        lm: a Transformer language model's directory; one with random weights if None.
        ngram: an ARPA file.
        frame_shift_ms: of the features.
        encoder_bias: (1 or H, 2L - 1) what every layer of encoder self-attention adds to its logits by offset, if the model has
            such a penalty: for toolkits that have none of their own.
    """

    config: str
    weights: dict[str, Tensor]
    pieces: list[str]
    feats: list[Tensor]
    tokens: list[int]
    lm: str | None = None
    ngram: str | None = None
    frame_shift_ms: float = 10.0
    encoder_bias: Tensor | None = None

    def save(self, path: Path) -> Path:
        torch.save(vars(self), path)
        return path

    @staticmethod
    def load(path: str) -> Case:
        return Case(**torch.load(path, weights_only=True))

    def recognizer(self) -> Recognizer:
        model = Recognizer(
            config=ModelConfig.model_validate_json(self.config),
            num_mel_bins=self.feats[0].shape[1],
            vocab_size=len(self.pieces),
            frame_shift_ms=self.frame_shift_ms,
        )
        model.load_state_dict(self.weights)
        return model.eval()

    def some(self, count: int) -> list[int]:
        """`count` utterances, evenly spaced in the order of length."""
        count = min(count, len(self.feats))
        order = sorted(range(len(self.feats)), key=lambda utt: len(self.feats[utt]))
        return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]


def random_case(shape: str, lengths: list[tuple[int, int]], feats: list[Tensor] | None = None) -> Case:
    """A model with random weights that never wants to end: with such a decoder only the limit of the length ends a sentence.

    Args:
        shape: a name of `SHAPES`.
        lengths: per utterance frames and tokens.
        feats: noise if None.
    """
    torch.manual_seed(0)
    config = SHAPES[shape]
    model = Recognizer(config=config, num_mel_bins=MEL_BINS, vocab_size=VOCAB)
    assert model.decoder is not None
    model.decoder.output.bias.data[model.sos_eos_id] = NEVER
    if feats is None:
        feats = [torch.randn(frames, MEL_BINS) for frames, _ in lengths]
    pieces = ["<blank>", "<unk>", *(chr(ord("a") + i) for i in range(VOCAB - 3)), "<sos/eos>"]
    return Case(config.model_dump_json(), model.state_dict(), pieces, feats, [tokens for _, tokens in lengths])


def trained_case(exp: Experiment, data: Path) -> tuple[Case, list[str]]:
    """A trained model and a data directory's utterances, with their ids."""
    model = exp.load_model()
    reader = FeatureReader(
        config=exp.config.features, num_mel_bins=exp.fbank.num_mel_bins, global_cmvn=exp.global_cmvn, data_dir=data
    )
    utterances = load_manifest(data)
    texts = dict(line.rstrip("\n").partition(" ")[::2] for line in (data / "text").open(encoding="utf-8"))
    case = Case(
        config=exp.config.model.model_dump_json(),
        weights=model.state_dict(),
        pieces=list(exp.tokenizer.pieces),
        feats=[torch.from_numpy(reader(utterance)) for utterance in utterances],
        tokens=[len(exp.tokenizer.encode(texts[utterance.id])) for utterance in utterances],
        frame_shift_ms=exp.fbank.frame_shift_ms,
    )
    penalty = model.encoder.attention_penalty
    if len(penalty.layers) == penalty.num_layers and penalty.config.learnable == "none":
        case.encoder_bias = penalty.by_offset(0, max(len(feats) for feats in case.feats)).detach()
    return case, [utterance.id for utterance in utterances]
