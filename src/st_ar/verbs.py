"""The verbs: one dataclass each, whose fields are the options and whose docstrings are the help.

What a verb needs is imported when it runs, so that help is quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from st_ar.attention_verb import Attention
from st_ar.data_verbs import ImportTokens, Tokenize
from st_ar.demo_verb import Demo
from st_ar.evaluation_verbs import Evaluate, MakeReference, Reconstruct
from st_ar.invariance_verb import Invariance
from st_ar.likelihood_verb import Likelihood
from st_ar.printing import check_json, json_alone, keep_json, print_table
from st_ar.probe_verb import Probe
from st_ar.reproduce_verb import Reproduce
from st_ar.sample_verb import Sample
from st_ar.sweep_verb import Sweep


@dataclass(kw_only=True)
class Quickstart:
    """Train, probe, sample and compare AR, ST-AR and its contrast alone on images that come inside scikit-image and scikit-learn.

    Takes less than five minutes on two cores with AVX512-BF16. Writes report.html, overview.svg and summary.json. The same
    command continues a stopped quickstart.
    """

    out: Path = Path("quickstart")
    """Folder for the report and every artefact."""
    images: Literal["photos", "digits"] = "photos"
    """Patches of 16 photographs, or handwritten digits."""
    steps: int | None = None
    """Optimizer steps of each model, if not the preset's."""
    seed: int = 0
    """Seed of everything."""
    json: str | None = None
    """File for what summary.json holds; - for standard output, instead of the table."""

    def run(self) -> None:
        from st_ar.files import read_json
        from st_ar.quickstart import METHODS, quickstart

        check_json(self.json)
        with json_alone(self.json):
            report = quickstart(self.out, images=self.images, steps=self.steps, seed=self.seed)
        summary = read_json(self.out / "summary.json", "a finished quickstart")
        measured = [summary[name] for name in METHODS]
        rows = [
            ("probe accuracy, last step (%)", *(f"{100 * m['probe']['top1'][-1]:.1f}" for m in measured)),
            ("validation loss (nats per token)", *(f"{m['validation_loss']:.3f}" for m in measured)),
            ("FD-regions of samples", *(f"{m['frechet']:.4f}" for m in measured)),
            ("seconds per training step", *(f"{m['seconds_per_step']:.3f}" for m in measured)),
        ]
        with json_alone(self.json):
            if self.json != "-":
                print_table(("", *METHODS), rows)
            print(f"\n{summary['seconds_of_this_call']:.0f} s; the report is {report}")
        keep_json(self.json, summary)


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
    grid: int | None = None
    """Tokens a side (--to st-ar), if a .pt file's are not the 16 of 256 pixels: 24 for LlamaGen's weights of 384 pixels."""

    def run(self) -> None:
        from st_ar.model.convert import convert

        print(convert(self.source, self.target, to=self.to, ema=self.ema, grid=self.grid))


@dataclass(kw_only=True)
class Env:
    """Print versions, CPU, GPUs, memory and threads, for a bug report."""

    json: str | None = None
    """Write it as JSON to a file, or to standard output with -."""

    def run(self) -> None:
        from st_ar.hardware import environment

        check_json(self.json)
        found = environment()
        if self.json != "-":
            for name, value in found.items():
                if isinstance(value, dict):
                    value = ", ".join(f"{key} {one}" for key, one in value.items())
                elif isinstance(value, list):
                    value = "; ".join(value)
                print(f"{name.replace('_', '-'):12}  {'-' if value in (None, '') else value}")
        keep_json(self.json, found)


@dataclass(kw_only=True)
class Completion:
    """Print the script with which a shell completes commands, presets, options and their choices."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell to generate the script for."""

    def run(self) -> None:
        from st_ar.completion import completion

        print(completion(self.shell), end="")


VERBS: dict[str, Any] = {
    "quickstart": Quickstart,
    "tokenize": Tokenize,
    "import-tokens": ImportTokens,
    "sample": Sample,
    "reference": MakeReference,
    "evaluate": Evaluate,
    "sweep": Sweep,
    "reconstruct": Reconstruct,
    "invariance": Invariance,
    "likelihood": Likelihood,
    "probe": Probe,
    "attention": Attention,
    "demo": Demo,
    "reproduce": Reproduce,
    "convert": Convert,
    "env": Env,
    "completion": Completion,
}
