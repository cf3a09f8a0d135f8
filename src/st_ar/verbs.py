"""The verbs: one dataclass each, whose fields are the options and whose docstrings are the help.

What a verb needs is imported when it runs, so that help is quick.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from st_ar.data_verbs import ImportTokens, Tokenize
from st_ar.evaluation_verbs import Evaluate, MakeReference, Reconstruct
from st_ar.printing import print_table
from st_ar.probe_verb import Probe
from st_ar.sample_verb import Sample
from st_ar.sweep_verb import Sweep


@dataclass(kw_only=True)
class Quickstart:
    """Train, probe, sample and compare AR and ST-AR on images that come inside scikit-image and scikit-learn.

    Takes a few minutes on two cores and writes report.html and summary.json. The same command again continues what a
    stopped one began.
    """

    out: Path = Path("quickstart")
    """Folder for the report and every artefact."""
    images: Literal["photos", "digits"] = "photos"
    """Patches of 16 photographs, or handwritten digits."""
    steps: int | None = None
    """Optimizer steps of each model, if not the preset's."""
    seed: int = 0
    """Seed of everything."""

    def run(self) -> None:
        from st_ar.quickstart import quickstart

        report = quickstart(self.out, images=self.images, steps=self.steps, seed=self.seed)
        summary = json.loads((self.out / "summary.json").read_text())
        ar, guided = summary["AR"], summary["ST-AR"]
        rows = [
            ("probe accuracy, last step (%)", *(f"{100 * m['probe']['top1'][-1]:.1f}" for m in (ar, guided))),
            ("validation loss (nats per token)", *(f"{m['validation_loss']:.3f}" for m in (ar, guided))),
            ("FD-regions of samples", *(f"{m['frechet']:.4f}" for m in (ar, guided))),
            ("seconds per training step", *(f"{m['seconds_per_step']:.3f}" for m in (ar, guided))),
        ]
        print_table(("", "AR", "ST-AR"), rows)
        print(f"\n{summary['seconds_of_this_call']:.0f} s; the report is {report}")


@dataclass(kw_only=True)
class Attention:
    """Attention maps over images of a store, as an SVG, and their statistics by layer as a table."""

    model: Path
    """A run, an export folder, a .safetensors file, or a .pt file of LlamaGen's."""
    tokens: Path
    """Token store with the images to read."""
    tokenizer: Path
    """The tokenizer that made the store."""
    out: Path
    """SVG file for the maps; the statistics go beside it as JSON."""
    layer: int | None = None
    """Layer to draw, counted from 1; half the depth by default."""
    images: tuple[int, ...] = (0, 1, 2)
    """Which of the store's images to draw."""
    average: int = 256
    """Images to average the statistics over."""
    ema: bool = False
    """Look at the averaged weights instead of the live ones."""

    def run(self) -> None:
        from st_ar.evaluation.attention import draw_attention

        statistics = draw_attention(
            self.model,
            self.tokens,
            self.tokenizer,
            self.out,
            layer=self.layer,
            images=self.images,
            average=self.average,
            ema=self.ema,
        )
        rows = [
            (str(layer), f"{a.class_weight:.3f}", f"{a.neighbour_weight:.3f}", f"{a.distance:.2f}", f"{a.entropy:.2f}")
            for layer, a in statistics.items()
        ]
        print_table(("layer", "on the class", "on the 3 x 3", "distance (tokens)", "entropy (nats)"), rows)
        print(f"\nmaps: {self.out}")


@dataclass(kw_only=True)
class Convert:
    """Convert a model or a VQ tokenizer between this project's folders and the .pt files that LlamaGen's scripts load."""

    source: tyro.conf.Positional[Path]
    """A run, an export folder, a tokenizer's folder, a .safetensors file, or a .pt file of LlamaGen's."""
    target: tyro.conf.Positional[Path]
    """The .pt file (--to llamagen) or the folder (--to st-ar) to write."""
    to: Literal["llamagen", "st-ar"]
    """What to write."""
    ema: bool = False
    """Take the averaged weights instead of the live ones."""

    def run(self) -> None:
        from st_ar.model.convert import convert

        print(convert(self.source, self.target, to=self.to, ema=self.ema))


VERBS: dict[str, Any] = {
    "quickstart": Quickstart,
    "tokenize": Tokenize,
    "import-tokens": ImportTokens,
    "sample": Sample,
    "reference": MakeReference,
    "evaluate": Evaluate,
    "sweep": Sweep,
    "reconstruct": Reconstruct,
    "probe": Probe,
    "attention": Attention,
    "convert": Convert,
}
