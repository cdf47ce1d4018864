"""One toolkit's training step, in a process of its own that does a step whenever it is told to.

Reads a `Spec` as JSON from the first line of stdin, then the number of a batch from every line that follows; answers each line
with one JSON object. So several toolkits, each with its own Python, can take turns on one machine. Needs PyTorch and the toolkit
it is told to build, nothing else: it is run by other installations' Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEL_BINS = 80
Lengths = tuple[list[int], list[int]]  # frames and tokens of the utterances of a batch


@dataclass(frozen=True)
class Shape:
    """Of a model; the names are speechtx's."""

    dim: int = 256
    ff_dim: int = 2048
    encoder_layers: int = 12
    decoder_layers: int = 6
    heads: int = 4
    vocab: int = 30
    type: str = "transformer"
    front_end: str = "conv2d"
    factor: int = 4
    channels: int = 256


@dataclass(frozen=True)
class Spec:
    """What a worker measures; `rank` and `size` are of data-parallel processes."""

    toolkit: str
    shape: Shape
    batches: list[Lengths]
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    rank: int = 0
    size: int = 1
    port: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        raw = json.loads(text)
        return cls(**{**raw, "shape": Shape(**raw["shape"])})


@dataclass
class Toolkit:
    """A model in training mode and how its own trainer takes a step."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Sequence[Tensor]], Tensor]  # of feats, feat_lens, tokens, token_lens
    sum_gradients: Callable[[], None] = lambda: None


def build_speechtx(spec: Spec) -> Toolkit:
    """This toolkit's Transformer or Conformer with its optimiser, as `speechtx train` builds them."""
    from speechtx.config.schema import DecoderConfig, EncoderConfig, ModelConfig, OptimizerConfig, SubsamplingConfig
    from speechtx.model.recognizer import Recognizer
    from speechtx.training.distributed import World
    from speechtx.training.optim import build_optimizer

    shape = spec.shape
    front_end = SubsamplingConfig.model_validate({"type": shape.front_end, "factor": shape.factor, "channels": shape.channels})
    encoder = {"type": shape.type, "layers": shape.encoder_layers, "dim": shape.dim, "heads": shape.heads, "ff_dim": shape.ff_dim}
    config = ModelConfig(
        encoder=EncoderConfig.model_validate({**encoder, "subsampling": front_end}),
        decoder=DecoderConfig(layers=shape.decoder_layers, heads=shape.heads, ff_dim=shape.ff_dim),
    )
    device = torch.device(spec.device)
    model = Recognizer(config=config, num_mel_bins=MEL_BINS, vocab_size=shape.vocab).to(device).train()
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    world = World(rank=spec.rank, size=spec.size, device=device)
    parameters = list(model.parameters())

    def loss(batch: Sequence[Tensor]) -> Tensor:
        losses = model(*batch)
        return losses.total / losses.num_tokens

    optimizer = build_optimizer(model, OptimizerConfig(name="adam"), device)
    return Toolkit(model, optimizer, loss, lambda: world.sum_gradients(parameters))


def build_espnet(spec: Spec) -> Toolkit:
    """ESPnet2's Transformer with the optimiser of its AN4 recipe."""
    from espnet2.asr.ctc import CTC
    from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
    from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
    from espnet2.asr.espnet_model import ESPnetASRModel

    shape = spec.shape
    if (shape.type, shape.front_end, shape.factor, shape.channels) != ("transformer", "conv2d", 4, shape.dim):
        raise ValueError("ESPnet's conv2d has as many channels as the model is wide")
    layers = {"attention_heads": shape.heads, "linear_units": shape.ff_dim}
    model = ESPnetASRModel(
        vocab_size=shape.vocab,
        token_list=["<blank>", "<unk>", *map(str, range(shape.vocab - 3)), "<sos/eos>"],
        frontend=None,
        specaug=None,
        normalize=None,
        preencoder=None,
        encoder=TransformerEncoder(
            input_size=MEL_BINS, output_size=shape.dim, num_blocks=shape.encoder_layers, input_layer="conv2d", **layers
        ),
        postencoder=None,
        decoder=TransformerDecoder(
            vocab_size=shape.vocab, encoder_output_size=shape.dim, num_blocks=shape.decoder_layers, **layers
        ),
        ctc=CTC(odim=shape.vocab, encoder_output_size=shape.dim),
        joint_network=None,
        ctc_weight=0.3,
        lsm_weight=0.1,
        report_cer=False,
        report_wer=False,
    ).to(spec.device)
    model.train()
    return Toolkit(model, torch.optim.Adam(model.parameters(), lr=1e-3), lambda batch: model(*batch)[0])


