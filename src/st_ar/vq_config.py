"""Every setting of a VQ-GAN tokenizer and of its training, with the presets.

Nothing here imports torch, so that `st-ar train-tokenizer --help` is quick.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from st_ar.run_config import OptimConfig, RunConfig
from st_ar.settings import require, require_most, require_types


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
