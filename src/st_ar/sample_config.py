"""How images are drawn: every setting of a sample, with its help. Nothing here imports torch, so that help is quick."""

from dataclasses import dataclass, replace
from typing import Literal

from st_ar.config import ModelConfig
from st_ar.settings import require, require_types

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
