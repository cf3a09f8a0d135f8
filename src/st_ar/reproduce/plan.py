"""The commands that a table or figure needs, in order, and what they cost. Each is a command that anyone could give by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path

from st_ar.cost import run_bytes, training_flops
from st_ar.errors import UserError
from st_ar.reproduce.measured import Files, Weights, budgets
from st_ar.reproduce.paper import Experiment, Recipe, Row
from st_ar.reproduce.run import Stage, is_done
from st_ar.reproduce.scales import Scale, options
from st_ar.training.run import trained_config


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the models are trained and measured on."""

    images: str
    test_images: str
    tokenizer: Path | None = None
    """One that is there; None to train the scale's."""
    reference: str | None = None
    """For evaluation; None to compute it from the test images."""
    fit: Mapping[str, int] = field(default_factory=dict)
    """Settings of the model that they ask for, if not the preset's: num_classes, vocab_size, grid."""


class Plan:
    """The stages of an experiment in order; those that two rows or two experiments share are the same, in the same place.

    Args:
        work: folder of everything that is made.
        seeds: of the runs; every row has one for each.
        steps: optimizer steps of 50 epochs at the small scales, if not the preset's.
        weights: which of a run's are measured.
        compiled: whether runs are compiled.

    Raises:
        UserError: seeds that say nothing, or a scale that needs a tokenizer and was given none.
    """

    def __init__(
        self,
        experiment: Experiment,
        scale: Scale,
        data: Data,
        work: Path,
        *,
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        weights: Sequence[Weights] = ("live",),
        compiled: bool = False,
    ) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UserError(f"--seeds must be different numbers of 0 or more, at least one, not {list(seeds)}")
        self.experiment, self.scale, self.data, self.work, self.compiled = experiment, scale, data, work, compiled
        self._stages: dict[Path, Stage] = {}
        given = data.images != scale.images
        self.size, crops = (scale.size, scale.crops) if given else ((), ())
        self.tokenizer = data.tokenizer or self._train_tokenizer()
        self.tokens = self._tokenize("training", data.images, crops)
        self.test_tokens = self._tokenize("test", data.test_images, ("--crops", "center"))
        self.files = {row.label: Files(share=row.quarter / 4) for row in experiment.rows}
        for row in experiment.rows:
            for seed in seeds:
                run, model = self._train(row, seed, steps)
                files = self.files[row.label]
                files.runs.append(run)
                for which in weights:
                    if "fid" in experiment.metrics:
                        files.evaluations.setdefault(which, []).append(self._evaluate(model, seed, which))
                    if "probe" in experiment.metrics or experiment.figure in ("probe", "understanding"):
                        files.probes.setdefault(which, []).append(self._probe(model, which))
                    if "attention" in experiment.metrics:
                        files.attentions.setdefault(which, []).append(self._look(model, which))
                    if experiment.metrics:
                        files.likelihoods.setdefault(which, []).append(self._likelihood(model, which))
        self.figures: list[Path] = []
        if experiment.figure in ("attention", "understanding"):
            self.figures += [self._maps(which) for which in weights]
        if experiment.figure == "understanding":
            self.figures.append(self._invariance())

    @property
    def stages(self) -> list[Stage]:
        """All of them, in order."""
        return list(self._stages.values())

    def _add(self, name: str, makes: Path, *command: str, flops: float = 0.0, disk: float = 0.0) -> Path:
        self._stages.setdefault(makes, Stage(name=name, command=command, makes=makes, flops=flops, disk=disk))
        return makes

    def _train_tokenizer(self) -> Path:
        if self.scale.tokenizer is None:
            raise UserError("this scale takes a tokenizer that is there: give --tokenizer (LlamaGen's vq_ds16_c2i.pt)")
        out = self.work / "tokenizer"
        size = self.size if "kmeans" in self.scale.tokenizer else ()  # VQ presets have one
        images = ("--images", self.data.images, *size)
        return self._add("tokenizer", out, "train-tokenizer", *self.scale.tokenizer, *images, "--out", str(out))

    def _tokenize(self, kind: str, images: str, crops: Sequence[str]) -> Path:
        out = self.work / f"tokens-{kind}"
        what = ("--images", images, "--tokenizer", str(self.tokenizer), *self.size, *crops, "--out", str(out))
        views = 1 if kind == "test" else 10
        disk = 0 if self.scale.image_count is None or kind == "test" else self.scale.image_count * views * 512
        return self._add(f"tokens of the {kind} images", out, "tokenize", *what, disk=disk)

    def _train(self, row: Row, seed: int, steps: int | None) -> tuple[Path, "_Model"]:
        """A run, and which of its weights are the row's."""
        recipe = row.recipe
        stretch = self._stretch(recipe, seed) if recipe.equal_time else 1.0
        preset, config = self.scale.config(recipe, seed, steps=steps, stretch=stretch, fit=self.data.fit)
        config, run = replace(config, compile=self.compiled), self._run(recipe, seed)
        if recipe.equal_time and (run / "config.json").exists():  # begun when less, or nothing, was known of the times
            begun = trained_config(run)
            config = replace(config, steps=begun.steps, epochs=begun.epochs)
        known = config.steps is not None or self.scale.image_count is not None
        quarter = 0
        if recipe.keeps:
            quarter = config.total_steps(self.scale.image_count or 0) // 4
            if not quarter:
                raise UserError("--steps must be at least 4 for a run to have quarters")
            config = replace(config, keep_every=quarter, checkpoint_every=gcd(quarter, config.checkpoint_every))
        self._add(
            f"train {run.name}",
            run,
            *("train", preset, "--tokens", str(self._tokens(recipe)), "--out", str(run), *options(preset, config)),
            flops=training_flops(config, self.scale.image_count or 0) if known else 0.0,
            disk=run_bytes(config, self.scale.image_count or 0),
        )
        if not quarter:
            return run, _Model(run, run)
        step = quarter * row.quarter
        return run, _Model(run / "kept" / f"step_{step:08d}", run.with_name(f"{run.name}-step{step}"))

    def _tokens(self, recipe: Recipe) -> Path:
        if not recipe.centered:
            return self.tokens
        return self._tokenize("centered", self.data.images, ("--crops", "center-mirror"))

    def _run(self, recipe: Recipe, seed: int) -> Path:
        return self.work / "runs" / f"{run_name(recipe)}-seed{seed}"

    def _stretch(self, recipe: Recipe, seed: int) -> float:
        """How many steps of `recipe` take as long as one of ST-AR: as both have run here, or by their FLOPs before that."""
        guided = Recipe(size=recipe.size, epochs=recipe.epochs)
        plain = replace(recipe, equal_time=False)
        runs = [self._run(each, seed) for each in (guided, plain)]
        if all(is_done(run, self.work) for run in runs):
            return budgets(runs[0])[1] / budgets(runs[1])[1]
        configs = [self.scale.config(each, seed, fit=self.data.fit)[1] for each in (guided, plain)]
        count = self.scale.image_count or 1
        return training_flops(configs[0], count) / training_flops(configs[1], count)

    def _evaluate(self, model: "_Model", seed: int, weights: Weights) -> Path:
        scale, guided = self.scale, self.experiment.guidance
        extractor = ("--extractor", scale.extractor)
        reference = self.data.reference
        if reference is None:
            made = self.work / f"reference-{scale.extractor}.npz"
            images = (self.data.test_images, *self.size)
            reference = str(self._add("reference", made, "reference", *images, *extractor, "--out", str(made)))
        samples = model.beside(weights, f"{'guided' if guided else 'unguided'}.npz")
        how = ("--model", str(model.path), "--tokenizer", str(self.tokenizer), *scale.samples, "--seed", str(seed))
        how += ("--ema",) if weights == "ema" else ()
        guidance = () if guided else ("--cfg-scale", "1")
        disk = scale.sample_count * scale.side**2 * 3
        self._add(f"sample {model.name}", samples, "sample", *how, *guidance, "--out", str(samples), disk=disk)
        out = samples.with_suffix(".evaluation.json")
        how = (str(samples), "--reference", reference, *extractor, "--json", str(out))
        return self._add(f"evaluate {model.name}", out, "evaluate", *how)

    def _probe(self, model: "_Model", weights: Weights) -> Path:
        out = model.beside(weights, "probe.json")
        stores = ("--tokens", str(self.tokens), "--test-tokens", str(self.test_tokens))
        cache = ("--cache", str(self.work / "cache"))
        which = ("--weights", "ema") if weights == "ema" else ()
        what = ("--model", str(model.path), *stores, *self.scale.probe, *which, *cache, "--out", str(out))
        first = not any(stage.command[0] == "probe" for stage in self.stages)  # they share the cache
        return self._add(f"probe {model.name}", out, "probe", *what, disk=self.scale.features if first else 0)

    def _likelihood(self, model: "_Model", weights: Weights) -> Path:
        out = model.beside(weights, "likelihood.json")
        which = ("--weights", "ema") if weights == "ema" else ()
        what = ("--model", str(model.path), "--tokens", str(self.test_tokens), *which, "--out", str(out))
        return self._add(f"likelihood {model.name}", out, "likelihood", *what)

    def _look(self, model: "_Model", weights: Weights) -> Path:
        out, which = model.beside(weights, "attention"), ("--ema",) if weights == "ema" else ()
        return self._attention(f"attention of {model.name}", {model.name: model.path}, out, *which)

    def _maps(self, weights: Weights) -> Path:
        """Attention of every row side by side, of the layers that the figure is about."""
        runs = {label: files.runs[0] for label, files in self.files.items()}
        which = ["--ema"] if weights == "ema" else []
        if depths := self.experiment.depths:
            layers = self.scale.config(self.experiment.rows[0].recipe, 0)[1].model.n_layers
            which += ["--layers", *dict.fromkeys(str(max(1, round(layers * depth))) for depth in depths)]
        name = "-".join(["attention", *(["ema"] if weights == "ema" else []), *(run.name for run in runs.values())])
        return self._attention("attention", runs, self.work / name, *which)

    def _attention(self, name: str, runs: Mapping[str, Path], out: Path, *which: str) -> Path:
        models = ("--model", *map(str, runs.values()), "--names", *runs, *which)
        what = (*models, "--tokens", str(self.test_tokens), "--tokenizer", str(self.tokenizer), "--out", str(out))
        return self._add(name, out, "attention", *what)

    def _invariance(self) -> Path:
        out = self.work / "invariance"
        what = ("--images", self.data.test_images, "--tokenizer", str(self.tokenizer), "--out", str(out))
        return self._add("invariance", out, "invariance", *what)


@dataclass(frozen=True)
class _Model:
    """What is measured: a run, or the weights of one of its steps."""

    path: Path
    stem: Path
    """What the paths of its measurements begin with."""

    @property
    def name(self) -> str:
        return self.stem.name

    def beside(self, weights: Weights, what: str) -> Path:
        return self.stem.with_name(f"{self.name}-{'ema-' if weights == 'ema' else ''}{what}")


def run_name(recipe: Recipe) -> str:
    """A folder's name that tells a recipe from all others."""
    parts = ["st-ar" if recipe.guided else "ar", recipe.size.lower(), f"{recipe.epochs}-epochs"]
    parts += [] if recipe.views is None else [f"{recipe.views}-views"]
    parts += ["centered"] if recipe.centered else []
    parts += [] if recipe.contrast is None else [f"depth-{recipe.contrast:g}"]
    parts += [f"{name.replace('_', '-')}-{str(value).lower()}" for name, value in sorted(recipe.changes.items())]
    parts += [] if recipe.accumulate == 1 else [f"{recipe.accumulate}-micro-batches"]
    parts += ["equal-time"] if recipe.equal_time else []
    parts += ["kept"] if recipe.keeps else []
    return "-".join(parts)
