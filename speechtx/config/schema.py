"""Typed, frozen schemas of every YAML file a recipe reads.

A field's default is what you get when the key is absent. Unknown keys are errors. Each experiment has one `train.yaml`
(`TrainConfig`: tokenizer, features, model, training), one `fbank.yaml` (`FbankConfig`, stored beside the features) and
one or more `decode.yaml` (`speechtx.config.decode`).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from speechtx.config.penalty import AttentionPenaltyConfig, check_site
from speechtx.config.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability, Section

# ---------------------------------------------------------------------------------------------------- features


class FbankConfig(Section):
    """Kaldi filterbank features (feat/feature-fbank.h, feat/feature-window.h); the defaults are the toolkit's recipe."""

    sample_rate: Positive = 16000  # Hz; other rates are an error unless `resample` is true
    resample: bool = False
    num_mel_bins: Annotated[int, Field(ge=4)] = 80
    frame_length_ms: PositiveFloat = 25.0
    frame_shift_ms: PositiveFloat = 10.0
    low_freq: NonNegativeFloat = 20.0  # Hz
    high_freq: float = 0.0  # Hz; <= 0 counts down from Nyquist, as in Kaldi
    preemphasis: Fraction = 0.97
    window_type: Literal["povey", "hamming", "hanning", "rectangular"] = "povey"
    remove_dc_offset: bool = True
    snip_edges: bool = True
    dither: NonNegativeFloat = 0.0  # 0 keeps features reproducible; Kaldi's default of 1.0 assumes 16-bit samples

    @model_validator(mode="after")
    def _frequencies(self) -> Self:
        nyquist = self.sample_rate / 2
        high = self.high_freq if self.high_freq > 0 else nyquist + self.high_freq
        if not self.low_freq < high <= nyquist:
            raise ValueError(
                f"low_freq {self.low_freq} and high_freq {self.high_freq} (= {high} Hz) must satisfy low < high <= {nyquist} Hz"
            )
        if self.frame_shift_ms > self.frame_length_ms:
            raise ValueError(
                f"frame_shift_ms {self.frame_shift_ms} exceeds frame_length_ms {self.frame_length_ms}: samples would be lost"
            )
        return self


class FeaturesConfig(Section):
    """How dumped features are normalised before the model sees them."""

    cmvn: Literal["global", "speaker", "utterance", "none"] = "global"
    norm_vars: bool = True


class SpecAugmentConfig(Section):
    """SpecAugment (Park et al., Interspeech 2019): masks and a time warp, in training only."""

    time_warp: NonNegative = 5  # W, frames; 0 switches it off
    num_freq_masks: NonNegative = 2
    freq_mask_width: NonNegative = 27  # F, mel bins; each width is uniform in [0, F]
    num_time_masks: NonNegative = 2
    time_mask_width: NonNegative = 40  # T, frames; each width is uniform in [0, T]
    time_mask_max_ratio: Fraction = 0.2  # no single time mask covers more than this share of the utterance
    frames_per_time_mask: NonNegative = 0  # above 0: num_time_masks, or one for every so many frames if that is more


class TokenizerConfig(Section):
    """The sentencepiece model of stage 3."""

    type: Literal["bpe", "unigram", "char"] = "bpe"
    vocab_size: Annotated[int, Field(ge=3)] = 100  # pieces, before <blank> and <sos/eos>; ignored for char
    byte_fallback: bool = False
    character_coverage: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    user_symbols: Annotated[tuple[str, ...], Field(strict=False)] = ()  # kept whole, for example <noise>


# ---------------------------------------------------------------------------------------------------- model


class Attention2dConfig(Section):
    """Speech-Transformer's 2D-attention (Dong et al. 2018, section 3.2), between the convolutions and the linear layer."""

    modules: NonNegative = 0
    channels: Positive = 32  # heads in time, and as many in frequency


class SubsamplingConfig(Section):
    """Convolutions that shorten the features, then a linear layer to the model's width (`speechtx.model.subsampling`)."""

    type: Literal["conv2d", "separable", "conv1d"] = "conv2d"  # in time and frequency, split by channel, or over time alone
    factor: Literal[4, 6, 8] = 4  # feature frames for one encoder frame
    channels: Positive = 256
    attention_2d: Attention2dConfig = Attention2dConfig()

    @model_validator(mode="after")
    def _maps(self) -> Self:
        if self.attention_2d.modules and self.type == "conv1d":
            raise ValueError("attention_2d needs maps of time and frequency, which type conv1d has not; use conv2d or separable")
        return self


