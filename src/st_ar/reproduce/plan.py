"""The commands behind a table or figure of the paper: which, in what order, what is done, what they measured."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import Any, Literal

from st_ar.errors import UserError, damaged
from st_ar.evaluation.attention import STATISTICS
from st_ar.evaluation.attention_report import COLUMNS
from st_ar.files import read_json, write_json
from st_ar.hardware import run_bytes, training_flops
from st_ar.report import Spread
from st_ar.reproduce.paper import Experiment, Recipe, Row, Scale, options
from st_ar.settings import matches_type
from st_ar.training.run import read_log, seconds_per_step, trained_config

TOKENS, TIME = "tokens read (M)", "training (min)"
"""The two budgets."""

ATTENTION = "attention at half depth"
"""What the names of its numbers begin with."""

Weights = Literal["live", "ema"]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a row's numbers come from: one of each for each seed."""

    share: float = 1.0
    """How much of its runs a row stands for."""
    runs: list[Path] = field(default_factory=list)
    evaluations: dict[Weights, list[Path]] = field(default_factory=dict)
    probes: dict[Weights, list[Path]] = field(default_factory=dict)
    likelihoods: dict[Weights, list[Path]] = field(default_factory=dict)
    attentions: dict[Weights, list[Path]] = field(default_factory=dict)


def measurements(files: Files, metrics: Sequence[str]) -> dict[str, Spread]:
    """A row's numbers: what `evaluate` calls them, probe accuracy at the last step in per cent, validation loss, what the layer at
    half depth looks at, both budgets.

    metrics: those of the paper's table; of an evaluation, the distance and those among them.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, weights: Weights, value: float) -> None:
        found.setdefault(name + (", EMA" if weights == "ema" else ""), []).append(value)

    for weights, paths in files.evaluations.items():
        for path in paths:
            numbers = read_json(path, "an evaluation").get("metrics")
            if not matches_type(numbers, dict[str, float]):
                raise UserError(f"{path} has no metrics that are numbers: remove it, and the evaluation is made again")
            for name, value in numbers.items():
                if name.startswith("F") or name.split(" ")[0].lower() in metrics:  # FID, FD-..
                    add(name, weights, value)
    for weights, paths in files.probes.items():
        for path in paths:
            add("probe, last step (%)", weights, 100 * probe_curve(path)[1][-1])
    for weights, paths in files.likelihoods.items():
        for path in paths:
            add("validation loss", weights, likelihood(path))
    for weights, paths in files.attentions.items():
        for path in paths:
            for name, value in attention(path).items():
                add(f"{ATTENTION}: {name}", weights, value)
    for run in files.runs:
        tokens, seconds = budgets(run)
        found.setdefault(TOKENS, []).append(files.share * tokens / 1e6)
        found.setdefault(TIME, []).append(files.share * seconds / 60)
    return {name: Spread(tuple(values)) for name, values in found.items()}


def probe_curve(path: Path) -> tuple[list[float], list[float]]:
    """Tokens read, and the share of right guesses after each."""
    result = _first_result(path, "a probe")
    steps, shares = result.get("steps"), result.get("top1")
    if (
        not matches_type(steps, list[float])
        or not matches_type(shares, list[float])
        or not 0 < len(steps) == len(shares)
    ):
        raise UserError(f"{path} has no shares of right guesses by step: remove it, and the probe is made again")
    return list(map(float, steps)), list(map(float, shares))


def likelihood(path: Path) -> float:
    """The validation loss."""
    loss = _first_result(path, "a likelihood").get("loss")
    if not matches_type(loss, float):
        raise UserError(f"{path} has no loss: remove it, and it is measured again")
    return float(loss)


def attention(folder: Path) -> dict[str, float]:
    """What the layer at half depth looks at, averaged over heads and images, as the columns of `st-ar attention` name it."""
    path = folder / "statistics.json"
    models = read_json(path, "what `st-ar attention` has written").get("models")
    layers = (
        next(iter(models.values())).get("layers")
        if matches_type(models, dict[str, dict[str, Any]]) and models
        else None
    )
    if matches_type(layers, dict[str, dict[str, Any]]):
        found: Any = layers.get(str(max(1, len(layers) // 2)), {}).get("over_heads", {})
        means: Any = found.get("mean") if isinstance(found, dict) else None
        if matches_type(means, dict[str, float]) and set(STATISTICS) <= set(means):
            return {column: float(means[name]) for column, name in zip(COLUMNS, STATISTICS, strict=True)}
    raise UserError(f"{path} has no statistics of a layer: remove {folder}, and they are made again")


def _first_result(path: Path, what: str) -> dict[str, Any]:
    results = read_json(path, what).get("results")
    return results[0] if matches_type(results, list[dict[str, Any]]) and results else {}


def budgets(run: Path) -> tuple[float, float]:
    """Tokens that a run has read, and the seconds that it took for them, by the median of its pace."""
    config, seconds = trained_config(run), seconds_per_step(run)
    steps = read_log(run / "log.jsonl")[-1]["step"]
    return steps * config.batch_size * config.views * config.model.sequence_length, steps * seconds


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command and what it leaves."""

    name: str
    command: tuple[str, ...]
    """The verb and its options."""
    makes: Path
    """File or folder."""
    flops: float = 0.0
    """Of training, which takes the most of the time."""
    disk: float = 0.0
    """Bytes that are known beforehand."""


