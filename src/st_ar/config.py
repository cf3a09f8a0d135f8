"""Every setting of training, sampling, tokenizers and what is shown of a run: frozen dataclasses whose field docstrings are the help.

Construction checks each value and names its flag. Nothing here imports torch, so that help is quick.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from st_ar.settings import require, require_most, require_types


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW as LlamaGen sets it, and the learning-rate schedule."""

    lr: float = 1e-4
    """Peak learning rate. A preset's is for its own batch size, and stays the same for another --batch-size."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.05
    """Weight decay on parameters with two or more dimensions; the others have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    """After the warm-up: constant, a cosine to lr * final_lr, or constant with a linear fall to it over the last decay_fraction."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """Share of the run over which the trapezoid falls."""
    final_lr: float = 0.0
    """Last learning rate, as a share of the peak."""

    def __post_init__(self) -> None:
        require_types(self, "--optim.")
        require(self.lr > 0, f"--optim.lr must be above 0, not {self.lr}")
        require(all(0 <= b < 1 for b in self.betas), f"--optim.betas must lie in [0, 1), not {self.betas}")
        require(self.weight_decay >= 0, f"--optim.weight-decay must be 0 or more, not {self.weight_decay}")
        require(self.grad_clip >= 0, f"--optim.grad-clip must be 0 (off) or more, not {self.grad_clip}")
        require(self.warmup_steps >= 0, f"--optim.warmup-steps must be 0 or more, not {self.warmup_steps}")
        require(0 < self.decay_fraction <= 1, f"--optim.decay-fraction must lie in (0, 1], not {self.decay_fraction}")
        require(0 <= self.final_lr <= 1, f"--optim.final-lr must lie in [0, 1], not {self.final_lr}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, of whatever."""

    steps: int | None = None
    """Optimizer steps to train for (instead of --epochs)."""
    epochs: float | None = None
    """Passes over the images to train for (instead of --steps)."""
    batch_size: int = 256
    """Images per optimizer step."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    seed: int = 0
    """Seed of everything random."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix products and convolutions in bfloat16 (weights stay float32); auto uses it where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    log_every: int = 10
    """Optimizer steps between lines of log.jsonl."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints; one is also written at the end and on interruption."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep, for good, the checkpoints whose step is a multiple of this, and their weights in OUT/kept; 0 for none."""

    def __post_init__(self) -> None:
        require_types(self, "--")
        require(self.steps is None or self.epochs is None, "give --steps or --epochs, not both")
        require(self.steps is not None or self.epochs is not None, "give --steps or --epochs: how long to train")
        require(self.steps is None or self.steps >= 1, f"--steps must be at least 1, not {self.steps}")
        require(self.epochs is None or self.epochs > 0, f"--epochs must be above 0, not {self.epochs}")
        self.require_positive("batch_size", "log_every", "checkpoint_every", "keep")
        require_most(self, "--", batch_size=1 << 20)
        require(self.keep_every >= 0, f"--keep-every must be 0 (none) or more, not {self.keep_every}")
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")

    def require_positive(self, *names: str) -> None:
        """Each of these must be at least 1."""
        for name in names:
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, not {value}")

    def total_steps(self, images: int) -> int:
        """Optimizer steps of the whole run on a store or a source of `images` images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * images / self.batch_size))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer: LlamaGen's architecture."""

    dim: int
    """Width of the residual stream (D)."""
    n_layers: int
    """Transformer blocks."""
    n_heads: int
    """Attention heads; dim / n_heads must be a multiple of 4 (2-D rotary embedding)."""
    vocab_size: int = 16384
    """Entries of the tokenizer's codebook (V)."""
    grid: int = 16
    """Tokens per side of an image; a sequence has grid * grid tokens (T)."""
    condition: Literal["class", "text"] = "class"
    """What images are drawn for: a class, or a caption's features (train with --text)."""
    num_classes: int = 1000
    """Class labels; one more embedding row holds the null class of classifier-free guidance. Text models have none."""
    text_tokens: int = 120
    """Positions before the image that a text model reads its caption from; longer captions are cut."""
    text_dim: int = 2048
    """Width of a caption's features, the encoder's (2048: Flan-T5-XL's, LlamaGen's encoder)."""
    token_dropout: float = 0.1
    """Dropout on the embedded input tokens."""
    residual_dropout: float = 0.1
    """Dropout on the attention's output."""
    ffn_dropout: float = 0.1
    """Dropout on the feed-forward's output."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0; replaces residual and feed-forward dropout."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""

    def __post_init__(self) -> None:
        require_types(self, "--model.")
        for name in ("dim", "n_layers", "n_heads", "vocab_size", "grid", "num_classes", "text_tokens", "text_dim"):
            value = getattr(self, name)
            require(value >= 1, f"--model.{name.replace('_', '-')} must be at least 1, not {value}")
        require_most(self, "--model.", dim=1 << 16, n_layers=1 << 10, vocab_size=1 << 20, grid=1 << 10)
        require_most(self, "--model.", num_classes=1 << 20, text_tokens=1 << 16, text_dim=1 << 16)
        if self.condition == "class":
            for name in ("text_tokens", "text_dim"):
                flag = f"--model.{name.replace('_', '-')}"
                require(
                    getattr(self, name) == getattr(ModelConfig, name),
                    f"{flag} {getattr(self, name)} is for text models: give --model.condition text too, or leave it out",
                )
        else:
            require(
                self.num_classes == ModelConfig.num_classes,
                f"--model.num-classes {self.num_classes} is for class models: leave it out with --model.condition text",
            )
        require(
            self.dim % self.n_heads == 0 and self.head_dim % 4 == 0,
            f"--model.dim {self.dim} over --model.n-heads {self.n_heads} must be a whole multiple of 4: "
            "the rotary embedding turns pairs of features by row and by column",
        )
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"--model.{name.replace('_', '-')} must be above 0, not {value}")
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--model.{name.replace('_', '-')} must lie in [0, 1), not {value}")
        require(
            self.drop_path == 0 or (self.residual_dropout == 0 and self.ffn_dropout == 0),
            f"--model.drop-path {self.drop_path} replaces --model.residual-dropout {self.residual_dropout} and "
            f"--model.ffn-dropout {self.ffn_dropout}: set both to 0",
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
        """Tokens of an image, T."""
        return self.grid**2

    @property
    def condition_length(self) -> int:
        """Positions of the condition before the image: 1 for a class, text_tokens for a caption."""
        return self.text_tokens if self.condition == "text" else 1

    @property
    def condition_name(self) -> str:
        """The condition in words."""
        if self.condition == "text":
            return f"captions of {self.text_tokens} x {self.text_dim} features"
        return f"{self.num_classes} classes"

    def require_classes(self, what: str) -> None:
        """Refuse a text model for what would need captions and is not given any; `what` names it."""
        require(
            self.condition == "class",
            f"{what} needs each image's condition, and token stores have classes but no captions: text models are not "
            "supported there",
        )

    @property
    def null_class(self) -> int:
        """The label that stands for "no condition" to a class model."""
        return self.num_classes


@dataclass(frozen=True, kw_only=True)
class SelfGuidedConfig:
    """Self-guided training (ST-AR). All three of mask_ratio, alpha and beta at 0 give plain autoregressive training."""

    mask_ratio: float = 0.25
    """Share r of each sequence's image-token keys that the student's attention may not see (Eq. 3)."""
    mask_own_position: bool = True
    """Whether a masked token is also hidden from its own query (Eq. 3 read literally)."""
    masked_share: float = 1.0
    """Share of a step's sequences whose keys are masked; the others see all that is before them."""
    alpha: float = 1.0
    """Weight of the masked image modelling loss (Eq. 8)."""
    beta: float = 0.5
    """Weight of the mean of the two contrastive losses (Eq. 8)."""
    step_loss: bool = True
    """Whether the inter-step contrastive loss (Eq. 6) takes part; off for the rows of Table 3 without it."""
    view_loss: bool = True
    """Whether the inter-view contrastive loss (Eq. 7) takes part; off for the rows of Table 3 without it."""
    positions: int = 4
    """Positions K drawn per step, shared by the batch (Eq. 5)."""
    first_position: int = 0
    """Positions are drawn from this one on, 0 being the first: what has read little has little to compare."""
    contrast_layer: int | None = None
    """Layer whose features the contrastive losses compare, counted from 1; half the depth if not given."""
    temperature: float = 0.2
    """Temperature of the contrastive softmax over cosine similarities."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean over the pairs of steps or views, or their sum as the paper prints it; always the mean over images."""
    negatives: Literal["global", "local"] = "global"
    """Negatives from the whole batch of the optimizer step, or only from the micro-batch at hand."""
    projector_depth: int = 3
    """Linear layers of the projector f, with layer norm and ReLU between them."""
    projector_hidden: int = 2048
    """Hidden width of the projector f."""
    mim_features: Literal["before_norm", "after_norm"] = "before_norm"
    """Whether Eq. 4 compares the last layer's output before or after the final norm."""
    every: int = 1
    """Optimizer steps from one with self-guidance to the next; those between are plain, without mask and teacher."""
    until: float = 1.0
    """Share of the run that self-guidance lasts; the steps after it are plain."""
    ema_decay: float = 0.9999
    """Decay of the teacher, an exponential moving average of the student."""
    ema_warmup: bool = True
    """Start with the decay min(ema_decay, (1 + t) / (10 + t)) at optimizer step t, so that short runs get a useful teacher."""

    def __post_init__(self) -> None:
        require_types(self, "--selfguided.")
        require(0 <= self.mask_ratio < 1, f"--selfguided.mask-ratio must lie in [0, 1), not {self.mask_ratio}")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"--selfguided.{name} must be 0 or more, not {value}")
        require(0 <= self.masked_share <= 1, f"--selfguided.masked-share must lie in [0, 1], not {self.masked_share}")
        require(0 <= self.until <= 1, f"--selfguided.until must lie in [0, 1], not {self.until}")
        require(self.every >= 1, f"--selfguided.every must be at least 1, not {self.every}")
        require(self.first_position >= 0, f"--selfguided.first-position must be 0 or more, not {self.first_position}")
        require(self.temperature > 0, f"--selfguided.temperature must be above 0, not {self.temperature}")
        require(self.positions >= 1, f"--selfguided.positions must be at least 1, not {self.positions}")
        require(
            not self.contrast or self.step_loss or self.view_loss,
            f"--selfguided.beta {self.beta} weighs no loss: turn on --selfguided.step-loss or --selfguided.view-loss, or set beta to 0",
        )
        require(
            not (self.contrast and self.step_loss and self.positions < 2),
            f"--selfguided.step-loss compares different steps: give --selfguided.positions 2 or more, not {self.positions}",
        )
        require(
            self.projector_depth >= 1, f"--selfguided.projector-depth must be at least 1, not {self.projector_depth}"
        )
        require(
            self.projector_hidden >= 1, f"--selfguided.projector-hidden must be at least 1, not {self.projector_hidden}"
        )
        require_most(self, "--selfguided.", projector_depth=1 << 6, projector_hidden=1 << 16)
        require(0 <= self.ema_decay < 1, f"--selfguided.ema-decay must lie in [0, 1), not {self.ema_decay}")

    @property
    def contrast(self) -> bool:
        """Whether any contrastive loss is computed."""
        return self.beta > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether a training step needs the teacher's features."""
        return self.alpha > 0 or self.contrast

    def guides(self, step: int, total: int) -> bool:
        """Whether optimizer step `step` of `total`, counted from 1, is one with self-guidance."""
        return (step - 1) % self.every == 0 and step <= self.until * total

    def layer(self, n_layers: int) -> int:
        """The contrast layer for a network of this depth."""
        return self.contrast_layer if self.contrast_layer is not None else max(1, n_layers // 2)


PLAIN = SelfGuidedConfig(mask_ratio=0.0, alpha=0.0, beta=0.0)
"""Plain autoregressive training: no mask, no teacher pass, no projector; the EMA weights are kept all the same."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Training of a transformer."""

    model: ModelConfig
    selfguided: SelfGuidedConfig = PLAIN
    batch_size: int = 256
    """Images per optimizer step, over all micro-batches; each gives --views sequences."""
    views: int = 1
    """Different crops of each image in a batch (M)."""
    accumulate: int = 1
    """Micro-batches that an optimizer step is computed in; the result is the large batch's, negatives included."""
    class_dropout: float = 0.1
    """Share of the images whose class or caption is replaced by the null condition (classifier-free guidance)."""
    seed: int = 0
    """Seed of initialisation, data order, crops, masks, positions and dropout."""
    validation_images: int = 1024
    """Images of --validation that are measured, at equal distances in the store."""
    skip_nonfinite: int = 0
    """Steps, in all, that may be skipped because their loss or gradient is not finite; with 0 the first stops the run."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile (needs a C++ compiler on a CPU)."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How torchrun's ranks hold the weights: a copy on each (ddp), or split among them (fsdp); auto is ddp on several, none on one."""
    shard_size: int | None = None
    """Ranks that fsdp splits one copy of the weights among, all if not given; with fewer, each group of so many has a copy."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks compute again in the backward pass, to save memory: nothing, all but matrix products, or everything."""
    rank_timeout: float = 600
    """Seconds that a rank waits for the others before it gives the run up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("views", "accumulate", "validation_images")
        require(self.skip_nonfinite >= 0, f"--skip-nonfinite must be 0 or more, not {self.skip_nonfinite}")
        require(self.rank_timeout > 0, f"--rank-timeout must be above 0, not {self.rank_timeout}")
        require(
            self.shard_size is None or self.parallel == "fsdp",
            f"--shard-size {self.shard_size} is for --parallel fsdp: give both, or leave it out",
        )
        require(
            self.shard_size is None or self.shard_size >= 2,
            f"--shard-size must be at least 2, not {self.shard_size}; for a copy on each rank give --parallel ddp",
        )
        require_most(self, "--", views=1 << 10)
        require(
            self.batch_size % self.accumulate == 0,
            f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}",
        )
        require(0 <= self.class_dropout < 1, f"--class-dropout must lie in [0, 1), not {self.class_dropout}")
        guided, depth = self.selfguided, self.model.n_layers
        require(
            guided.contrast_layer is None or 1 <= guided.contrast_layer <= depth,
            f"--selfguided.contrast-layer {guided.contrast_layer} is not a layer of a network of {depth}: give 1 to {depth}",
        )
        require(
            guided.first_position + guided.positions <= self.model.sequence_length,
            f"--selfguided.positions {guided.positions} is more than the {self.model.sequence_length - guided.first_position} tokens "
            f"of an image from --selfguided.first-position {guided.first_position} on",
        )
        require(
            not (guided.contrast and guided.view_loss and self.views < 2),
            f"--selfguided.view-loss compares different views: give --views 2 or more, not {self.views}",
        )
        smallest = self.batch_size if guided.negatives == "global" else self.batch_size // self.accumulate
        require(
            not (guided.contrast and smallest < 2),
            f"the contrastive losses need negatives: {smallest} image leaves none; give a larger --batch-size or --selfguided.beta 0",
        )


PUBLISHED_SCALES = {(768, 12): 2.0, (1024, 24): 2.0, (1280, 36): 1.75, (1536, 48): 1.75, (3200, 24): 1.65}
"""(dim, layers) -> the guidance scale that LlamaGen published with its class model of that size (B to 3B; at 384 px)."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How tokens are drawn; see `st_ar.generate`."""

    cfg_scale: float | None = None
    """Classifier-free guidance scale; 1 is none. By default LlamaGen's for its class models (B and L 2.0, XL and XXL 1.75,
    3B 1.65), and 1 for others."""
    cfg_schedule: Literal["constant", "linear", "power-cosine"] = "constant"
    """Guide all tokens alike, or from 1 up to cfg_scale over the tokens: linearly, or by RAR's power-cosine."""
    cfg_power: float = 1.0
    """Power of power-cosine: the larger, the later guidance sets in."""
    cfg_interval: int = -1
    """Guide only the first token and this many decode steps + 1; -1 guides all."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold more than p; 1 for all."""
    seed: int = 0
    """Seed of the choice of classes or captions, and of the draws."""

    def __post_init__(self) -> None:
        require_types(self, "--")
        require(
            self.cfg_scale is None or 1 <= self.cfg_scale < float("inf"),
            f"--cfg-scale: the guidance scale must be at least 1 (none), not {self.cfg_scale}",
        )
        require(0 < self.cfg_power < float("inf"), f"--cfg-power must be above 0, not {self.cfg_power}")
        require(
            self.cfg_interval >= -1,
            f"--cfg-interval: the guidance interval must be -1 (all steps) or more, not {self.cfg_interval}",
        )
        require(
            0 < self.temperature < float("inf"),
            f"--temperature: the temperature must be above 0, not {self.temperature}; for the likeliest token give --top-k 1",
        )
        require(self.top_k >= 0, f"--top-k must be 0 (off) or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"--top-p must lie in (0, 1], not {self.top_p}")
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")

    def resolved(self, config: ModelConfig) -> "SampleSettings":
        """For a model of this shape: with its guidance scale, if none was given.

        Raises:
            UserError: top_k is more than its codebook holds.
        """
        require(
            self.top_k <= config.vocab_size,
            f"--top-k must lie between 0 (off) and the {config.vocab_size} tokens of the codebook, not {self.top_k}",
        )
        if self.cfg_scale is not None:
            return self
        published = PUBLISHED_SCALES if config.condition == "class" else {}
        return replace(self, cfg_scale=published.get((config.dim, config.n_layers), 1.0))


TrackerName = Literal["tensorboard", "wandb", "trackio", "none"]


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is shown of a run beside log.jsonl. None of it changes a weight, so a resumed run may be watched otherwise."""

    track: tuple[TrackerName, ...] = ("tensorboard",)
    """Where curves and samples go too: tensorboard (event files in the run), wandb (extra tracking), trackio (extra trackio), none."""
    sample_every: int = 0
    """Optimizer steps between grids of samples from the live weights, kept in samples/; 0 for none."""
    sample_tokenizer: Path | None = None
    """The tokenizer that paints them."""
    sample_labels: tuple[int, ...] = ()
    """Their classes (of a text model, captions), one image each, always with the same draws; by default 16, spread evenly."""
    sample_cfg_scale: float | None = None
    """Their guidance scale; by default the one `st-ar sample` takes."""
    probe_every: int = 0
    """Optimizer steps between quick probes: ridge regression (not the MAE protocol) at the last step's half-depth features of at most
    4,000 images each to train and to test on; 0 for none. Needs scikit-learn (extra quickstart)."""
    probe_test_tokens: Path | None = None
    """Token store that they are tested on (its centre crop)."""

    def __post_init__(self) -> None:
        names = get_args(TrackerName)
        for name in self.track:
            require(name in names, f"--track must be some of {', '.join(names)}, not {name!r}")
        require(len(set(self.track)) == len(self.track), f"--track {' '.join(self.track)} names one more than once")
        require("none" not in self.track or self.track == ("none",), "--track none stands alone")
        for name in ("sample_every", "probe_every"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} must be 0 (never) or more, not {value}")
        require(
            not self.sample_every or self.sample_tokenizer is not None,
            f"--sample-every {self.sample_every} needs --sample-tokenizer: samples are tokens until one paints them",
        )
        require(
            not self.probe_every or self.probe_test_tokens is not None,
            f"--probe-every {self.probe_every} needs --probe-test-tokens: images that the model is not trained on",
        )
        scale = self.sample_cfg_scale
        require(
            scale is None or 1 <= scale < float("inf"), f"--sample-cfg-scale must be at least 1 (none), not {scale}"
        )
        needs = {
            "sample_tokenizer": "sample_every",
            "sample_labels": "sample_every",
            "sample_cfg_scale": "sample_every",
            "probe_test_tokens": "probe_every",
        }
        for name, every in needs.items():
            require(
                getattr(self, name) in (None, ()) or getattr(self, every) > 0,
                f"--{name.replace('_', '-')} does nothing without --{every.replace('_', '-')}: give both or neither",
            )

    def looks_at(self, step: int) -> bool:
        """Whether samples or a probe are due after this step."""
        return any(every and step % every == 0 for every in (self.sample_every, self.probe_every))


@dataclass(frozen=True, kw_only=True)
class InvarianceSettings:
    """Which views of which images are compared; see `st_ar.evaluation.invariance`."""

    num: int = 200
    """Images to measure, drawn with --seed; of streams and files of images the first."""
    size: int | None = None
    """Side of a view in pixels; by default what suits the images. They are resized so that all views fit, enlarged if need be."""
    shifts: tuple[int, ...] = ()
    """Shifts in pixels, each horizontally, vertically and diagonally; by default from 0 to two tokens."""
    factors: tuple[float, ...] = (0.9, 0.95, 1.05, 1.1)
    """Factors by which the second view is enlarged about the centre."""
    shown: int = 4
    """Images whose two views are drawn."""
    shown_shift: int | None = None
    """Diagonal shift in pixels between the views that are drawn; by default half a token."""
    seed: int = 0
    """Seed that the images are drawn with."""
    batch_size: int = 32
    """Images encoded at once."""

    def __post_init__(self) -> None:
        require_types(self, "--")
        require(self.num >= 2, f"--num must be at least 2, not {self.num}: agreement is a mean over images")
        require(self.size is None or self.size >= 1, f"--size must be at least 1 pixel, not {self.size}")
        require(self.shown >= 0, f"--shown must be 0 or more, not {self.shown}")
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")
        require(self.batch_size >= 1, f"--batch-size must be at least 1, not {self.batch_size}")
        for shift in (*self.shifts, *([] if self.shown_shift is None else [self.shown_shift])):
            require(shift >= 0, f"shifts (--shifts, --shown-shift) must be 0 pixels or more, not {shift}")
        for factor in self.factors:
            require(0.5 <= factor <= 2, f"--factors must lie between 0.5 and 2, not {factor:g}")


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """The network's shape; the defaults are those of LlamaGen's VQ-16."""

    channels: int = 128
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as a multiple of `channels`; each level but the last halves the resolution."""
    z_channels: int = 256
    """Channels between the network and the codebook's 1 x 1 convolutions."""
    codebook_size: int = 16384
    """Codes (V)."""
    codebook_dim: int = 8
    """Features of a code."""
    residual_blocks: int = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""

    def __post_init__(self) -> None:
        require_types(self, "--model.")
        for name in ("channels", "z_channels", "codebook_size", "codebook_dim", "residual_blocks"):
            value = getattr(self, name)
            require(value >= 1, f"--model.{name.replace('_', '-')} must be at least 1, not {value}")
        require(
            bool(self.multipliers) and min(self.multipliers) >= 1,
            f"--model.multipliers must be numbers of at least 1, not {self.multipliers}",
        )
        require_most(
            self, "--model.", channels=1 << 12, z_channels=1 << 12, codebook_dim=1 << 12, residual_blocks=1 << 6
        )
        require(
            len(self.multipliers) <= 10 and max(self.multipliers) <= 64,
            f"--model.multipliers must be at most 10 numbers of at most 64, not {self.multipliers}",
        )
        for multiplier in self.multipliers:
            width = self.channels * multiplier
            require(
                width % min(32, width) == 0,
                f"--model.channels {self.channels} times --model.multipliers {multiplier} is {width}: "
                "the group norms need a multiple of 32, or fewer than 32",
            )
        require(
            self.codebook_size <= 1 << 16,
            f"--model.codebook-size {self.codebook_size} does not fit the token store's 16-bit codes: at most 65536",
        )

    @property
    def patch(self) -> int:
        """Pixels per side that a code stands for."""
        return 2 ** (len(self.multipliers) - 1)


VQ_16 = VQConfig()
VQ_8 = VQConfig(multipliers=(1, 2, 2, 4))


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """The discriminator that judges patches, and when it is heard."""

    start: int = 20_000
    """Optimizer steps before the discriminator is trained and heard; at least as many as the run has leave it out."""
    weight: float = 0.5
    """Weight of the adversarial loss."""
    adaptive: bool = True
    """Whether the weight is also scaled so that the adversarial gradient at the last layer is as large as the reconstruction's."""
    channels: int = 64
    """Channels of the first convolution."""
    layers: int = 3
    """Halvings of the resolution: a verdict sees 9 * 2^layers - 2 pixels a side (70 for 3, 34 for 2)."""

    def __post_init__(self) -> None:
        require_types(self, "--adversary.")
        require(self.start >= 0, f"--adversary.start must be 0 or more, not {self.start}")
        require(0 <= self.weight < float("inf"), f"--adversary.weight must be 0 or more, not {self.weight}")
        for name in ("channels", "layers"):
            value = getattr(self, name)
            require(value >= 1, f"--adversary.{name} must be at least 1, not {value}")
        require_most(self, "--adversary.", channels=1 << 12, layers=10)
        for width in self.widths[1:]:
            require(
                width % min(32, width) == 0,
                f"--adversary.channels {self.channels} gives a layer {width} channels: "
                "the group norms need a multiple of 32, or fewer than 32",
            )

    @property
    def widths(self) -> list[int]:
        """Channels after each convolution but the last, which gives the verdicts."""
        return [self.channels * min(2**index, 8) for index in range(self.layers + 1)]


@dataclass(frozen=True, kw_only=True)
class VQTrainConfig(RunConfig):
    """Training of a VQ-GAN tokenizer."""

    model: VQConfig = VQ_16
    adversary: AdversaryConfig = AdversaryConfig()
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Of the network and of the discriminator alike."""
    size: int = 256
    """Side of the images in pixels."""
    crop_range: float = 1.1
    """Images are resized to this multiple of `size` on the short side, then cut at a random place."""
    mirror: bool = True
    """Whether half of the images are mirrored; images of a source whose mirror images mean something else never are."""
    batch_size: int = 128
    """Images per optimizer step, over all ranks."""
    l1_weight: float = 1.0
    """Weight of the mean absolute error."""
    l2_weight: float = 1.0
    """Weight of the mean squared error."""
    perceptual_weight: float = 0.0
    """Weight of the difference in EfficientNet-Lite0's features (extra `metrics`); 0 leaves that network out."""
    codebook_weight: float = 1.0
    """Weight of the distance that pulls codes towards features."""
    commitment: float = 0.25
    """Weight of the distance that pulls features towards codes."""
    revive_after: int = 100
    """A code that no feature chose for so many steps is put where a feature of the batch is; 0 never does."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which become the tokenizer; it starts with (1 + t) / (10 + t)."""
    seed: int = 0
    """Seed of initialisation, data order, crops and revived codes."""
    log_every: int = 20
    """Optimizer steps between lines of log.jsonl."""
    evaluate_every: int = 1000
    """Optimizer steps between evaluations (PSNR, SSIM, use of the codebook), each with a picture; one is also made at the end."""
    evaluate_images: int = 512
    """Images of an evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("size", "evaluate_every", "evaluate_images")
        for name in ("l1_weight", "l2_weight", "perceptual_weight", "codebook_weight", "commitment"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"--{name.replace('_', '-')} must be 0 or more, not {value}")
        require(
            self.l1_weight + self.l2_weight + self.perceptual_weight > 0,
            "nothing asks for a likeness: give --l1-weight, --l2-weight or --perceptual-weight",
        )
        require_most(self, "--", size=1 << 12)
        require(1 <= self.crop_range <= 2, f"--crop-range must lie in [1, 2], not {self.crop_range}")
        require(self.revive_after >= 0, f"--revive-after must be 0 (never) or more, not {self.revive_after}")
        require(0 <= self.ema_decay < 1, f"--ema-decay must lie in [0, 1), not {self.ema_decay}")
        require(
            self.size % self.model.patch == 0,
            f"--size {self.size} is no whole number of {self.model.patch}-pixel codes: "
            f"--model.multipliers has {len(self.model.multipliers)} levels",
        )
        require(self.size >= 11, f"--size {self.size} is too small: SSIM compares windows of 11 pixels")
        smallest = self.size >> self.adversary.layers
        require(
            self.adversary.start >= (self.steps or 1 << 62) or smallest >= 3,
            f"--adversary.layers {self.adversary.layers} leaves {smallest} of {self.size} pixels: give fewer",
        )


def vq_16() -> VQTrainConfig:
    """LlamaGen's VQ-16 and its recipe: 256 px to 16 x 16 tokens, 40 epochs of ImageNet."""
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


Metric = Literal["fid", "fd", "sfid", "is", "precision", "recall", "kid", "density", "coverage"]
ExtractorName = Literal["inception", "efficientnet", "dinov2"]
