"""ESPnet2's side of the decoding benchmark: the same weights in its modules, decoded by its own beam search.

Runs in an environment where `espnet` is importable; speechtx need not be. What is used is what `espnet2.bin.asr_inference`
puts together for a joint model without language model: `BatchBeamSearch` with the decoder, a CTC prefix scorer (pre-beam 1.5
times the beam) and the default end detection. What ESPnet2's modules lack (another number of channels in the front end, a
penalty on distances, LayerNorm in the convolution) replaces the module's part in question and costs next to nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet2.asr.ctc import CTC
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from torch import Tensor, nn

from benchmarks.decode_workers import peak_mib, serve

Weights = dict[str, Tensor]
_EMBED = {"conv1": "conv.0", "conv2": "conv.2", "linear": "out.0"}
_TRANSFORMER = {"norm_attn": "norm1", "norm_ff": "norm2", "ff.inner": "feed_forward.w_1", "ff.outer": "feed_forward.w_2"}
_CONFORMER = {
    "norm_ff_in": "norm_ff_macaron",
    "ff_in.inner": "feed_forward_macaron.w_1",
    "ff_in.outer": "feed_forward_macaron.w_2",
    "norm_attn": "norm_mha",
    "norm_conv": "norm_conv",
    "conv.pointwise_in": "conv_module.pointwise_conv1",
    "conv.depthwise": "conv_module.depthwise_conv",
    "conv.norm": "conv_module.norm.norm",
    "conv.pointwise_out": "conv_module.pointwise_conv2",
    "norm_ff_out": "norm_ff",
    "ff_out.inner": "feed_forward.w_1",
    "ff_out.outer": "feed_forward.w_2",
    "norm_final": "norm_final",
}
_DECODER = {
    "norm_attn": "norm1",
    "norm_cross": "norm2",
    "norm_ff": "norm3",
    "ff.inner": "feed_forward.w_1",
    "ff.outer": "feed_forward.w_2",
    "cross.q": "src_attn.linear_q",
    "cross.out": "src_attn.linear_out",
    "attn.out": "self_attn.linear_out",
}


class _Model(nn.Module):
    """ESPnet2's encoder, decoder and CTC with the weights of a case."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        config = json.loads(case["config"])
        encoder, decoder, self.mel_bins = config["encoder"], config["decoder"], case["feats"][0].shape[1]
        shared = {
            "attention_heads": encoder["heads"],
            "linear_units": encoder["ff_dim"],
            "num_blocks": encoder["layers"],
        }
        conformer = encoder["type"] == "conformer"
        if conformer:
            self.encoder: nn.Module = ConformerEncoder(
                self.mel_bins,
                encoder["dim"],
                **shared,
                positionwise_conv_kernel_size=1,
                macaron_style=True,
                pos_enc_layer_type="abs_pos",
                selfattention_layer_type="selfattn",
                cnn_module_kernel=encoder["conv_kernel"],
            )
            for layer in self.encoder.encoders:
                layer.conv_module.norm = _ChannelNorm(encoder["dim"])
        else:
            self.encoder = TransformerEncoder(self.mel_bins, encoder["dim"], **shared)
        channels, embed = encoder["subsampling"]["channels"], self.encoder.embed
        embed.conv = nn.Sequential(nn.Conv2d(1, channels, 3, 2), nn.ReLU(), nn.Conv2d(channels, channels, 3, 2), nn.ReLU())
        embed.out[0] = nn.Linear(channels * (((self.mel_bins - 1) // 2 - 1) // 2), encoder["dim"])
        vocab = len(case["pieces"])
        self.decoder = TransformerDecoder(
            vocab, encoder["dim"], attention_heads=decoder["heads"], linear_units=decoder["ff_dim"], num_blocks=decoder["layers"]
        )
        self.ctc = CTC(vocab, encoder["dim"])
        self._take(case["weights"], _CONFORMER if conformer else _TRANSFORMER, channels)
        if case["encoder_bias"] is not None:
            for layer in self.encoder.encoders:
                _pay_distance(layer.self_attn, case["encoder_bias"])
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        self.eval()

    def _take(self, weights: Weights, encoder_names: dict[str, str], channels: int) -> None:
        """Copies all weights under ESPnet2's names.

        Raises:
            RuntimeError: of PyTorch, which names weights that are missing or left over.
        """
        taken: Weights = {}
        for name, value in weights.items():
            for part, names, attention in (("encoder", encoder_names, "attn"), ("decoder", _DECODER, "attn")):
                if name.startswith(f"{part}.layers."):
                    _, _, number, inner = name.split(".", 3)
                    taken.update(_layer_weight(f"{part}.{part}s.{number}.", inner, value, names, attention))
        taken = {
            name: value.unsqueeze(-1) if "pointwise_conv" in name and value.dim() == 2 else value for name, value in taken.items()
        }
        taken = {name: value.unsqueeze(1) if name.endswith("depthwise_conv.weight") else value for name, value in taken.items()}
        for kind in ("weight", "bias"):
            for ours, theirs in _EMBED.items():
                taken[f"encoder.embed.{theirs}.{kind}"] = weights[f"encoder.subsampling.{ours}.{kind}"]
            taken[f"encoder.after_norm.{kind}"] = weights[f"encoder.norm.{kind}"]
            taken[f"decoder.after_norm.{kind}"] = weights[f"decoder.norm.{kind}"]
            taken[f"decoder.output_layer.{kind}"] = weights[f"decoder.output.{kind}"]
            taken[f"ctc.ctc_lo.{kind}"] = weights[f"ctc.{kind}"]
        taken["decoder.embed.0.weight"] = weights["decoder.embedding.weight"]
        linear = taken["encoder.embed.out.0.weight"]  # ours reads channels innermost, theirs frequencies
        taken["encoder.embed.out.0.weight"] = linear.view(len(linear), -1, channels).transpose(1, 2).flatten(1)
        self.load_state_dict(taken)

    def encode(self, feats: Tensor) -> Tensor:
        """(T, F) -> (S, D)"""
        found: Tensor = self.encoder(feats.unsqueeze(0), torch.tensor([len(feats)]))[0][0]
        return found


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, D, T), where ESPnet2's convolution module has BatchNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def _layer_weight(prefix: str, inner: str, value: Tensor, names: dict[str, str], attention: str) -> Weights:
    module, _, kind = inner.rpartition(".")
    if module == f"{attention}.qkv":
        return {f"{prefix}self_attn.linear_{n}.{kind}": part for n, part in zip("qkv", value.chunk(3), strict=True)}
    if module == "cross.kv":
        return {f"{prefix}src_attn.linear_{n}.{kind}": part for n, part in zip("kv", value.chunk(2), strict=True)}
    return {f"{prefix}{({'attn.out': 'self_attn.linear_out'} | names)[module]}.{kind}": value}


def _pay_distance(attention: Any, by_offset: Tensor) -> None:
    """Adds -P(j - i) to the logits of an attention module."""
    plain, centre = attention.forward_attention, by_offset.shape[1] // 2

    def with_penalty(self: Any, value: Tensor, scores: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        length = scores.shape[-1]
        near = by_offset[:, centre - length + 1 : centre + length]
        return plain(value, scores + near.unfold(-1, length, 1).flip(-2), mask, *rest)  # type: ignore[no-any-return]

    attention.forward_attention = MethodType(with_penalty, attention)


class _Decoding:
    """What `load` opened."""

    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.case = torch.load(path, weights_only=True)
        self.model = _Model(self.case)
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.kept: dict[int, Tensor] = {}

    def encode(self, utt: int) -> Tensor:
        return self.model.encode(self.case["feats"][utt])

    def encoded(self, utt: int) -> Tensor:
        if utt not in self.kept:
            self.kept[utt] = self.encode(utt)
        return self.kept[utt]

    def beam_search(self, beam: int, ctc_weight: float) -> BatchBeamSearch:
        """As `espnet2.bin.asr_inference.Speech2Text` builds it."""
        end = len(self.case["pieces"]) - 1
        search = BatchBeamSearch(
            scorers={"decoder": self.model.decoder, "ctc": CTCPrefixScorer(ctc=self.model.ctc, eos=end)},
            weights={"decoder": 1.0 - ctc_weight, "ctc": ctc_weight},
            beam_size=beam,
            vocab_size=end + 1,
            sos=end,
            eos=end,
            token_list=self.case["pieces"],
            pre_beam_score_key=None if ctc_weight == 1.0 else "full",
        )
        return search.eval()

    def greedy(self, enc_out: Tensor) -> list[int]:
        best = self.model.ctc.argmax(enc_out.unsqueeze(0))[0].tolist()
        return [token for token, _ in groupby(best) if token != 0]


_decoding: list[_Decoding] = []


def load(case: str, threads: int) -> dict[str, Any]:
    from importlib.metadata import version

    _decoding[:] = [_Decoding(case, threads)]
    return {"versions": f"espnet {version('espnet')}, torch {torch.__version__}"}


@torch.no_grad()
def search(utts: Sequence[int], config: dict[str, Any], encode: bool, forced: bool) -> dict[str, Any]:
    """The twin of `decode_worker.search`; knows the methods beam and ctc_greedy."""
    decoding = _decoding[0]
    greedy = config.get("method") == "ctc_greedy"
    beam_search = None if greedy else decoding.beam_search(config["beam"], config["ctc_weight"])
    if not encode:
        for utt in utts:
            decoding.encoded(utt)
    found = []
    start = decoding.clock()
    for utt in utts:
        enc_out = decoding.encode(utt) if encode else decoding.encoded(utt)
        if beam_search is None:
            found.append(decoding.greedy(enc_out))
            continue
        # A negative ratio is a number of tokens here; the end of the sentence counts as one.
        limit = -(decoding.case["tokens"][utt] + 1.0) if forced else 0.0
        nbest = beam_search(x=enc_out, maxlenratio=limit, minlenratio=0.0)
        found.append(nbest[0].yseq[1:-1].tolist() if nbest else [])
    return {"seconds": decoding.clock() - start, "tokens": found}


def memory() -> dict[str, Any]:
    return {"mib": peak_mib()}


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # a warning for every utterance that reaches its limit, which is the point of some
    with contextlib.suppress(KeyboardInterrupt):
        serve({"load": load, "search": search, "memory": memory})