class EncoderConfig(Section):
    """Transformer (pre-norm) or Conformer (Gulati et al., Interspeech 2020) encoder."""

    type: Literal["transformer", "conformer"] = "transformer"
    layers: Positive = 12
    dim: Positive = 256
    heads: Positive = 4
    ff_dim: Positive = 2048
    conv_kernel: Positive = 15  # conformer only; odd
    dropout: Probability = 0.1
    positional_dropout: Probability = 0.1
    attention_dropout: Probability = 0.0  # 0 keeps the fused attention kernels available
    stochastic_depth: Probability = 0.0  # the last layer is left out so often, the others linearly less (Huang et al. 2016)
    position: Literal["sinusoidal", "sinusoidal_concatenated", "none", "rotary", "relative"] = "sinusoidal"
    norm: Literal["layer", "batch"] = "layer"  # of the blocks; batch: over the valid frames of a batch
    attention_weights: Literal["softmax", "relu"] = "softmax"  # relu: relu(logits) / number of keys, plain computation only
    subsampling: SubsamplingConfig = SubsamplingConfig()

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even for sinusoidal positions")
        if self.position == "rotary" and self.dim // self.heads % 2:
            raise ValueError(f"position rotary turns pairs of dimensions, but dim / heads is {self.dim // self.heads}, odd")
        if self.type == "conformer" and self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel {self.conv_kernel} must be odd so that the convolution is centred")
        return self


class DecoderConfig(Section):
    """Transformer decoder (pre-norm); its width is the encoder's. `layers: 0` trains CTC alone.

    attention: predicts token after token from those before. mask_ctc: predicts hidden tokens from all others, to correct what
    CTC is not sure of in a few passes (Higuchi et al., Interspeech 2020); for decoding with `method: mask_ctc`.
    """

    type: Literal["attention", "mask_ctc"] = "attention"
    layers: NonNegative = 6
    heads: Positive = 4
    ff_dim: Positive = 2048
    dropout: Probability = 0.1
    positional_dropout: Probability = 0.1
    attention_dropout: Probability = 0.0
    input_noise: Probability = 0.0  # so many tokens of the true prefix are replaced at random in training; type attention only
    position: Literal["sinusoidal", "sinusoidal_concatenated", "none", "rotary"] = "sinusoidal"


class IntermediateCtcConfig(Section):
    """CTC losses inside the encoder (Lee and Watanabe, ICASSP 2021), by the CTC output that the last layer has too.

    With a lexicon, by an output of their own that predicts phones (Krishna, Toshniwal and Livescu 2018): words and letters that
    sound alike share what is learnt about them, which tells most where there is little speech.
    """

    layers: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]  # after how many layers; [3] halves six
    weight: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3  # CTC becomes (1 - weight) * CTC + weight * mean of these
    lexicon: str | None = None  # predict the phones of this file, `WORD PHONE PHONE ...` a line (Kaldi's lexicon.txt)
    condition: bool = False  # later layers see what was predicted (self-conditioned CTC, Nozaki and Komatsu 2021)


