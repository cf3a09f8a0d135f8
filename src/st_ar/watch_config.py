"""How a training run is watched: every setting, with its help. Nothing here imports torch, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from st_ar.settings import require

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
