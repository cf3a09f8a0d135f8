"""Commands around the pipeline: quickstart, demo, reproduce, env, completion."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from st_ar.cli import options
from st_ar.errors import UserError, require
from st_ar.reproduce.paper import EXPERIMENTS, SCALES, Experiment, Name, Row, ScaleName, Size, resized
from st_ar.settings import flag_name

if TYPE_CHECKING:
    from st_ar.demo.setup import Setup


@dataclass(kw_only=True)
class Quickstart:
    """Train AR, ST-AR, and ST-AR with its contrastive losses only, on embedded images; probe, sample and compare them.

    The images come with scikit-image and scikit-learn. It takes less than five minutes on two cores with AVX512-BF16, and writes
    report.html, overview.svg and summary.json. Run the same command again to continue a stopped quickstart.
    """

    out: Path = Path("quickstart")
    """Folder for the report and all other files."""
    images: Literal["photos", "digits"] = "photos"
    """Patches of 16 photographs, or handwritten digits."""
    steps: int | None = None
    """Optimizer steps of each model. By default those of the preset."""
    seed: int = 0
    """Random seed."""
    json: options.Json = None

    def run(self) -> None:
        from st_ar.files import read_json
        from st_ar.quickstart import LABELS, quickstart
        from st_ar.report import json_alone

        options.check_results(self.json)
        with json_alone(self.json):
            report = quickstart(self.out, images=self.images, steps=self.steps, seed=self.seed)
        summary = read_json(self.out / "summary.json", "a finished quickstart")
        measured = [summary[name] for name in LABELS]
        rows = [
            ("probe accuracy, last step (%)", *(f"{100 * m['probe']['top1'][-1]:.1f}" for m in measured)),
            ("validation loss (nats per token)", *(f"{m['validation_loss']:.3f}" for m in measured)),
            ("class accuracy of samples (%)", *(f"{100 * m['class_accuracy']:.1f}" for m in measured)),
            ("FD-regions of samples", *(f"{m['frechet']:.4f}" for m in measured)),
            ("seconds per training step", *(f"{m['seconds_per_step']:.3f}" for m in measured)),
        ]
        text = f"\n{summary['seconds_of_this_call']:.0f} s; report: {report}"
        options.report(self.json, summary, ("", *LABELS.values()), rows, text)


@dataclass(kw_only=True)
class Env:
    """Print versions, CPU, GPUs, memory and threads for a bug report."""

    json: options.Json = None

    def run(self) -> None:
        from st_ar.hardware import environment
        from st_ar.report import check_json, keep_json

        check_json(self.json)
        found = environment()
        if self.json != "-":
            for name, value in found.items():
                if isinstance(value, dict):
                    value = ", ".join(f"{key} {text}" for key, text in value.items())
                elif isinstance(value, list):
                    value = "; ".join(value)
                print(f"{name.replace('_', '-'):12}  {'-' if value in (None, '') else value}")
        keep_json(self.json, found)


@dataclass(kw_only=True)
class Completion:
    """Print a shell's completion script for commands, presets, options and their choices."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell to generate the script for."""

    def run(self) -> None:
        from st_ar.cli.completion import completion

        print(completion(self.shell), end="")