def run_stages(stages: Sequence[Stage], work: Path, call: Callable[[list[str]], None]) -> None:
    """Give each command that is not done yet.

    done/NAME.json in `work` holds a command once it was begun, and its seconds once it was done.

    Args:
        call: runs a command line, the verb first.

    Raises:
        UserError: what the commands raise; or something in `work` was made by another command.
    """
    for number, stage in enumerate(stages, start=1):
        mark = _mark(stage.makes, work)
        command = list(stage.command)
        begun = read_mark(mark) if mark.exists() else None
        if begun is not None and begun["command"] != command:
            raise UserError(
                f"{stage.makes} was made by another command, `st-ar {shlex.join(begun['command'])}`, not by "
                f"`st-ar {shlex.join(command)}`: choose another --out, or remove it and {mark}"
            )
        if begun is not None and begun.get("seconds") is not None:
            if not stage.makes.exists():
                raise UserError(
                    f"{stage.makes} is gone, but {mark} says that it was made: remove that to make it again"
                )
            continue
        print(f"\n[{number}/{len(stages)}] {stage.name}\nst-ar {shlex.join(command)}", flush=True)
        if begun is None and stage.makes.exists():
            raise UserError(f"{stage.makes} exists already and was not made here: choose another --out, or remove it")
        write_json(mark, {"command": command, "seconds": None})
        started = time.perf_counter()
        if not _is_whole(stage):
            call(_continued(stage))
        write_json(mark, {"command": command, "seconds": time.perf_counter() - started})


def read_mark(path: Path) -> dict[str, Any]:
    """The command and its seconds, None if it was stopped.

    Raises:
        UserError: no mark of `run_stages`.
    """
    mark = read_json(path, "a stage")
    seconds = mark.get("seconds")
    if not matches_type(mark.get("command"), list[str]) or not (seconds is None or matches_type(seconds, float)):
        raise damaged(path, "it does not say what was done", "remove it, and what it stands for, to do that again")
    return mark


def _continued(stage: Stage) -> list[str]:
    """The command, with --resume where a run is to be continued; other verbs continue what they began, or leave nothing."""
    begun = _is_run(stage) and (stage.makes / "config.json").exists()
    return [*stage.command, *(["--resume"] if begun else [])]


def _is_whole(stage: Stage) -> bool:
    """Whether a command that was stopped had in fact done everything."""
    verb, path = stage.command[0], stage.makes
    last = {  # of what is not written at once
        "train-tokenizer": path / "tokenizer.json",
        "tokenize": path / "meta.json",
        "sample": path.with_suffix(".json"),
    }
    return not _is_run(stage) and last.get(verb, path).exists()


def _is_run(stage: Stage) -> bool:
    return stage.command[0] == "train" or (stage.command[0] == "train-tokenizer" and stage.command[1] != "kmeans")


def is_done(path: Path, work: Path) -> bool:
    """Whether a command has made this, from its beginning to its end."""
    mark = _mark(path, work)
    return mark.exists() and read_mark(mark).get("seconds") is not None


def _mark(path: Path, work: Path) -> Path:
    return work / "done" / f"{path.name}.json"


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


def fit_model(images: str | None, tokenizer: Path | None, side: int) -> dict[str, int]:
    """Model settings that the user's own images and tokenizer require."""
    from st_ar.data.images import open_images
    from st_ar.tokenizer import load_tokenizer

    fit: dict[str, int] = {}
    if images is not None:
        fit["num_classes"] = len(open_images(images).class_names)
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        fit |= {"vocab_size": given.vocab_size, "grid": given.grid(side)}
    return fit
