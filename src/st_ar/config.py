"""Every setting of training, sampling and tokenizers: frozen dataclasses whose field docstrings are the command line's help.

A field's type gives its allowed values. `__post_init__` checks combinations of fields. Nothing here imports torch, so that help
is fast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

from st_ar.errors import UserError
from st_ar.settings import Checked, Count, Portion, Positive, Range, Seed, Share, Weight, Whole, flag_name

# The upper limits are far above any real model. They catch mistakes, and damaged files that would take all memory.
Batch = Annotated[int, Range(1, 1 << 20)]
Width = Annotated[int, Range(1, 1 << 16)]
Depth = Annotated[int, Range(1, 1 << 10)]
Classes = Annotated[int, Range(1, 1 << 20)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked, prefix="--optim."):
    """AdamW with LlamaGen's settings, and the learning-rate schedule."""

    lr: Positive = 1e-4
    """Peak learning rate. It does not scale with --batch-size."""
    betas: tuple[Portion, Portion] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: Weight = 0.05
    """Weight decay of parameters with two or more dimensions. The others have none."""
    grad_clip: Annotated[float, Range(0, means="off")] = 1.0
    """Largest gradient norm. 0 turns clipping off."""
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    """Learning rate after warm-up: constant, a cosine decay, or constant with a linear decay at the end (trapezoid)."""
    warmup_steps: Whole = 0
    """Optimizer steps of linear warm-up from 0."""
    decay_fraction: Annotated[float, Range(above=0, high=1)] = 0.2
    """Fraction of the run over which trapezoid decays."""
    final_lr: Share = 0.0
    """Final learning rate of cosine and trapezoid, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """A training run of a transformer or a tokenizer."""

    steps: Count | None = None
    """Optimizer steps to train for (instead of --epochs)."""
    epochs: Positive | None = None
    """Passes over the images to train for (instead of --steps)."""
    batch_size: Batch = 256
    """Images per optimizer step."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    seed: Seed = 0
    """Random seed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of matrix products and convolutions. Weights stay float32. auto is bfloat16 where the hardware supports it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto uses a GPU if there is one."""
    log_every: Count = 10
    """Optimizer steps between lines of log.jsonl."""
    checkpoint_every: Count = 1000
    """Optimizer steps between checkpoints. One is also written at the end and when the run is interrupted."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int, Range(0, means="none")] = 0
    """Also keep checkpoints whose step is a multiple of this, and their weights in OUT/kept. 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give --steps or --epochs" + (", not both" if self.steps else ": how long to train"))

    def total_steps(self, images: int) -> int:
        """Return the optimizer steps of the whole run on `images` images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * images / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked, prefix="--model."):
    """The transformer: LlamaGen's architecture."""

    dim: Width
    """Width of the residual stream (D)."""
    n_layers: Depth
    """Number of transformer blocks."""
    n_heads: Count
    """Number of attention heads. dim / n_heads must be a multiple of 4 (2-D rotary embedding)."""
    vocab_size: Classes = 16384
    """Entries of the tokenizer's codebook (V)."""
    grid: Depth = 16
    """Tokens per side of an image. A sequence has grid * grid tokens (T)."""
    condition: Literal["class", "text"] = "class"
    """What the model is conditioned on: a class, or a caption's features (train with --text)."""
    num_classes: Classes = 1000
    """Number of classes. One more embedding is the null class of classifier-free guidance. Text models have none."""
    text_tokens: Width = 120
    """Caption positions before the image (text models). Longer captions are truncated."""
    text_dim: Width = 2048
    """Width of a caption's features (text models). 2048 is that of Flan-T5-XL, LlamaGen's encoder."""
    token_dropout: Portion = 0.1
    """Dropout on the embedded input tokens."""
    residual_dropout: Portion = 0.1
    """Dropout on the attention's output."""
    ffn_dropout: Portion = 0.1
    """Dropout on the feed-forward's output."""
    drop_path: Portion = 0.0
    """Stochastic depth: rate of the last block, rising linearly from 0. It replaces residual and feed-forward dropout."""
    rope_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Positive = 1e-5
    """Epsilon of the RMS norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        other, names = ("class", ["num_classes"]) if self.condition == "text" else ("text", ["text_tokens", "text_dim"])
        for name in names:
            if (value := getattr(self, name)) != getattr(ModelConfig, name):
                raise UserError(
                    f"--model.{flag_name(name)} {value} is for {other} models: leave it out, or give --model.condition {other}"
                )
        if self.dim % (4 * self.n_heads):
            raise UserError(
                f"--model.dim {self.dim} over --model.n-heads {self.n_heads} must be a whole multiple of 4: "
                "the rotary embedding rotates pairs of features by row and by column"
            )
        if self.drop_path and (self.residual_dropout or self.ffn_dropout):
            raise UserError(
                f"--model.drop-path {self.drop_path} replaces --model.residual-dropout {self.residual_dropout} and "
                f"--model.ffn-dropout {self.ffn_dropout}: set both to 0"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the SwiGLU: two thirds of 4 dim, rounded up to a multiple of 256."""
        return -(-int(2 * 4 * self.dim / 3) // 256) * 256

    @property
    def sequence_length(self) -> int:
        """Tokens of an image (T)."""
        return self.grid**2

    @property
    def condition_length(self) -> int:
        """Positions of the condition before the image: 1 for a class, text_tokens for a caption."""
        return self.text_tokens if self.condition == "text" else 1

    @property
    def condition_name(self) -> str:
        """The condition in words, for messages."""
        if self.condition == "text":
            return f"captions of {self.text_tokens} x {self.text_dim} features"
        return f"{self.num_classes} classes"

    def require_classes(self, what: str) -> None:
        """Refuse a text model for a command or option, named `what`, that needs the conditions of a token store's images."""
        if self.condition == "text":
            raise UserError(
                f"{what} needs each image's condition, and token stores have classes but no captions: text models are not "
                "supported there"
            )

    @property
    def null_class(self) -> int:
        """A class model's label for no condition."""
        return self.num_classes


@dataclass(frozen=True, kw_only=True)
class SelfGuidedConfig(Checked, prefix="--selfguided."):
    """Self-guided training (ST-AR). mask_ratio, alpha and beta at 0 give plain autoregressive training."""

    mask_ratio: Portion = 0.25
    """Fraction r of the image-token keys masked in the student's attention (Eq. 3)."""
    mask_own_position: bool = True
    """Also hide a masked token from its own query (Eq. 3 read literally)."""
    masked_share: Share = 1.0
    """Fraction of the sequences of a step whose keys are masked."""
    alpha: Weight = 1.0
    """Weight of the masked image modelling loss (Eq. 8)."""
    beta: Weight = 0.5
    """Weight of the mean of the two contrastive losses (Eq. 8)."""
    step_loss: bool = True
    """Use the inter-step contrastive loss (Eq. 6)."""
    view_loss: bool = True
    """Use the inter-view contrastive loss (Eq. 7)."""
    positions: Count = 4
    """Number K of positions sampled per step and shared by the batch (Eq. 5)."""
    first_position: Whole = 0
    """First position to sample from, counted from 0. Early positions have seen little of the image."""
    contrast_layer: int | None = None
    """Layer whose features the contrastive losses compare, counted from 1. Half the depth by default."""
    temperature: Positive = 0.2
    """Temperature of the contrastive softmax over cosine similarities."""
    reduction: Literal["mean", "sum"] = "mean"
    """Reduction over pairs of steps or views. The paper prints a sum. Over images it is always the mean."""
    negatives: Literal["global", "local"] = "global"
    """Negatives from the whole batch of the optimizer step, or only from the micro-batch."""
    projector_depth: Annotated[int, Range(1, 1 << 6)] = 3
    """Linear layers of the projector f, with layer norm and ReLU between them."""
    projector_hidden: Width = 2048
    """Hidden width of the projector f."""
    mim_features: Literal["before_norm", "after_norm"] = "before_norm"
    """Compare the last layer's output in Eq. 4 before or after the final norm."""
    every: Count = 1
    """Use self-guidance in every n-th optimizer step. The other steps are plain: no mask, no teacher."""
    until: Share = 1.0
    """Fraction of the run with self-guidance. Later steps are plain."""
    ema_decay: Portion = 0.9999
    """Decay of the teacher, an exponential moving average of the student."""
    ema_warmup: bool = True
    """Use the decay min(ema_decay, (1 + t) / (10 + t)) at optimizer step t, so that short runs get a useful teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast and not (self.step_loss or self.view_loss):
            raise UserError(
                f"--selfguided.beta {self.beta} has no loss to weigh: give --selfguided.step-loss, --selfguided.view-loss, or beta 0"
            )
        if self.contrast and self.step_loss and self.positions < 2:
            raise UserError(
                f"--selfguided.step-loss compares different steps: give --selfguided.positions 2 or more, not {self.positions}"
            )

    @property
    def contrast(self) -> bool:
        """Whether any contrastive loss is computed."""
        return self.beta > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a training step needs the teacher's features."""
        return self.alpha > 0 or self.contrast

    def guides(self, step: int, total: float) -> bool:
        """Whether optimizer step `step` of `total`, counted from 1, has self-guidance."""
        return (step - 1) % self.every == 0 and step <= self.until * total

    def layer(self, n_layers: int) -> int:
        """Return the contrast layer of a network with `n_layers` layers."""
        return self.contrast_layer if self.contrast_layer is not None else max(1, n_layers // 2)


PLAIN = SelfGuidedConfig(mask_ratio=0.0, alpha=0.0, beta=0.0)
"""Plain autoregressive training: no mask, teacher pass or projector. The run still has EMA weights."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Training of a transformer."""

    model: ModelConfig
    selfguided: SelfGuidedConfig = PLAIN
    batch_size: Batch = 256
    """Images per optimizer step, over all ranks and micro-batches. Each becomes --views sequences."""
    views: Depth = 1
    """Different crops of each image in a batch (M)."""
    accumulate: Count = 1
    """Micro-batches per optimizer step. The result equals that of the whole batch, negatives included."""
    class_dropout: Portion = 0.1
    """Probability that an image's class or caption is replaced by the null condition (classifier-free guidance)."""
    validation_images: Count = 1024
    """Images of --validation to measure, evenly spaced in the store."""
    skip_nonfinite: Whole = 0
    """Steps with a non-finite loss or gradient to skip. One more stops the run."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the transformer's blocks with torch.compile. auto compiles on GPUs. On a CPU it needs a C++ compiler."""
    cuda_graph: bool = False
    """Replay forward and backward passes as a CUDA graph. Faster for small models on one GPU; takes more memory."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How torchrun's ranks hold the weights: a copy each (ddp) or sharded (fsdp). auto is ddp with several ranks, none with one."""
    shard_size: int | None = None
    """Ranks over which fsdp shards one copy of the weights. All by default. With fewer, each group of ranks has a copy."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing, all but matrix products, or everything."""
    rank_timeout: Positive = 600
    """Seconds that a rank waits for the others before it stops the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.shard_size
        if size is not None and self.parallel != "fsdp":
            raise UserError(f"--shard-size {size} is for --parallel fsdp: give both, or leave it out")
        if size is not None and size < 2:
            raise UserError(f"--shard-size must be at least 2, not {size}; for a copy on each rank give --parallel ddp")
        if self.cuda_graph and self.activation_checkpointing != "none":
            raise UserError("--cuda-graph does not work with --activation-checkpointing: leave one of them out")
        batch, parts = self.batch_size, self.accumulate
        if batch % parts:
            raise UserError(f"--batch-size {batch} is not a multiple of --accumulate {parts}: give a multiple")
        guided, depth = self.selfguided, self.model.n_layers
        layer, first, available = guided.contrast_layer, guided.first_position, self.model.sequence_length
        if layer is not None and not 1 <= layer <= depth:
            raise UserError(
                f"--selfguided.contrast-layer {layer} is not a layer of a network of {depth}: give 1 to {depth}"
            )
        if first + guided.positions > available:
            raise UserError(
                f"--selfguided.positions {guided.positions} is more than the {available - first} tokens "
                f"of an image from --selfguided.first-position {first} on: give fewer"
            )
        if guided.contrast and guided.view_loss and self.views < 2:
            raise UserError(
                f"--selfguided.view-loss compares different views: give --views 2 or more, not {self.views}"
            )
        smallest = batch if guided.negatives == "global" else batch // parts
        if guided.contrast and smallest < 2:
            raise UserError(
                f"the contrastive losses need negatives, and {smallest} image has none: give a larger --batch-size or --selfguided.beta 0"
            )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
    """What `st-ar train --plan` assumes."""

    plan: str | None = None
    """Print the run's memory, time and disk on a GPU such as H200 or A100:40 (40 GiB), and exit. --tokens is optional."""
    ranks: Count | None = None
    """GPUs to plan for. 1 by default."""
    mfu: Annotated[float, Range(above=0, high=1)] | None = None
    """Fraction of the GPUs' peak FLOP/s that --plan assumes. 0.4 by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--ranks", self.ranks), ("--mfu", self.mfu)):
            if value is not None and self.plan is None:
                raise UserError(f"{flag} {value} is for --plan: give both, or leave it out")


PUBLISHED_SCALES = {(768, 12): 2.0, (1024, 24): 2.0, (1280, 36): 1.75, (1536, 48): 1.75, (3200, 24): 1.65}
"""(dim, layers) -> LlamaGen's published guidance scale of its class models, B to 3B at 384 px."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Checked):
    """How tokens are sampled (see `st_ar.generate`)."""

    cfg_scale: Annotated[float, Range(1, 1000, means="none")] | None = None
    """Guidance scale; 1 is none. By default LlamaGen's for its class models (B, L 2.0; XL, XXL 1.75; 3B 1.65), else 1."""
    cfg_schedule: Literal["constant", "linear", "power-cosine"] = "constant"
    """Guidance scale over the tokens: constant, or rising from 1 to cfg_scale (linear, or RAR's power-cosine)."""
    cfg_power: Annotated[float, Range(above=0, high=1000)] = 1.0
    """Exponent of power-cosine. Larger values start guidance later."""
    cfg_interval: Annotated[int, Range(-1, means="all")] = -1
    """Guide only the first cfg_interval + 2 tokens, as LlamaGen counts them. -1 guides all."""
    temperature: Annotated[float, Range(0.001, 1000, hint="for the most likely token give --top-k 1")] = 1.0
    """Temperature of the softmax."""
    top_k: Annotated[int, Range(0, means="off")] = 0
    """Sample from the k most likely tokens. 0 turns it off."""
    top_p: Annotated[float, Range(above=0, high=1)] = 1.0
    """Sample from the most likely tokens whose total probability is p. 1 turns it off."""
    seed: Seed = 0
    """Random seed of labels and samples."""

    def resolved(self, config: ModelConfig, class_dropout: float | None = None) -> "SampleSettings":
        """Return these settings for a model, with its default guidance scale if none was given.

        Args:
            class_dropout: the share of images that the model was trained on without a condition; None if unknown.

        Raises:
            UserError: top_k is larger than the codebook, or guidance of a model that was trained without it.
        """
        if class_dropout == 0 and self.cfg_scale not in (None, 1):
            raise UserError(
                f"--cfg-scale {self.cfg_scale}: the model was trained with --class-dropout 0, so it cannot be guided; leave it out"
            )
        if self.top_k > config.vocab_size:
            raise UserError(f"--top-k must lie in [0, {config.vocab_size}], the size of the codebook, not {self.top_k}")
        if self.cfg_scale is not None:
            return self
        published = PUBLISHED_SCALES if config.condition == "class" and class_dropout != 0 else {}
        return replace(self, cfg_scale=published.get((config.dim, config.n_layers), 1.0))

    def scale_origin(self, config: ModelConfig, class_dropout: float | None = None) -> str:
        """Where the guidance scale for a model comes from. Arguments as for `resolved`."""
        if self.cfg_scale is not None:
            return "as given"
        if class_dropout == 0:
            return "the model was trained with --class-dropout 0"
        if self.resolved(config, class_dropout).cfg_scale == 1:
            return "off by default; --cfg-scale changes it"
        return "LlamaGen's for this size; --cfg-scale changes it"


TrackerName = Literal["tensorboard", "wandb", "trackio", "none"]


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Checked):
    """Trackers, samples and probes during training. They have no effect on the weights and may change when a run is resumed."""

    track: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers of curves and samples: tensorboard (event files in the run), wandb (extra tracking), trackio (extra trackio), none."""
    sample_every: Annotated[int, Range(0, means="never")] = 0
    """Optimizer steps between grids of samples from the live weights, written to samples/. 0 for none."""
    sample_tokenizer: Path | None = None
    """Tokenizer that decodes the samples."""
    sample_labels: tuple[int, ...] = ()
    """Classes (or captions) to sample, one image each. By default 16, evenly spaced. All grids use the same random numbers."""
    sample_cfg_scale: Annotated[float, Range(1, 1000, means="none")] | None = None
    """Guidance scale of the samples. By default that of `st-ar sample`."""
    probe_every: Annotated[int, Range(0, means="never")] = 0
    """Optimizer steps between quick probes: ridge regression, not the MAE protocol (extra quickstart). 0 for none."""
    probe_test_tokens: Path | None = None
    """Token store to test the probes on (its centre crops)."""

    def __post_init__(self) -> None:
        choices = get_args(TrackerName)
        if unknown := [name for name in self.track if name not in choices]:
            raise UserError(f"--track must be some of {', '.join(choices)}, not {unknown[0]!r}")
        super().__post_init__()
        if len(set(self.track)) < len(self.track):
            raise UserError(f"--track {' '.join(self.track)} has a name twice: give each once")
        if "none" in self.track and len(self.track) > 1:
            raise UserError("--track none cannot be combined with others")
        if self.sample_every and self.sample_tokenizer is None:
            raise UserError(f"--sample-every {self.sample_every} needs --sample-tokenizer to decode the samples")
        if self.probe_every and self.probe_test_tokens is None:
            raise UserError(
                f"--probe-every {self.probe_every} needs --probe-test-tokens: images that the model is not trained on"
            )
        for name in ("sample_tokenizer", "sample_labels", "sample_cfg_scale", "probe_test_tokens"):
            every = f"{name.split('_')[0]}_every"
            if getattr(self, name) not in (None, ()) and not getattr(self, every):
                raise UserError(f"--{flag_name(name)} does nothing without --{flag_name(every)}: give both or neither")

    def looks_at(self, step: int) -> bool:
        """Whether samples or a probe are due after this step."""
        return any(every and step % every == 0 for every in (self.sample_every, self.probe_every))


@dataclass(frozen=True, kw_only=True)
class InvarianceSettings(Checked):
    """The views and images that are compared (see `st_ar.evaluation.invariance`)."""

    num: Annotated[int, Range(2)] = 200
    """Number of images, chosen at random with --seed. Streams and image files give their first ones."""
    size: Count | None = None
    """Side of a view in pixels. By default it suits the images, which are resized so that all views fit."""
    shifts: tuple[Whole, ...] = ()
    """Shifts in pixels, each horizontal, vertical and diagonal. By default from 0 to two tokens."""
    factors: tuple[Annotated[float, Range(0.5, 2)], ...] = (0.9, 0.95, 1.05, 1.1)
    """Factors that enlarge the second view about the centre."""
    shown: Whole = 4
    """Number of images whose two views the figure shows."""
    shown_shift: Whole | None = None
    """Diagonal shift in pixels between the views in the figure. Half a token by default."""
    seed: Seed = 0
    """Random seed of the choice of images."""
    batch_size: Count = 32
    """Images to encode at once."""
    max_skipped: Annotated[float, Range(0, 1)] = 0.01
    """Largest fraction of unreadable images to accept. They are left out and listed in the result."""


Channels = Annotated[int, Range(1, 1 << 12)]


@dataclass(frozen=True, kw_only=True)
class VQConfig(Checked, prefix="--model."):
    """The network of a VQ-GAN. The defaults are LlamaGen's VQ-16."""

    channels: Channels = 128
    """Channels at full resolution."""
    multipliers: tuple[Annotated[int, Range(1, 64)], ...] = (1, 1, 2, 2, 4)
    """Channels of each level, in multiples of --model.channels. Each level but the last halves the resolution."""
    z_channels: Channels = 256
    """Channels between the network and the codebook's 1 x 1 convolutions."""
    codebook_size: Annotated[int, Range(1, 1 << 16)] = 16384
    """Number of codes (V). Token stores have 16 bits per code."""
    codebook_dim: Channels = 8
    """Width of a code."""
    residual_blocks: Annotated[int, Range(1, 1 << 6)] = 2
    """Residual blocks of each level of the encoder. The decoder has one more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.multipliers) <= 10:
            raise UserError(f"--model.multipliers must be 1 to 10 numbers, not {self.multipliers}")
        for multiplier in self.multipliers:
            width = self.channels * multiplier
            factors = f"--model.channels {self.channels} times --model.multipliers {multiplier}"
            _require_group_width(width, f"{factors} is {width}")

    @property
    def patch(self) -> int:
        """Side of a code in pixels."""
        return 2 ** (len(self.multipliers) - 1)


def _require_group_width(width: int, cause: str) -> None:
    if width % min(32, width):
        raise UserError(f"{cause}: the group norms need a multiple of 32, or fewer than 32")


VQ_16 = VQConfig()
VQ_8 = VQConfig(multipliers=(1, 2, 2, 4))


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig(Checked, prefix="--adversary."):
    """The PatchGAN discriminator and its loss."""

    start: Whole = 20_000
    """Optimizer steps before the discriminator starts. --steps or more leaves it out."""
    weight: Weight = 0.5
    """Weight of the adversarial loss."""
    adaptive: bool = True
    """Scale the weight so that adversarial and reconstruction gradients are equally large at the last layer."""
    channels: Channels = 64
    """Channels of the first convolution."""
    layers: Annotated[int, Range(1, 10)] = 3
    """Number of layers that halve the resolution. The receptive field is 9 * 2^layers - 2 pixels (70 for 3, 34 for 2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in self.widths[1:]:
            _require_group_width(width, f"--adversary.channels {self.channels} gives a layer {width} channels")

    @property
    def widths(self) -> list[int]:
        """Channels after each convolution except the last, which returns the logits."""
        return [self.channels * min(2**index, 8) for index in range(self.layers + 1)]


@dataclass(frozen=True, kw_only=True)
class VQTrainConfig(RunConfig):
    """Training of a VQ-GAN tokenizer."""

    model: VQConfig = VQ_16
    adversary: AdversaryConfig = AdversaryConfig()
    size: Annotated[int, Range(1, 1 << 12)] = 256
    """Side of the images in pixels."""
    crop_range: Annotated[float, Range(1, 2)] = 1.1
    """Shorter side before the random crop, in multiples of --size."""
    mirror: bool = True
    """Mirror half of the images. Digits are never mirrored."""
    batch_size: Batch = 128
    """Images per optimizer step, over all ranks."""
    l1_weight: Weight = 1.0
    """Weight of the mean absolute error."""
    l2_weight: Weight = 1.0
    """Weight of the mean squared error."""
    perceptual_weight: Weight = 0.0
    """Weight of the perceptual loss on features of EfficientNet-Lite0 (extra metrics). 0 turns it off."""
    codebook_weight: Weight = 1.0
    """Weight of the loss that moves codes towards features."""
    commitment: Weight = 0.25
    """Weight of the loss that moves features towards codes."""
    revive_after: Annotated[int, Range(0, means="never")] = 100
    """Replace a code that has been unused for this many steps by a feature of the batch. 0 for never."""
    ema_decay: Portion = 0.999
    """Decay of the EMA weights, which become the tokenizer. It warms up as (1 + t) / (10 + t)."""
    log_every: Count = 20
    """Optimizer steps between lines of log.jsonl."""
    evaluate_every: Count = 1000
    """Optimizer steps between evaluations (PSNR, SSIM, codebook usage, reconstructions). The last step also has one."""
    evaluate_images: Count = 512
    """Images of an evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.l1_weight + self.l2_weight + self.perceptual_weight:
            raise UserError("there is no reconstruction loss: give --l1-weight, --l2-weight or --perceptual-weight")
        size, levels, layers = self.size, len(self.model.multipliers), self.adversary.layers
        if size % self.model.patch:
            raise UserError(
                f"--size {size} is not a multiple of a code's {self.model.patch} pixels: --model.multipliers has {levels} levels"
            )
        if size < 11:
            raise UserError(f"--size {size} is too small: SSIM needs 11 pixels or more")
        smallest = size >> layers
        if smallest < 3 and self.adversary.start < (self.steps or 1 << 62):
            raise UserError(f"--adversary.layers {layers} leaves {smallest} of {size} pixels: give fewer")


def vq_16() -> VQTrainConfig:
    """LlamaGen's VQ-16 with its settings: 256 px to 16 x 16 tokens, 40 epochs of ImageNet."""
    return VQTrainConfig(epochs=40, perceptual_weight=1.0)


def vq_8() -> VQTrainConfig:
    """LlamaGen's VQ-8: 256 px to 32 x 32 tokens."""
    return VQTrainConfig(model=VQ_8, epochs=40, perceptual_weight=1.0)


def vq_cifar10() -> VQTrainConfig:
    """CIFAR-10, 32 px to 8 x 8 tokens: about 40 minutes on two cores."""
    return VQTrainConfig(
        model=VQConfig(channels=32, multipliers=(1, 2, 4), residual_blocks=1, z_channels=128, codebook_size=1024),
        adversary=AdversaryConfig(start=2000, channels=32, layers=2, weight=0.3),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=100, final_lr=0.05),
        size=32,
        crop_range=1.125,
        steps=3000,
        batch_size=64,
        ema_decay=0.998,
        evaluate_every=250,
        checkpoint_every=500,
    )


def vq_cifar10_16x16() -> VQTrainConfig:
    """CIFAR-10, 32 px to 16 x 16 tokens."""
    small = vq_cifar10()
    return replace(small, model=replace(small.model, channels=64, multipliers=(1, 2)))


VQ_PRESETS: dict[str, Callable[[], VQTrainConfig]] = {
    "vq-16": vq_16,
    "vq-8": vq_8,
    "vq-cifar10": vq_cifar10,
    "vq-cifar10-16x16": vq_cifar10_16x16,
}


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Checked):
    """How the classifier is trained: AdamW, a one-cycle learning rate, one crop of each image at random."""

    steps: Count = 2000
    """Optimizer steps."""
    batch_size: Count = 128
    """Images per optimizer step."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    seed: Whole = 0
    """Random seed of the weights, the order and the crops."""


Metric = Literal["fid", "fd", "sfid", "is", "class-accuracy", "precision", "recall", "kid", "density", "coverage"]
ExtractorName = Literal["inception", "efficientnet", "dinov2"]
