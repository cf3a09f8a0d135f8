"""The verb that makes the paper's tables and figures: its options are the fields, and its help their docstrings.

What it needs is imported when it runs, so that help is quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from st_ar.errors import UserError
from st_ar.printing import check_json, json_alone, keep_json
from st_ar.reproduce.paper import EXPERIMENTS, Experiment, Name, Recipe, Row, Size
from st_ar.reproduce.scales import SCALES, ScaleName


@dataclass(kw_only=True)
class Reproduce:
    """Make a table or a figure of the paper: train what is missing, measure it, and show it beside the paper's numbers.

    Each step is a command that is printed before it is given. The same command again continues what a stopped one began, and other
    tables with the same --out share its runs.
    """

    what: tyro.conf.Positional[Name]
    """Which table or figure. Ours: questions, what the paper leaves open, one setting changed at a time; cheaper, self-guidance
    for less; remedies, weaker forms and what they cost the samples; evidence, each loss alone and with the others; length, one long run
    of each method, measured after each quarter."""
    out: Path
    """Folder of everything that is made."""
    scale: ScaleName = "tiny"
    """tiny: 1.1M parameters on the embedded photographs or --data, minutes a run on two cores. small: 3.1M on --data, hours. Both
    take images at 32 pixels. imagenet: the paper's models and lengths."""
    data: str | None = None
    """Image source of the training images (folder:PATH, parquet:GLOB, hub:NAME:SPLIT); tiny has the photographs."""
    test_data: str | None = None
    """Image source of the test images, which samples are measured against too, if there is no --reference."""
    tokenizer: Path | None = None
    """One that is there, instead of training the scale's; imagenet needs one (LlamaGen's vq_ds16_c2i.pt)."""
    reference: str | None = None
    """What samples are measured against; ADM's VIRTUAL_imagenet256_labeled.npz for the paper's numbers."""
    size: Size = "B"
    """Size of the models of a table that does not compare sizes: the scale's B, L or XL. Files of another than B are named WHAT-SIZE."""
    rows: tuple[str, ...] = ()
    """Rows to make, by their labels in the table; all by default."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; every row is trained with each, and the table shows mean and standard deviation."""
    steps: int | None = None
    """Optimizer steps that stand for 50 epochs (six times as many for 300), if not the small scales' own."""
    weights: Literal["live", "ema", "both"] = "live"
    """Which weights of each run to measure: the live ones, the averaged ones, or both."""
    compile: bool = False
    """Train with --compile (needs a C++ compiler on a CPU): faster where a run takes more than a few minutes."""
    dry_run: bool = False
    """Print the commands, what they would cost here, and the disk they need; make nothing."""
    json: str | None = None
    """File for the table as JSON, which also lies in --out; - for standard output: everything else goes to standard error."""

    def run(self) -> None:
        from st_ar.cli import run_command
        from st_ar.figures import require_matplotlib
        from st_ar.files import read_json
        from st_ar.report import require_reports
        from st_ar.reproduce.estimate import print_plan
        from st_ar.reproduce.page import show
        from st_ar.reproduce.plan import Data, Plan
        from st_ar.reproduce.run import run_stages

        if self.dry_run and self.json:
            raise UserError("--json is for what was measured, and --dry-run measures nothing: leave one of them out")
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
            fit={} if self.scale == "imagenet" else _fit(self.data, self.tokenizer, scale.side),
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
        require_reports()
        require_matplotlib()
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


def resized(recipe: Recipe, size: Size, what: str) -> Recipe:
    """A recipe at another size than B; Table 5's default, half the depth, is not that of L's and XL's presets."""
    contrast = 0.5 if what == "table5" and recipe.contrast is None else recipe.contrast
    return replace(recipe, size=size, contrast=contrast)


def _fit(images: str | None, tokenizer: Path | None, side: int) -> dict[str, int]:
    """What the user's own images and tokenizer ask of the model."""
    from st_ar.data.images import open_images
    from st_ar.tokenizer import load_tokenizer

    fit: dict[str, int] = {}
    if images is not None:
        fit["num_classes"] = len(open_images(images).class_names)
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        fit |= {"vocab_size": given.vocab_size, "grid": given.grid(side)}
    return fit
