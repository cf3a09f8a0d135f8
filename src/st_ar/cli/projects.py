"""Commands around the pipeline: quickstart, demo, reproduce, env, completion."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from st_ar.cli.options import Device, Json, Models, ModelType, Names, Weights
from st_ar.errors import UserError, require
from st_ar.reproduce.paper import EXPERIMENTS, SCALES, Experiment, Name, Row, ScaleName, Size, resized

if TYPE_CHECKING:
    from st_ar.demo.setup import Setup


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
    json: Json = None

    def run(self) -> None:
        from st_ar.files import read_json
        from st_ar.quickstart import METHODS, quickstart
        from st_ar.report import check_json, json_alone, keep_json, print_table

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
class Env:
    """Print versions, CPU, GPUs, memory and threads, for a bug report."""

    json: Json = None

    def run(self) -> None:
        from st_ar.hardware import environment
        from st_ar.report import check_json, keep_json

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
        from st_ar.cli.completion import completion

        print(completion(self.shell), end="")


@dataclass(kw_only=True)
class Demo:
    """Serve a web demo on this machine: generate token by token, compare two models, inspect attention, follow runs.

    Without --model it shows the quickstart's models, and trains them first if there are none. Needs the extra demo.
    """

    model: Models = ()
    tokenizer: Path | None = None
    """Tokenizer of the models: its folder, or a LlamaGen .pt file."""
    names: Names = ()
    tokens: Path | None = None
    """Token store whose images can be inspected."""
    probe_tokens: Path | None = None
    """Token store with classes (centre crops) to fit quick probes on, which predict an image's class as it is read."""
    probe_images: int = 4000
    """Largest number of images to fit a probe on."""
    runs: tuple[Path, ...] = ()
    """Run folders to follow, besides those of --model."""
    quickstart: Path = Path("quickstart")
    """Without --model: folder of the quickstart to show. It is made if there is none, in minutes."""
    host: str = "127.0.0.1"
    """Address to serve on. Any other address lets other machines in: whoever reaches it can use the demo."""
    port: int = 7860
    """Port to serve on; 0 takes a free one."""
    device: Device = "auto"
    dtype: ModelType = "auto"

    def run(self) -> None:
        self._check()
        from st_ar.demo.serve import bind, private_folder, require_gradio, serve

        with private_folder():
            require_gradio()
            require("matplotlib")
            bind(self.host, self.port).close()  # before anything that takes long
            serve(self._setup(), self.host, self.port)

    def _setup(self) -> "Setup":
        from st_ar.demo.models import ModelPool
        from st_ar.demo.serve import is_local
        from st_ar.demo.setup import Setup, find_runs, open_store, quickstart_setup

        if not is_local(self.host):
            print(
                f"--host {self.host}: anyone who reaches this address can use the demo; it has no login",
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
            raise UserError(f"--model names {len(self.model)} models: the demo compares two at most")
        if self.model and self.tokenizer is None:
            raise UserError("--model needs --tokenizer, which decodes its tokens")
        if not self.model:
            given = {"--tokenizer": self.tokenizer, "--names": self.names, "--tokens": self.tokens}
            if wrong := [flag for flag, value in (given | {"--probe-tokens": self.probe_tokens}).items() if value]:
                raise UserError(f"{wrong[0]} goes with --model: give both, or neither for the quickstart's models")
        elif self.quickstart != Path("quickstart"):
            raise UserError("--quickstart and --model exclude each other: give one of them")
        if self.probe_images < 2:
            raise UserError(f"--probe-images must be at least 2, not {self.probe_images}")
        if not self.host:
            raise UserError("--host must name an address, such as 127.0.0.1 for this machine alone")


@dataclass(kw_only=True)
class Reproduce:
    """Make a table or figure of the paper: train what is missing, measure it, and show it beside the paper's numbers.

    Prints each command before running it. The same command continues a stopped one, and tables with the same --out share runs.
    """

    what: tyro.conf.Positional[Name]
    """Table or figure. Five are ours: questions (what the paper leaves open), evidence (each loss alone and with the others), cheaper
    and remedies (self-guidance for less), length (long runs measured after each quarter)."""
    out: Path
    """Folder for everything."""
    scale: ScaleName = "tiny"
    """tiny: 1.1M parameters on the embedded photographs or --data, minutes a run on two cores. small: 3.1M on --data, hours. Both
    use images of 32 pixels. imagenet: the paper's models and lengths."""
    data: str | None = None
    """Image source of the training images (folder:PATH, parquet:GLOB, hub:NAME:SPLIT). tiny has its own."""
    test_data: str | None = None
    """Image source of the test images, and of the reference if there is no --reference."""
    tokenizer: Path | None = None
    """Tokenizer to use instead of training the scale's. imagenet needs one: LlamaGen's vq_ds16_c2i.pt."""
    reference: str | None = None
    """Reference for the samples: ADM's VIRTUAL_imagenet256_labeled.npz for the paper's numbers."""
    size: Size = "B"
    """Model size, for tables that do not compare sizes. Files of another size than B are named WHAT-SIZE."""
    rows: tuple[str, ...] = ()
    """Rows to make, by their labels in the table. All by default."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each row; the table shows mean and standard deviation."""
    steps: int | None = None
    """Optimizer steps that stand for 50 epochs (six times as many for 300), at the small scales."""
    weights: Weights = "live"
    compile: bool = False
    """Train with --compile: faster for runs of more than a few minutes. Needs a C++ compiler on a CPU."""
    dry_run: bool = False
    """Print the commands, the hours they would take here, and the disk they need; run nothing."""
    json: Json = None

    def run(self) -> None:
        from st_ar.cli import run_command
        from st_ar.files import read_json
        from st_ar.report import check_json, json_alone, keep_json
        from st_ar.reproduce.page import print_plan, show
        from st_ar.reproduce.plan import Data, Plan, fit_model, run_stages

        if self.dry_run and self.json:
            raise UserError("--json writes measurements, and --dry-run makes none: leave one of them out")
        check_json(self.json)
        scale, experiment = SCALES[self.scale], self._experiment()
        images, test_images = self.data or scale.images, self.test_data or scale.test_images
        if images is None or test_images is None or (self.data is None) != (self.test_data is None):
            raise UserError(
                f"--scale {self.scale} needs --data and --test-data, both: sources of the training and of the test images"
            )
        if self.steps is not None and (self.steps < 1 or self.scale == "imagenet"):
            raise UserError("--steps must be at least 1, and is for the small scales: imagenet has the paper's lengths")
        data = Data(
            images=images,
            test_images=test_images,
            tokenizer=self.tokenizer,
            reference=self.reference,
            fit={} if self.scale == "imagenet" else fit_model(self.data, self.tokenizer, scale.side),
        )

        def plan(rows: Sequence[Row]) -> Plan:
            wanted = replace(experiment, rows=tuple(rows))
            weights = ("live", "ema") if self.weights == "both" else (self.weights,)
            chosen: dict[str, Any] = {
                "seeds": self.seeds,
                "steps": self.steps,
                "weights": weights,
                "compiled": self.compile,
            }
            return Plan(wanted, scale, data, self.out, **chosen)

        if self.dry_run:
            print_plan(plan(experiment.rows), self.out)
            return
        require("jinja2")
        require("matplotlib")
        # How long the rows of equal time are is known when the others have been trained.
        with json_alone(self.json):
            run_stages(
                plan([row for row in experiment.rows if not row.recipe.equal_time]).stages, self.out, run_command
            )
            whole = plan(experiment.rows)
            run_stages(whole.stages, self.out, run_command)
            name = self.what if self.size == "B" else f"{self.what}-{self.size.lower()}"
            show(name, whole)
        if self.json:
            keep_json(self.json, read_json(self.out / f"{name}.json", "a table of the paper's"))

    def _experiment(self) -> Experiment:
        """What was asked for, with the rows that were asked for."""
        experiment = EXPERIMENTS[self.what]
        labels = [row.label for row in experiment.rows]
        if unknown := [label for label in self.rows if label not in labels]:
            raise UserError(
                f"{self.what} has no row {unknown[0]!r}: --rows takes some of {', '.join(map(repr, labels))}"
            )
        chosen = tuple(row for row in experiment.rows if not self.rows or row.label in self.rows)
        if self.size == "B":
            return replace(experiment, rows=chosen)
        if any(row.recipe.size != "B" for row in experiment.rows):
            raise UserError(f"{self.what} compares sizes: choose among them with --rows, and leave out --size")
        others = tuple(replace(row, recipe=resized(row.recipe, self.size, self.what), paper={}) for row in chosen)
        return replace(experiment, title=f"{experiment.title}, size {self.size}", rows=others)