class ModelConfig(Section):
    """Encoder, decoder and the joint loss: ctc_weight * CTC + (1 - ctc_weight) * label-smoothed cross entropy."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    attention_penalty: AttentionPenaltyConfig = AttentionPenaltyConfig()
    intermediate_ctc: IntermediateCtcConfig | None = None
    ctc_weight: Fraction = 0.3
    label_smoothing: Probability = 0.1

    @property
    def phone_lexicon(self) -> str | None:
        """Of the phones that intermediate CTC predicts, if it does."""
        return self.intermediate_ctc.lexicon if self.intermediate_ctc is not None else None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.decoder.layers and self.encoder.dim % self.decoder.heads:
            raise ValueError(f"encoder.dim {self.encoder.dim} is not divisible by decoder.heads {self.decoder.heads}")
        head = self.encoder.dim // self.decoder.heads
        if self.decoder.layers and self.decoder.position == "rotary" and head % 2:
            raise ValueError(f"decoder.position rotary turns pairs of dimensions, but encoder.dim / decoder.heads is {head}, odd")
        if self.decoder.layers == 0 and self.ctc_weight != 1.0:
            raise ValueError("decoder.layers 0 needs ctc_weight 1.0")
        if self.decoder.layers and self.ctc_weight == 1.0:
            raise ValueError("ctc_weight 1.0 would never train the decoder; set decoder.layers: 0")
        self._check_mask_ctc()
        self._check_plain_attention()
        self._check_intermediate_ctc()
        penalty = self.attention_penalty
        check_site(penalty.encoder_self, "encoder_self", num_layers=self.encoder.layers, num_heads=self.encoder.heads)
        penalty.check_decoder_self(causal=self.decoder.type == "attention")
        for name in ("decoder_self", "cross"):
            site = getattr(penalty, name)
            check_site(site, name, num_layers=self.decoder.layers, num_heads=self.decoder.heads)
            # A preset may name the decoder of a model that has none; its own words may not.
            if site.shape != "none" and self.decoder.layers == 0 and penalty.preset is None:
                raise ValueError(f"attention_penalty.{name} needs a decoder, but decoder.layers is 0")
        if penalty.cross.needs_ctc and self.ctc_weight == 0.0:
            raise ValueError(
                f"attention_penalty.cross: axis {penalty.cross.axis} is measured by the CTC output, which ctc_weight 0 never "
                "trains; use axis monotonic, rate or lower_layer, or a ctc_weight above 0"
            )
        return self

    def _check_mask_ctc(self) -> None:
        if self.decoder.type != "mask_ctc":
            return
        if self.decoder.input_noise:
            raise ValueError("decoder.type mask_ctc hides tokens already; decoder.input_noise is for type attention")
        if self.decoder.layers == 0:
            raise ValueError("decoder.type mask_ctc needs a decoder, but decoder.layers is 0")
        if self.ctc_weight == 0.0:
            raise ValueError("decoder.type mask_ctc corrects the CTC output, which ctc_weight 0 never trains")
        cross = self.attention_penalty.cross
        if cross.shape != "none" and cross.axis == "ctc_prefix":
            raise ValueError(
                "attention_penalty.cross: axis ctc_prefix follows the tokens before each position, which decoder.type mask_ctc "
                "may have hidden; use axis ctc_count, uniform, rate, monotonic or lower_layer"
            )

    def _check_intermediate_ctc(self) -> None:
        if self.intermediate_ctc is None:
            return
        layers, last = self.intermediate_ctc.layers, self.encoder.layers
        if (
            len(set(layers)) < len(layers)
            or max(layers) > last
            or (max(layers) == last and self.intermediate_ctc.lexicon is None)
        ):
            raise ValueError(
                f"intermediate_ctc.layers {list(layers)} must be different numbers below encoder.layers {last}, whose own output "
                "the other CTC loss is; the last layer may predict phones too (intermediate_ctc.lexicon)"
            )
        if self.intermediate_ctc.condition and max(layers) == last:
            raise ValueError(f"intermediate_ctc.condition tells later layers what was predicted, and layer {last} is the last")
        if self.ctc_weight == 0.0:
            raise ValueError("intermediate_ctc is a part of the CTC loss, which ctc_weight 0 leaves out")

    def _check_plain_attention(self) -> None:
        """Relative positions and relu weights are computed with the penalty as one dense bias."""
        penalty = self.attention_penalty
        for option, backends in (
            ("position: relative", ("auto", "eager", "sdpa")),
            ("attention_weights: relu", ("auto", "eager")),
        ):
            name, value = option.split(": ")
            if getattr(self.encoder, name) != value:
                continue
            if penalty.encoder_self.shape != "none" and penalty.backend not in backends:
                raise ValueError(
                    f"encoder.{option} needs the penalty as a dense bias, which attention_penalty.backend {penalty.backend} does "
                    f"not build; use {' or '.join(backends)}"
                )
            if penalty.encoder_self.apply != "logits":
                raise ValueError(f"encoder.{option} cannot be combined with apply: after_softmax")


# ---------------------------------------------------------------------------------------------------- training


class OptimizerConfig(Section):
    name: Literal["adam", "adamw"] = "adamw"
    lr: PositiveFloat = 1e-3  # the peak rate, reached at the end of the warm-up
    betas: Annotated[tuple[Probability, Probability], Field(strict=False)] = (0.9, 0.98)
    eps: PositiveFloat = 1e-9
    weight_decay: NonNegativeFloat = 1e-6


class ScheduleConfig(Section):
    """inverse_sqrt: linear warm-up, then lr * sqrt(warmup / step) (Vaswani et al. 2017); cosine: down to `final_ratio` of lr."""

    name: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    warmup_steps: NonNegative = 2000
    final_ratio: Fraction = 0.01


class AverageConfig(Section):
    """Stage 5: which epochs' weights are averaged, chosen by the dev set."""

    num: Positive = 10
    by: Literal["dev_acc", "dev_loss", "last"] = "dev_acc"


class NoiseConfig(Section):
    """Noise made of the training set itself: frames of another utterance are added to an utterance's mel energies."""

    probability: Fraction = 0.5
    snr_db: Annotated[tuple[float, float], Field(strict=False)] = (5.0, 25.0)  # uniform between the two
    source: Literal["pauses", "speech"] = "pauses"  # the other utterance's quietest tenth, or all of it

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not -100.0 <= self.snr_db[0] <= self.snr_db[1] <= 100.0:
            raise ValueError(f"snr_db {list(self.snr_db)} must be the lower and the upper end of a range of decibels")
        return self


