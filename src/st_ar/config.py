"""Every setting of a transformer and of its training: a tree of frozen dataclasses whose field docstrings are the command line's help.

Validation happens on construction and names the flags. Nothing here imports torch, so that `st-ar --help` is quick.
"""

from dataclasses import dataclass
from typing import Literal

from st_ar.run_config import RunConfig
from st_ar.settings import require, require_most, require_types


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