@dataclass(kw_only=True)
class Demo:
    """Serve a web demo on this machine: generate images token by token, compare two models, inspect attention, follow runs.

    Without --model it uses the models of the quickstart, and runs the quickstart first if necessary. Needs the extra demo.
    """

    model: options.Models = ()
    tokenizer: Path | None = None
    """Tokenizer of the models: its folder, or a LlamaGen .pt file."""
    names: options.Names = ()
    tokens: Path | None = None
    """Token store with images to inspect."""
    probe_tokens: Path | None = None
    """Token store with classes (its centre crops), to fit probes that predict an image's class as it is read."""
    probe_images: int = 4000
    """Largest number of images to fit a probe on."""
    runs: tuple[Path, ...] = ()
    """Runs to follow, besides those of --model."""
    quickstart: Path = Path("quickstart")
    """Folder of the quickstart to use without --model. If there is none, the quickstart runs first, in minutes."""
    host: str = "127.0.0.1"
    """Address to serve on. With an address other than this machine's own, anyone who reaches it can use the demo."""
    port: int = 7860
    """Port to serve on; 0 takes a free port."""
    root_path: str = ""
    """Public address behind a reverse proxy, such as https://example.org/demo. The demo then answers to its host name too."""
    device: options.Device = "auto"
    dtype: options.ModelType = "auto"

    def run(self) -> None:
        self._check()
        with TemporaryDirectory(prefix="st-ar-demo-") as folder:  # other users cannot read it
            os.environ["GRADIO_TEMP_DIR"] = folder
            from st_ar.demo.serve import bind, serve

            require("matplotlib")
            bind(self.host, self.port).close()  # fail early
            serve(self._setup(), self.host, self.port, self.root_path)

    def _setup(self) -> "Setup":
        from st_ar.demo.models import ModelPool
        from st_ar.demo.serve import is_local
        from st_ar.demo.setup import Setup, find_runs, open_store, quickstart_setup

        if not is_local(self.host):
            print(
                f"--host {self.host}: anyone who can reach this address can use the demo, which has no login",
                file=sys.stderr,
            )
        if not self.model:
            setup = quickstart_setup(
                self.quickstart, device=self.device, dtype=self.dtype, probe_images=self.probe_images
            )
            setup.runs = {**setup.runs, **find_runs([], self.runs)}
            return setup
        assert self.tokenizer is not None
        return Setup(
            runs=find_runs(self.model, self.runs),
            pool=ModelPool(self.model, self.tokenizer, names=self.names, device=self.device, dtype=self.dtype),
            store=open_store(self.tokens) if self.tokens else None,
            probe_store=open_store(self.probe_tokens) if self.probe_tokens else None,
            probe_images=self.probe_images,
        )

    def _check(self) -> None:
        if len(self.model) > 2:
            raise UserError(f"--model has {len(self.model)} models: the demo compares at most two")
        if self.model and self.tokenizer is None:
            raise UserError("--model needs a tokenizer: give --tokenizer")
        if not self.model:
            if wrong := [name for name in ("tokenizer", "names", "tokens", "probe_tokens") if getattr(self, name)]:
                flag = f"--{flag_name(wrong[0])}"
                raise UserError(f"{flag} needs --model: give both, or neither to use the quickstart's models")
        elif self.quickstart != Path("quickstart"):
            raise UserError("--quickstart and --model exclude each other: give one of them")
        if self.probe_images < 2:
            raise UserError(f"--probe-images must be at least 2, not {self.probe_images}")
        if not self.host:
            raise UserError("--host is empty: give an address, such as 127.0.0.1 for this machine only")
        if self.root_path and not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[^?#\s]*)?", self.root_path):
            raise UserError(
                f"--root-path {self.root_path} is not a full address: give the public one, such as https://example.org/demo"
            )


WHAT = (
    "Table or figure of the paper, or one of six others: evidence (each loss alone), questions (what the paper leaves open), "
    "cheaper and remedies (weaker self-guidance), length (long runs, measured after each quarter), "
    "classes (whether samples show the class they were generated for)."
)
SCALE = (
    "tiny: 1.1M parameters, 32 px, on the embedded photographs or --data; minutes per run on two cores. "
    "small: 3.1M parameters, 32 px, on --data; hours. imagenet: the paper's models and training lengths."
)


@dataclass(kw_only=True)
class Reproduce:
    """Reproduce a table or figure of the paper: train and measure the models, and show the results beside the paper's.

    Prints each command before it runs. Run the same command again to continue a stopped one. Tables with the same --out share runs.
    """

    what: Annotated[tyro.conf.Positional[Name], tyro.conf.arg(help=WHAT)]
    out: Path
    """Folder for all runs and results."""
    scale: Annotated[ScaleName, tyro.conf.arg(help=SCALE)] = "tiny"
    data: str | None = None
    """Image source of the training images (folder:PATH, parquet:GLOB, hub:NAME:SPLIT). tiny has a default."""
    test_data: str | None = None
    """Image source of the test images, and of the reference unless --reference is given."""
    mirror: bool = True
    """Mirror half of the training images. Turn it off where mirror images have another meaning, such as digits and letters."""
    tokenizer: Path | None = None
    """Tokenizer to use instead of training one. imagenet needs LlamaGen's vq_ds16_c2i.pt."""
    reference: str | None = None
    """Reference for the samples. The paper uses ADM's VIRTUAL_imagenet256_labeled.npz."""
    size: Size = "B"
    """Model size, for tables that do not compare sizes. Files of other sizes than B are named WHAT-SIZE."""
    rows: tuple[str, ...] = ()
    """Labels of the rows to run. All by default."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds of each row. The table shows mean and standard deviation."""
    steps: int | None = None
    """Optimizer steps in place of 50 epochs at the scales tiny and small. 300 epochs become six times as many."""
    weights: options.Weights = "live"
    compile: bool | Literal["auto"] = "auto"
    """Train with --compile: faster for runs longer than a few minutes. auto compiles on GPUs. On a CPU it needs a C++ compiler."""
    dry_run: bool = False
    """Print the commands, their training time and disk space, and run nothing."""
    json: options.Json = None

    def run(self) -> None:
        from st_ar.cli import run_command
        from st_ar.files import read_json
        from st_ar.report import check_json, json_alone, keep_json
        from st_ar.reproduce.page import print_plan, show
        from st_ar.reproduce.plan import Data, Plan, fit_model, run_stages

        if self.dry_run and self.json:
            raise UserError("--json has no effect with --dry-run, which measures nothing: leave one of them out")
        check_json(self.json)
        scale, experiment = SCALES[self.scale], self._experiment()
        images, test_images = self.data or scale.images, self.test_data or scale.test_images
        if images is None or test_images is None or (self.data is None) != (self.test_data is None):
            raise UserError(
                f"--scale {self.scale} needs both --data and --test-data: give sources of the training and test images"
            )
        if self.steps is not None and (self.steps < 1 or self.scale == "imagenet"):
            raise UserError(
                f"--steps is {self.steps}: give at least 1, and only at the scales tiny and small; imagenet has the paper's lengths"
            )
        data = Data(
            images=images,
            test_images=test_images,
            tokenizer=self.tokenizer,
            reference=self.reference,
            mirror=self.mirror,
            fit={} if self.scale == "imagenet" else fit_model(self.data, self.tokenizer, scale.side),
        )

        def plan(rows: Sequence[Row]) -> Plan:
            weights = ("live", "ema") if self.weights == "both" else (self.weights,)
            return Plan(
                replace(experiment, rows=tuple(rows)),
                scale,
                data,
                self.out,
                seeds=self.seeds,
                steps=self.steps,
                weights=weights,
                compiled=self.compile,
            )

        if self.dry_run:
            print_plan(plan(experiment.rows), self.out)
            return
        require("jinja2")
        require("matplotlib")
        # The length of rows of equal time depends on the training time of the others.
        with json_alone(self.json):
            run_stages(
                plan([row for row in experiment.rows if not row.recipe.equal_time]).stages, self.out, run_command
            )
            full = plan(experiment.rows)
            run_stages(full.stages, self.out, run_command)
            name = self.what if self.size == "B" else f"{self.what}-{self.size.lower()}"
            show(name, full)
        if self.json:
            keep_json(self.json, read_json(self.out / f"{name}.json", "a table of the paper"))

    def _experiment(self) -> Experiment:
        """The chosen table or figure with the chosen rows and size."""
        experiment = EXPERIMENTS[self.what]
        labels = [row.label for row in experiment.rows]
        if unknown := [label for label in self.rows if label not in labels]:
            raise UserError(
                f"{self.what} has no row {unknown[0]!r}: give --rows some of {', '.join(map(repr, labels))}"
            )
        chosen = tuple(row for row in experiment.rows if not self.rows or row.label in self.rows)
        if self.size == "B":
            return replace(experiment, rows=chosen)
        if any(row.recipe.size != "B" for row in experiment.rows):
            raise UserError(f"{self.what} compares sizes: leave out --size, and choose rows with --rows")
        others = tuple(replace(row, recipe=resized(row.recipe, self.size, self.what), paper={}) for row in chosen)
        return replace(experiment, title=f"{experiment.title}, size {self.size}", rows=others)