TOOLKITS: dict[str, Callable[[Spec], Toolkit]] = {"speechtx": build_speechtx, "espnet": build_espnet}


def make_batch(lengths: Lengths, vocab: int, device: str) -> list[Tensor]:
    """Made-up features and tokens of the given lengths: feats (B, T, F), feat_lens (B,), tokens (B, U), token_lens (B,)."""
    frames, tokens = (torch.tensor(part) for part in lengths)
    feats = torch.randn(len(frames), int(frames.max()), MEL_BINS)
    words = torch.randint(2, vocab - 1, (len(tokens), int(tokens.max())))
    words.masked_fill_(torch.arange(words.shape[1]) >= tokens.unsqueeze(1), -1)  # what ESPnet pads with
    return [part.to(device) for part in (feats, frames, words, tokens)]


def train_step(toolkit: Toolkit, batch: Sequence[Tensor], spec: Spec) -> dict[str, float]:
    """One step; wall-clock seconds of its parts and processor seconds of the whole."""
    moments = [_now(spec.device)]
    processor = time.process_time()
    autocast = nullcontext() if spec.dtype == "float32" else torch.autocast(spec.device, dtype=getattr(torch, spec.dtype))
    with autocast:
        loss = toolkit.loss(batch)
    moments.append(_now(spec.device))
    loss.backward()
    moments.append(_now(spec.device))
    toolkit.sum_gradients()
    moments.append(_now(spec.device))
    torch.nn.utils.clip_grad_norm_(toolkit.model.parameters(), 5.0)
    toolkit.optimizer.step()
    toolkit.optimizer.zero_grad(set_to_none=True)
    moments.append(_now(spec.device))
    names = ("forward", "backward", "gradients", "optimizer")
    parts = {name: end - start for name, (start, end) in zip(names, pairwise(moments), strict=True)}
    return {**parts, "wall": moments[-1] - moments[0], "processor": time.process_time() - processor}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """MiB: of the GPU's allocator, or the process's largest resident size (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def work(spec: Spec, ask: Callable[[], str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Builds the model, then does one step on the batch of every number that comes."""
    torch.set_num_threads(spec.threads)
    torch.manual_seed(0)
    if spec.size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spec.port)}
        torch.distributed.init_process_group("gloo", rank=spec.rank, world_size=spec.size)
    toolkit = TOOLKITS[spec.toolkit](spec)
    batches = [make_batch(lengths, spec.shape.vocab, spec.device) for lengths in spec.batches]
    answer({"parameters": sum(p.numel() for p in toolkit.model.parameters()), "torch": torch.__version__})
    while line := ask().strip():
        command, number = line.split()
        if command == "flops":
            from speechtx.training.profiling import flop_counter

            with flop_counter() as counter:
                train_step(toolkit, batches[int(number)], spec)
            answer({"flops": counter.get_total_flops()})
        else:
            answer({**train_step(toolkit, batches[int(number)], spec), "peak": peak_memory(spec.device)})
    if spec.size > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # toolkits print what they like; answers have a stream of their own
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    work(Spec.from_json(sys.stdin.readline()), sys.stdin.readline, answer)


if __name__ == "__main__":
    main()