class PerturbConfig(Section):
    """Changes of the features before CMVN, drawn anew for each utterance and epoch, in training only; zeros change nothing."""

    tempo: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0  # rate of speech, uniform in 1 +- this, the pitch kept (Ko et al. 2015)
    vtlp: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0  # vocal tract length, uniform in 1 +- this (Jaitly and Hinton 2013)
    volume_db: NonNegativeFloat = 0.0  # level, uniform in +- this; with cmvn: utterance it cancels
    noise: NoiseConfig | None = None


class JoinConfig(Section):
    """Utterances joined anew in every epoch from words of a speaker's recordings (Lam et al., Interspeech 2021)."""

    words: str  # directory that `speechtx align` made of the training set
    ratio: PositiveFloat = 1.0  # joined utterances for each recorded one, beside which they stand
    max_words: Positive = 12  # of a joined utterance


class ConsistencyConfig(Section):
    """CR-CTC (Yao et al., ICLR 2025): each utterance is trained on in two SpecAugment views whose CTC outputs are to agree.

    A batch of N utterances then has 2N rows; frames_per_batch counts an utterance once, so a step needs twice time and memory.
    """

    weight: PositiveFloat = 0.2  # of the divergence of the views, beside CTC's 1
    decoder_weight: NonNegativeFloat = 0.0  # of that of the decoder's outputs, beside its loss's 1 (R-Drop, Liang et al. 2021)


class EmaConfig(Section):
    """The exponential moving average of the weights is what dev judges, what stage 5 averages, and what is decoded."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999  # a mean over about 1 / (1 - decay) steps


class TrainingConfig(Section):
    epochs: Positive = 100
    frames_per_batch: Positive = 16000  # feature frames with padding; --procs split a batch if there is not one for each
    max_utts_per_batch: Positive = 128
    accum_steps: Positive = 1  # batches whose gradients are summed before one optimiser step, of each GPU or of all --procs
    grad_clip: PositiveFloat = 5.0  # global L2 norm
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    specaugment: SpecAugmentConfig | None = SpecAugmentConfig()
    perturb: PerturbConfig = PerturbConfig()
    join: JoinConfig | None = None
    consistency: ConsistencyConfig | None = None
    ema: EmaConfig | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it, else float32
    max_nonfinite_steps: NonNegative = 10  # steps skipped for NaN/Inf before training stops with an error
    min_frames: Positive = 10  # shorter and longer utterances are listed and left out of training
    max_frames: Positive = 3000
    checkpoint_minutes: PositiveFloat = 5.0  # a resumable checkpoint at least this often, and at every epoch's end
    loader_workers: NonNegative = 1  # processes per rank that read and augment ahead; 0: none
    waveforms: bool = False  # features of the training set are computed batch by batch on the model's device, not read
    compile: bool = False  # layers by torch.compile: minutes at the start, faster steps on a GPU
    gradient_checkpointing: bool = False  # layers are computed again in the backward pass: less memory, about a third more time
    average: AverageConfig = AverageConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_frames < self.min_frames:
            raise ValueError(f"max_frames {self.max_frames} is below min_frames {self.min_frames}")
        if self.frames_per_batch < self.max_frames:
            raise ValueError(f"frames_per_batch {self.frames_per_batch} cannot hold an utterance of max_frames {self.max_frames}")
        if self.waveforms and self.join is not None:
            raise ValueError("join cuts and joins stored features; set waveforms: false, or leave out join")
        if self.waveforms and self.perturb != PerturbConfig():
            raise ValueError(
                "perturb changes features in the loader, which with waveforms: true has none; set waveforms: false, or leave out "
                "perturb (speed perturbation, ./run.sh --speeds, changes samples and works with both)"
            )
        return self


class TrainConfig(Section):
    """The whole of `conf/train.yaml`."""

    seed: NonNegative = 1
    tokenizer: TokenizerConfig = TokenizerConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.model.decoder.layers == 0 and self.training.average.by == "dev_acc":
            raise ValueError("without a decoder there is no dev_acc; write training.average.by: dev_loss")
        if self.training.consistency is not None and self.model.ctc_weight == 0.0:
            raise ValueError("training.consistency compares CTC outputs, which model.ctc_weight 0 never trains")
        decoder = self.model.decoder
        if (
            self.training.consistency is not None
            and self.training.consistency.decoder_weight
            and (decoder.layers == 0 or decoder.type == "mask_ctc")
        ):
            raise ValueError("training.consistency.decoder_weight needs a decoder of type attention")
        if self.training.gradient_checkpointing and self.model.encoder.norm == "batch":
            raise ValueError(
                "training.gradient_checkpointing would count each batch twice in the statistics of encoder.norm batch"
            )
        return self
