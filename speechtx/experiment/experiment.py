"""What lies in an experiment directory, and how to open it again without the recipe that made it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from speechtx.config.errors import ExperimentError
from speechtx.config.load import load_config
from speechtx.config.schema import FbankConfig, TrainConfig
from speechtx.data.ark import read_ark
from speechtx.frontend.cmvn import CmvnStats
from speechtx.model.recognizer import Recognizer
from speechtx.text.phones import Phones
from speechtx.text.tokenizer import Tokenizer

LEXICON = "lexicon.txt"


@dataclass(frozen=True)
class Experiment:
    """A trained, or half-trained, model's directory; the layout is drawn in docs/architecture.md."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> Experiment:
        """Checks that `path` is an experiment directory.

        Raises:
            ExperimentError: a part is missing; the message names it and the stage that makes it.
        """
        path = Path(path)
        for name in ("config.yaml", "fbank.yaml", "tokenizer/tokens.txt"):
            if not (path / name).is_file():
                raise ExperimentError(f"{path} is not an experiment directory: {name} is missing (stage train makes it)")
        return cls(path)

    @cached_property
    def config(self) -> TrainConfig:
        return load_config(self.path / "config.yaml", TrainConfig)

    @cached_property
    def fbank(self) -> FbankConfig:
        return load_config(self.path / "fbank.yaml", FbankConfig)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer")

    @cached_property
    def phones(self) -> Phones | None:
        """What intermediate CTC predicts; None when those are tokens, or there is none."""
        lexicon, path = self.config.model.phone_lexicon, self.path / LEXICON
        if lexicon is None:
            return None
        if not path.is_file():
            raise ExperimentError(f"{path}: missing, and the model predicts its phones; copy {lexicon} there again")
        return Phones.load(path)

    @cached_property
    def global_cmvn(self) -> CmvnStats | None:
        """Statistics of the training set; None when the model does not use them."""
        if self.config.features.cmvn != "global":
            return None
        path = self.path / "global_cmvn.ark"
        if not path.is_file():
            raise ExperimentError(f"{path}: missing, and the model was trained with global CMVN")
        matrices = dict(read_ark(path, dtype=np.float64))
        if list(matrices) != ["global"]:
            raise ExperimentError(f"{path}: expected one matrix with key `global`, found {list(matrices)}")
        return CmvnStats.from_matrix(matrices["global"])

    def new_model(self) -> Recognizer:
        """The model with fresh random weights."""
        return Recognizer(
            config=self.config.model,
            num_mel_bins=self.fbank.num_mel_bins,
            vocab_size=self.tokenizer.vocab_size,
            frame_shift_ms=self.fbank.frame_shift_ms,
            num_phones=len(self.phones or ()),
        )

    def load_model(self, weights: str | Path | None = None, device: str | torch.device = "cpu") -> Recognizer:
        """The model in evaluation mode.

        Args:
            weights: a file with a state dict, or a checkpoint; by default the averaged weights of stage 5, `model.pt`.
            device: where to put it.

        Raises:
            ExperimentError: the file is missing, is not a weights file, or belongs to a model of another shape.
        """
        path = Path(weights) if weights is not None else self.path / "model.pt"
        model = self.new_model()
        load_weights(model, path)
        return model.to(device).eval()


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Loads a state dict into `model`, refusing anything but tensors (`weights_only`).

    Raises:
        ExperimentError: see `Experiment.load_model`.
    """
    if not path.is_file():
        raise ExperimentError(f"{path}: no such weights; stage average makes model.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many kinds: pickle, zip, runtime errors
        raise ExperimentError(f"{path}: not a file of weights, or a damaged one ({type(err).__name__}: {err})") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state.get("ema") or state["model"]  # a resumable checkpoint: what the dev set judged
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as err:
        raise ExperimentError(f"{path}: these weights belong to a model of another shape: {err}") from None
