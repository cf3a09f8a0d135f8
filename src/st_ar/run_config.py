"""What every training run has: how long it goes on, where, from which seed, how it is kept; and its optimizer.

Nothing here imports torch, so that `st-ar --help` is quick.
"""

from dataclasses import dataclass, field
from typing import Literal

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
