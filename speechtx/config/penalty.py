"""The schema of `model.attention_penalty`: which attention pays which penalty for distance.

Five questions, each answered in one place. Where do two positions lie? (`axis`, for cross-attention; positions count frames or
tokens elsewhere.) How is their distance charged? (`shape`, its strength, `margin`, `step`, `max_distance`.) Where does attention
stop? (`window`.) Who pays? (`layers`, `heads`.) How is it computed? (`backend`.) docs/attention_penalty.md is the user's page,
speechtx/attention/penalty.py the definition in code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from speechtx.config.section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Shape = Literal["none", "log", "linear", "gaussian", "power", "bucket", "window", "stripe"]
Scale = NonNegativeFloat | Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)] | Literal["alibi"]
Sigma = PositiveFloat | Annotated[tuple[PositiveFloat, ...], Field(strict=False)]
Indices = Annotated[tuple[NonNegative, ...], Field(strict=False, min_length=1)]

# The keys that say how strong each shape is; any other of STRENGTHS has no meaning for it.
STRENGTHS_OF: dict[str, tuple[str, ...]] = {
    "none": (),
    "log": ("scale",),
    "linear": ("scale",),
    "gaussian": ("sigma",),
    "power": ("scale", "exponent"),
    "bucket": ("scale", "buckets"),
    "window": (),
    "stripe": ("scale",),
}
STRENGTHS = ("scale", "sigma", "exponent", "buckets")


class RampConfig(Section):
    """A factor of the penalty that goes linearly from `from` to `to` over the first `steps` training steps, and stays there."""

    start: NonNegativeFloat = Field(default=0.0, alias="from")
    end: NonNegativeFloat = Field(default=1.0, alias="to")
    steps: Positive = 10000


class PenaltyConfig(Section):
    """One attention penalty P(d) >= 0, P(0) = 0, subtracted from the logits before softmax; d = |i - j|.

    With n the charged distance (`margin`, `step`, `max_distance`): log: s ln(1 + n) (Tensor2Tensor's proximity bias); linear: s n
    (ALiBi, symmetric); gaussian: n^2 / (2 sigma^2); power: s n^exponent; bucket: w ln(1 + lower edge of n's bucket) with a
    learned w a bucket; window: nothing; stripe: s if n > 0. `window` cuts off any of them.
    """

    shape: Shape = "none"
    scale: Scale = 1.0  # s: one number, one per selected head, or ALiBi's slopes 2^(-8h/H)
    sigma: Sigma | None = None  # gaussian, in `unit`: one number or one per selected head
    exponent: PositiveFloat | None = None  # power
    buckets: Annotated[int, Field(ge=2)] | None = None  # bucket: max_distance + 1 of them make one per distance
    symmetric: bool = True  # false: keys to the right (the future) are charged by scale_right or sigma_right
    scale_right: Scale | None = None
    sigma_right: Sigma | None = None
    margin: NonNegative = 0  # distances up to this are free
    step: Positive = 1  # a staircase: the charged distance grows by 1 every `step` positions
    max_distance: PositiveFloat | None = None  # no distance is charged more than this one
    window: Positive | Literal["auto"] | None = None  # keys farther than this get nothing; auto: from epsilon and logit_bound
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-3  # auto: at most this share of a row's weight is cut off
    logit_bound: NonNegativeFloat | None = None  # auto: a bound on |q.k|/sqrt(d_k); `speechtx attention --measure` measures it
    learnable: Literal["none", "layer", "head"] = "none"  # scale, sigma or w learned: one a layer, or one a layer and head
    layers: Literal["all"] | str | Indices = "all"  # "0-5", or a list, counted from 0
    heads: Literal["all"] | Indices = "all"  # a list, counted from 0
    unit: Literal["frame", "ms"] = "frame"  # of every length here; frame: encoder frames after subsampling, or tokens
    ramp: RampConfig | None = None
    # after_softmax: the widespread mistake of adding -P to the weights, lifting by the minimum, renormalising; for studies only
    apply: Literal["logits", "after_softmax"] = "logits"

    @model_validator(mode="after")
    def _combination(self) -> Self:
        for check in (self._check_strength, self._check_sides, self._check_window, self._check_learnable, self._check_selection):
            check()
        return self

    def _check_strength(self) -> None:
        shape = self.shape
        if shape == "none" and self.window is not None:
            raise ValueError("shape none takes no window; write shape: window")
        if shape == "none" and (self.learnable != "none" or self.ramp is not None or self.apply != "logits"):
            raise ValueError("shape none has nothing to learn, to ramp or to apply; name a shape")
        if shape == "gaussian" and self.sigma is None:
            raise ValueError("sigma (in encoder frames, or in `unit`) is required for shape gaussian")
        if shape == "power" and self.exponent is None:
            raise ValueError("exponent is required for shape power: P = scale * n^exponent")
        if shape == "bucket" and (self.buckets is None or self.max_distance is None or self.learnable == "none"):
            raise ValueError("shape bucket is a learned table: give buckets, max_distance, and learnable: head or layer")
        for name in STRENGTHS:
            if name not in STRENGTHS_OF[shape] and getattr(self, name) != type(self).model_fields[name].default:
                instead = f"; use {', '.join(STRENGTHS_OF[shape])}" if STRENGTHS_OF[shape] else ""
                raise ValueError(f"{name} has no meaning for shape {shape}{instead}")
        if "alibi" in (self.scale, self.scale_right) and shape != "linear":
            raise ValueError("scale alibi goes with shape linear")

    def _check_sides(self) -> None:
        given = [name for name in ("scale_right", "sigma_right") if getattr(self, name) is not None]
        if self.symmetric and given:
            raise ValueError(f"{given[0]} needs symmetric: false")
        if not self.symmetric and not given and self.learnable == "none":
            raise ValueError("symmetric: false needs scale_right or sigma_right, the strength for keys to the right")
        for name in given:
            if name.removesuffix("_right") not in STRENGTHS_OF[self.shape]:
                raise ValueError(f"{name} has no meaning for shape {self.shape}")

    def _check_window(self) -> None:
        if self.window is not None and self.apply != "logits":
            raise ValueError("apply: after_softmax subtracts it from weights: the penalty must be finite, so there is no window")
        if self.shape == "window" and self.window is None:
            raise ValueError("shape window needs window: the number of frames to each side that may be attended to")
        if self.window != "auto":
            if self.logit_bound is not None:
                raise ValueError("logit_bound is read only with window: auto")
            return
        if self.logit_bound is None:
            raise ValueError(
                "window: auto needs logit_bound, a bound on |q.k|/sqrt(d_k); `speechtx attention --measure` finds that of a "
                "trained model"
            )
        if self.ramp is not None:
            raise ValueError("window: auto needs a penalty of full strength from the first step; take the ramp away")
        if self.learnable != "none":
            raise ValueError("window: auto needs a fixed penalty: a learned one may become too weak for the window it was given")
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        right = self.scale_right if isinstance(self.scale_right, tuple) else (self.scale_right,)
        weak_log = self.shape == "log" and any(isinstance(s, float) and s <= 1.0 for s in (*scales, *right))
        zero = any(isinstance(s, float) and s == 0.0 for s in (*scales, *right)) and "scale" in STRENGTHS_OF[self.shape]
        if self.shape in ("bucket", "window", "stripe") or self.max_distance is not None or weak_log or zero:
            raise ValueError(
                f"window: auto is impossible for shape {self.shape}"
                + (f" with max_distance {self.max_distance:g}" if self.max_distance is not None else "")
                + (" with a scale of at most 1" if weak_log else "")
                + ": the weight beyond any window is not bounded; give the window as a number"
            )

    def _check_learnable(self) -> None:
        if self.learnable == "none":
            return
        if self.shape == "window":
            raise ValueError("shape window has nothing to learn; use another shape, which `window` then cuts off")
        names = [name for name in ("scale", "sigma") if name in STRENGTHS_OF[self.shape]]
        for name in [*names, *(f"{name}_right" for name in names)]:
            value = getattr(self, name)
            if self.learnable == "layer" and (isinstance(value, tuple) or value == "alibi"):
                raise ValueError(f"learnable: layer starts from one {name}, not one per head; use learnable: head")
            if value == 0.0 or (isinstance(value, tuple) and 0.0 in value):
                raise ValueError(f"{name} 0 cannot be learned: it is kept positive by a softplus; start from a small number")
        if self.apply != "logits":
            raise ValueError("apply: after_softmax is there to show what a mistake does; it has nothing to learn")

    def _check_selection(self) -> None:
        if self.layers != "all" and isinstance(self.layers, str):
            span = re.fullmatch(r"(\d+)-(\d+)", self.layers)
            if span is None or int(span[1]) > int(span[2]):
                raise ValueError(f"layers {self.layers!r} is neither all, nor a span such as 0-5, nor a list such as [0, 1, 2]")
        for name in ("layers", "heads"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(set(value)) != len(value):
                raise ValueError(f"{name} {list(value)} names one twice")

    def selected_layers(self, count: int) -> tuple[int, ...]:
        """The layers that pay, of `count`, counted from 0 (they may name layers that do not exist: see `check_site`)."""
        if isinstance(self.layers, tuple):
            return self.layers
        if self.layers == "all":
            return tuple(range(count))
        first, last = self.layers.split("-")
        return tuple(range(int(first), int(last) + 1))

    def selected_heads(self, count: int) -> tuple[int, ...]:
        """The heads that pay, of `count`, counted from 0."""
        return tuple(range(count)) if self.heads == "all" else self.heads


class CrossPenaltyConfig(PenaltyConfig):
    """A penalty of the decoder's attention to the encoder: distance on an axis that tokens and frames share.

    uniform: both as a share of their length; rate: token i at frame `rate` * (i + 1/2) - 1/2; ctc_count: frames by the number of
    tokens CTC has emitted; ctc_prefix: tokens by the mean frame where CTC first emits them; monotonic: learned steps in frames;
    lower_layer: where the layer below looked. Lengths (sigma, window, ...) are in the axis' own unit: the utterance's length
    for uniform, tokens for ctc_count, encoder frames for the others.
    """

    axis: Literal["uniform", "rate", "ctc_count", "ctc_prefix", "monotonic", "lower_layer"] = "ctc_count"
    rate: PositiveFloat | None = None  # encoder frames per token: for rate, for uniform with length: rate, to start monotonic
    length: Literal["ctc", "rate"] = "ctc"  # uniform: how many tokens to expect when the text is not known
    length_noise: NonNegativeFloat = 0.1  # uniform, training: the true number of tokens times 1 + this much normal noise
    round_centre: bool = False  # coordinates rounded to whole frames, for ctc_count to half tokens
    heads: Literal["all"] | Indices = (0,)

    @property
    def needs_ctc(self) -> bool:
        """Whether the axis is measured by the CTC output."""
        return self.shape != "none" and (
            self.axis in ("ctc_count", "ctc_prefix") or (self.axis == "uniform" and self.length == "ctc")
        )

    @model_validator(mode="after")
    def _axis(self) -> Self:
        if self.shape == "none":
            return self
        if self.unit != "frame":
            raise ValueError(f"unit ms has no meaning here: axis {self.axis} brings its own unit")
        if self.step != 1:
            raise ValueError("step needs integer positions; here they are real numbers")
        if self.window == "auto":
            raise ValueError("window: auto is for self-attention; here the window is a number in the unit of the axis")
        if self.apply != "logits":
            raise ValueError("apply: after_softmax is for encoder_self")
        if self.rate is None and (self.axis == "rate" or (self.axis == "uniform" and self.length == "rate")):
            raise ValueError(f"axis {self.axis} needs rate, the encoder frames per token of the training text")
        if self.round_centre and self.axis in ("monotonic", "uniform"):
            reason = "it has no gradient" if self.axis == "monotonic" else "all positions lie between 0 and 1"
            raise ValueError(f"round_centre is impossible for axis {self.axis}: {reason}")
        if self.axis == "lower_layer" and self.layers != "all" and self.selected_layers(1) == (0,):
            raise ValueError("axis lower_layer never charges layer 0, which has no layer below; select a higher one")
        return self


class AttentionPenaltyConfig(Section):
    """Which attention takes which penalty, and how it is computed.

    A `preset` fills the sites below; keys that are given as well win over it.
    """

    preset: Literal["speech_transformer", "alibi", "sperber2018", "pdp", "additive_after_softmax"] | None = None
    encoder_self: PenaltyConfig = PenaltyConfig()
    decoder_self: PenaltyConfig = PenaltyConfig()
    cross: CrossPenaltyConfig = CrossPenaltyConfig()
    backend: Literal["auto", "eager", "sdpa", "blocks", "flex", "fold", "flash_attn"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, Mapping) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        expanded = dict(values)
        for site, keys in PRESETS[preset].items():
            given = values.get(site, {})
            expanded[site] = {**keys, **given} if isinstance(given, Mapping) else given
        return expanded

    @model_validator(mode="after")
    def _sites(self) -> Self:
        if self.decoder_self.unit != "frame":
            raise ValueError("decoder_self: unit ms has no meaning for tokens")
        if self.decoder_self.apply != "logits":
            raise ValueError("decoder_self: apply: after_softmax is for encoder_self")
        if self.encoder_self.apply != "logits" and self.backend not in ("auto", "eager"):
            raise ValueError(f"backend {self.backend} cannot do apply: after_softmax; use eager")
        self._check_backend("encoder_self", self.encoder_self, causal=False)
        return self

    def check_decoder_self(self, *, causal: bool) -> None:
        """Refuses what a decoder cannot do: one that is causal, or one that sees all tokens (`decoder.type: mask_ctc`).

        Raises:
            ValueError: see above.
        """
        where = "attention_penalty.decoder_self"
        if causal and not self.decoder_self.symmetric:
            raise ValueError(f"{where}: symmetric: false has no meaning, the decoder never sees keys to the right")
        self._check_backend(where, self.decoder_self, causal=causal)

    def _check_backend(self, where: str, site: PenaltyConfig, *, causal: bool) -> None:
        if site.shape != "none" and (why := backend_refuses(self.backend, site, causal=causal)):
            raise ValueError(f"{where}: backend {self.backend} {why}; use auto or another backend")


def backend_refuses(backend: str, site: PenaltyConfig, *, causal: bool) -> str:
    """Why a backend can never compute this penalty; empty if it can."""
    plain = site.margin == 0 and site.step == 1 and site.max_distance is None and site.symmetric
    reasons = {
        "blocks": [
            (site.window is None, "needs a window"),
            (causal, "is not causal"),
            (site.heads != "all", "needs heads: all (the others would see no farther than the window)"),
        ],
        "fold": [
            (site.shape not in ("gaussian", "linear") or not plain, "folds plain gaussian and linear penalties only"),
            (site.learnable != "none", "cannot learn the strength (its gradient would drown in rounding)"),
            (site.window is not None, "knows no window"),
            (causal and site.shape == "gaussian", "folds causal linear penalties only"),
            (site.heads != "all", "needs heads: all"),
        ],
        "flash_attn": [
            (site.shape != "linear" or not plain, "knows linear penalties only (ALiBi's slopes)"),
            (site.learnable != "none", "gives the slopes no gradient"),
            (site.heads != "all", "needs heads: all"),
        ],
    }
    return next((why for applies, why in reasons.get(backend, []) if applies), "")


def check_site(site: PenaltyConfig, name: str, *, num_layers: int, num_heads: int) -> None:
    """Refuses layers and heads that do not exist, and lists that do not name one value per selected head.

    Raises:
        ValueError: see above.
    """
    for what, chosen, count in (
        ("layers", site.selected_layers(num_layers), num_layers),
        ("heads", site.selected_heads(num_heads), num_heads),
    ):
        if getattr(site, what) != "all" and site.shape != "none" and (beyond := [i for i in chosen if i >= count]):
            raise ValueError(f"attention_penalty.{name}.{what} names {beyond[0]}, but there are {count}, counted from 0")
    heads = len(site.selected_heads(num_heads))
    for key in ("scale", "sigma", "scale_right", "sigma_right"):
        value = getattr(site, key)
        if isinstance(value, tuple) and len(value) != heads:
            side = "encoder.heads" if name == "encoder_self" else "decoder.heads"
            which = f"{side} is {num_heads}" if site.heads == "all" else f"{heads} heads are selected"
            raise ValueError(f"attention_penalty.{name}.{key} lists {len(value)} values, but {which}")


def unit_problem(site: PenaltyConfig, frame_ms: float) -> tuple[str, str] | None:
    """The key of a length in milliseconds that is no whole number of encoder frames, and what is wrong with it; None if all are.

    Args:
        site: the penalty.
        frame_ms: how long an encoder frame lasts.
    """
    if site.unit != "ms" or site.shape == "none":
        return None
    for name in ("margin", "step", "max_distance", "window"):
        value = getattr(site, name)
        if isinstance(value, str) or value == type(site).model_fields[name].default:
            continue
        if not math.isclose(value / frame_ms, round(value / frame_ms), abs_tol=1e-6):
            return name, (
                f"is {value:g} ms, but an encoder frame lasts {frame_ms:g} ms after subsampling: give a multiple of it, or "
                "unit: frame"
            )
    return None


# Named settings of the literature; docs/attention_penalty.md has their sources.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Tensor2Tensor's proximity_bias of 2017, the likely meaning of Dong, Xu and Xu (ICASSP 2018): self-attention only.
    "speech_transformer": {"encoder_self": {"shape": "log"}, "decoder_self": {"shape": "log"}},
    # Press, Smith and Lewis (ICLR 2022), made symmetric in the encoder.
    "alibi": {"encoder_self": {"shape": "linear", "scale": "alibi"}, "decoder_self": {"shape": "linear", "scale": "alibi"}},
    # Sperber et al. (Interspeech 2018): a Gaussian whose width each head learns; the starting width is ours.
    "sperber2018": {"encoder_self": {"shape": "gaussian", "sigma": 10.0, "learnable": "head"}},
    # Zhang, Haddow and Sennrich (ICML 2022): ln(1 + d) with a learned weight a head and distance, up to 512.
    "pdp": {"encoder_self": {"shape": "bucket", "buckets": 513, "max_distance": 512.0, "learnable": "head"}},
    # A stripe penalty added after softmax and renormalised: what not to do. For studies only.
    "additive_after_softmax": {"encoder_self": {"shape": "linear", "apply": "after_softmax"}},
}
