"""The commands behind a table or figure of the paper: their order, what is done, and their results."""

import shlex
import time
from collections import defaultdict
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
from st_ar.presets import get_preset
from st_ar.report import Spread
from st_ar.reproduce.paper import EQUAL_TIMES, Experiment, Recipe, Row, Scale, options
from st_ar.settings import matches_type
from st_ar.training.run import read_log, seconds_per_step, trained_config

TOKENS, TIME = "tokens read (M)", "training (min)"

ATTENTION = "attention at half depth"
"""Prefix of the names of attention statistics."""

Weights = Literal["live", "ema"]


Measuring = Literal["evaluate", "classes", "probe", "likelihood", "attention"]
"""What measures a run's weights: a command, or the classifier of decoded images."""
CLASS_SCALES = (1.0, 1.25, 1.5, 2.0)
"""Guidance scales of the samples whose class is measured."""
CLASS_SAMPLES = 5000


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a row's results, one of each per seed."""

    share: float = 1.0
    """Share of its runs that the row covers."""
    runs: list[Path] = field(default_factory=list)
    results: dict[tuple[Measuring, Weights], list[Path]] = field(default_factory=lambda: defaultdict(list))


def measurements(files: Files, metrics: Sequence[str]) -> dict[str, Spread]:
    """Read a row's results: metrics, last probe accuracy in %, validation loss, attention at half depth, and both budgets.

    Args:
        metrics: the metrics of the table. Evaluations also give their FD.
    """
    readers: dict[Measuring, Callable[[Path], dict[str, float]]] = {
        "evaluate": lambda path: {
            name: value
            for name, value in evaluation(path).items()
            if name.startswith("F") or name.split(" ")[0].lower() in metrics  # FID, FD-..
        },
        "classes": class_fidelity,
        "probe": lambda path: {"probe, last step (%)": 100 * probe_curve(path)[1][-1]},
        "likelihood": lambda path: {"validation loss": likelihood(path)},
        "attention": attention,
    }
    values: dict[str, list[float]] = defaultdict(list)
    order = list(readers)
    for (command, weights), paths in sorted(files.results.items(), key=lambda item: order.index(item[0][0])):
        for numbers in map(readers[command], paths):
            for name, value in numbers.items():
                values[name + (", EMA" if weights == "ema" else "")].append(value)
    for run in files.runs:
        tokens, seconds = budgets(run)
        values[TOKENS].append(files.share * tokens / 1e6)
        values[TIME].append(files.share * seconds / 60)
    return {name: Spread(tuple(each)) for name, each in values.items()}


def evaluation(path: Path) -> dict[str, float]:
    """Read the metrics of samples."""
    numbers = read_json(path, "an evaluation").get("metrics")
    if not matches_type(numbers, dict[str, float]):
        raise damaged(path, "it has no metrics", "remove it to evaluate again")
    return numbers


def class_fidelity(path: Path) -> dict[str, float]:
    """Read what the classifier says of samples: class accuracy in %, FD, and at guidance 1 also IS, precision and recall."""
    numbers = {name.removesuffix(" (classifier)"): value for name, value in evaluation(path).items()}
    scale = path.name.removesuffix(".evaluation.json").rpartition("guidance-")[2]
    if "class accuracy" not in numbers or "FD-classifier" not in numbers:
        raise damaged(path, "it has no class accuracy and FD", "remove it to evaluate again")
    numbers["class accuracy (%)"] = 100 * numbers.pop("class accuracy")
    if scale == "1":
        return numbers
    return {f"{name}, guidance {scale}": numbers[name] for name in ("class accuracy (%)", "FD-classifier")}


def probe_curve(path: Path) -> tuple[list[float], list[float]]:
    """Read the steps and the top-1 accuracy at each."""
    result = _first_result(path, "a probe")
    steps, shares = result.get("steps"), result.get("top1")
    if (
        not matches_type(steps, list[float])
        or not matches_type(shares, list[float])
        or not 0 < len(steps) == len(shares)
    ):
        raise damaged(path, "it has no accuracy by step", "remove it to probe again")
    return list(map(float, steps)), list(map(float, shares))


def likelihood(path: Path) -> float:
    """Read the validation loss."""
    loss = _first_result(path, "a likelihood").get("loss")
    if not matches_type(loss, float):
        raise damaged(path, "it has no loss", "remove it to measure again")
    return float(loss)


def attention(folder: Path) -> dict[str, float]:
    """Read the mean statistics of the layer at half depth, named after the columns of `st-ar attention`."""
    path = folder / "statistics.json"
    models: Any = read_json(path, "a result of `st-ar attention`").get("models")
    try:
        layers = next(iter(models.values()))["layers"]
        means = layers[str(max(1, len(layers) // 2))]["over_heads"]["mean"]
        if matches_type(means, dict[str, float]):
            return {
                f"{ATTENTION}: {column}": float(means[name]) for column, name in zip(COLUMNS, STATISTICS, strict=True)
            }
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError):
        pass
    raise damaged(path, "it has no statistics of a layer", f"remove {folder} to make them again")


def _first_result(path: Path, what: str) -> dict[str, Any]:
    results = read_json(path, what).get("results")
    return results[0] if matches_type(results, list[dict[str, Any]]) and results else {}


def budgets(run: Path) -> tuple[float, float]:
    """Return the tokens that a run has read, and its training time in seconds at its median speed."""
    config, seconds = trained_config(run), seconds_per_step(run)
    steps = read_log(run / "log.jsonl")[-1]["step"]
    return steps * config.batch_size * config.views * config.model.sequence_length, steps * seconds


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command and the file or folder that it makes."""

    name: str
    command: tuple[str, ...]
    makes: Path
    flops: float = 0.0
    """FLOPs of training, which takes most of the time."""
    disk: float = 0.0
    """Bytes that are known in advance."""


def run_stages(stages: Sequence[Stage], work: Path, call: Callable[[list[str]], None]) -> None:
    """Run each command that is not done.

    done/NAME.json in `work` holds a command once it has started, and its seconds once it is done.

    Args:
        call: runs a command line.

    Raises:
        UserError: as the commands; or something in `work` was made by another command.
    """
    for number, stage in enumerate(stages, start=1):
        file = _status_file(stage.makes, work)
        command = list(stage.command)
        status = read_status(file) if file.exists() else None
        if status is not None and status["command"] != command:
            raise UserError(
                f"{stage.makes} was made by another command, `st-ar {shlex.join(status['command'])}`, not by "
                f"`st-ar {shlex.join(command)}`: choose another --out, or remove it and {file}"
            )
        if status is not None and status.get("seconds") is not None:
            if not stage.makes.exists():
                raise UserError(
                    f"{stage.makes} is missing, but {file} says that it was made: remove {file} to make it again"
                )
            continue
        print(f"\n[{number}/{len(stages)}] {stage.name}\nst-ar {shlex.join(command)}", flush=True)
        if status is None and stage.makes.exists():
            raise UserError(f"{stage.makes} exists already and was not made here: choose another --out, or remove it")
        write_json(file, {"command": command, "seconds": None})
        started = time.perf_counter()
        if not _is_complete(stage):
            resumed = _is_run(stage) and (stage.makes / "config.json").exists()  # other commands resume by themselves
            call([*command, *(["--resume"] if resumed else [])])
        write_json(file, {"command": command, "seconds": time.perf_counter() - started})


def read_status(path: Path) -> dict[str, Any]:
    """Read a stage's command and seconds; the seconds are None until it is done."""
    status = read_json(path, "a stage")
    seconds = status.get("seconds")
    if not matches_type(status.get("command"), list[str]) or not (seconds is None or matches_type(seconds, float)):
        raise damaged(path, "it has no command and seconds", "remove it and the stage's result to run the stage again")
    return status


def _is_complete(stage: Stage) -> bool:
    """Whether a command that was stopped had written its last file."""
    path = stage.makes
    last = {
        "train-tokenizer": path / "tokenizer.json",
        "tokenize": path / "meta.json",
        "sample": path.with_suffix(".json"),
    }
    return not _is_run(stage) and last.get(stage.command[0], path).exists()


def _is_run(stage: Stage) -> bool:
    return stage.command[0] == "train" or (stage.command[0] == "train-tokenizer" and stage.command[1] != "kmeans")


def is_done(path: Path, work: Path) -> bool:
    """Whether a command has made this and was not stopped."""
    file = _status_file(path, work)
    return file.exists() and read_status(file).get("seconds") is not None


def _status_file(path: Path, work: Path) -> Path:
    return work / "done" / f"{path.name}.json"


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data to train and measure on."""

    images: str
    test_images: str
    tokenizer: Path | None = None
    """An existing tokenizer; None to train the scale's."""
    reference: str | None = None
    """Reference for evaluation; None to compute it from the test images."""
    mirror: bool = True
    """Whether training images may be mirrored."""
    fit: Mapping[str, int] = field(default_factory=dict)
    """Model settings that the data require: num_classes, vocab_size, grid."""


class Plan:
    """The stages of an experiment in order. Rows and experiments share equal stages.

    Args:
        seeds: seeds of the runs; every row has a run for each.
        steps: optimizer steps of 50 epochs at the small scales; by default the preset's.
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
        compiled: bool | Literal["auto"] = "auto",
    ) -> None:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UserError(f"--seeds must be one or more different numbers of 0 or more, not {list(seeds)}")
        self.experiment, self.scale, self.data, self.work, self.compiled = experiment, scale, data, work, compiled
        self._stages: dict[Path, Stage] = {}
        other_images = data.images != scale.images
        self.size, crops = (scale.size, scale.crops) if other_images else ((), ())
        crops += () if data.mirror else ("--no-mirror",)
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
                        files.results["evaluate", which].append(self._evaluate(model, seed, which))
                    if "classes" in experiment.metrics:
                        files.results["classes", which] += [
                            self._classify(model, seed, which, guidance) for guidance in CLASS_SCALES
                        ]
                    if "probe" in experiment.metrics or experiment.figure in ("probe", "understanding"):
                        files.results["probe", which].append(self._probe(model, which))
                    if "attention" in experiment.metrics:
                        name, out = f"attention of {model.name}", model.beside(which, "attention")
                        attention = self._attention(name, {model.name: model.path}, out, which)
                        files.results["attention", which].append(attention)
                    if experiment.metrics:
                        files.results["likelihood", which].append(self._likelihood(model, which))
        self.figures: list[Path] = []
        if experiment.figure in ("attention", "understanding"):
            self.figures += [self._maps(which) for which in weights]
        if experiment.figure == "understanding":
            out = work / "invariance"
            arguments = ("--images", data.test_images, "--tokenizer", str(self.tokenizer), "--out", str(out))
            self.figures.append(self._add("invariance", out, "invariance", *arguments))

    @property
    def stages(self) -> list[Stage]:
        """All stages in order."""
        return list(self._stages.values())

    def _add(self, name: str, makes: Path, *command: str, flops: float = 0.0, disk: float = 0.0) -> Path:
        self._stages.setdefault(makes, Stage(name=name, command=command, makes=makes, flops=flops, disk=disk))
        return makes

    def _train_tokenizer(self) -> Path:
        if self.scale.tokenizer is None:
            raise UserError("this scale trains no tokenizer: give --tokenizer (LlamaGen's vq_ds16_c2i.pt)")
        out = self.work / "tokenizer"
        size = self.size if "kmeans" in self.scale.tokenizer else ()  # VQ presets set it
        images = ("--images", self.data.images, *size)
        return self._add("tokenizer", out, "train-tokenizer", *self.scale.tokenizer, *images, "--out", str(out))

    def _tokenize(self, kind: str, images: str, crops: Sequence[str]) -> Path:
        out = self.work / f"tokens-{kind}"
        arguments = ("--images", images, "--tokenizer", str(self.tokenizer), *self.size, *crops, "--out", str(out))
        disk = 0 if self.scale.image_count is None or kind == "test" else self.scale.image_count * 10 * 512
        return self._add(f"tokens of the {kind} images", out, "tokenize", *arguments, disk=disk)

    def _train(self, row: Row, seed: int, steps: int | None) -> tuple[Path, "_Model"]:
        """Add a row's run; returns it and the weights that the row measures."""
        recipe = row.recipe
        stretch = self._stretch(recipe, seed) if recipe.equal_time else 1.0
        preset, config = self.scale.config(recipe, seed, steps=steps, stretch=stretch, fit=self.data.fit)
        config, run = replace(config, compile=self.compiled), self._run(recipe, seed)
        if recipe.equal_time and (run / "config.json").exists():  # keep the length that was estimated at its start
            started = trained_config(run)
            config = replace(config, steps=started.steps, epochs=started.epochs)
        known = config.steps is not None or self.scale.image_count is not None
        quarter = 0
        if recipe.keeps:
            quarter = config.total_steps(self.scale.image_count or 0) // 4
            if not quarter:
                raise UserError("--steps must be at least 4, so that a run has quarters")
            config = replace(config, keep_every=quarter, checkpoint_every=gcd(quarter, config.checkpoint_every))
        tokens = self.tokens
        if recipe.centered:
            kind = "center-mirror" if self.data.mirror else "center"
            tokens = self._tokenize("centered", self.data.images, ("--crops", kind))
        self._add(
            f"train {run.name}",
            run,
            *("train", preset, "--tokens", str(tokens), "--out", str(run), *options(get_preset(preset), config)),
            flops=training_flops(config, self.scale.image_count or 0) if known else 0.0,
            disk=run_bytes(config, self.scale.image_count or 0),
        )
        if not quarter:
            return run, _Model(run, run)
        step = quarter * row.quarter
        return run, _Model(run / "kept" / f"step_{step:08d}", run.with_name(f"{run.name}-step{step}"))

    def _run(self, recipe: Recipe, seed: int) -> Path:
        return self.work / "runs" / f"{run_name(recipe)}-seed{seed}"

    def _stretch(self, recipe: Recipe, seed: int) -> float:
        """Return how many steps of `recipe` take as long as one of its `equal_time`, from finished runs or else from FLOPs."""
        guided = Recipe(size=recipe.size, epochs=recipe.epochs, changes=EQUAL_TIMES[recipe.equal_time])
        plain = replace(recipe, equal_time="")
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
            file = self.work / f"reference-{scale.extractor}.npz"
            images = (self.data.test_images, *self.size)
            reference = str(self._add("reference", file, "reference", *images, *extractor, "--out", str(file)))
        samples = model.beside(weights, f"{'guided' if guided else 'unguided'}.npz")
        arguments = ("--model", str(model.path), "--tokenizer", str(self.tokenizer), *scale.samples)
        arguments += ("--seed", str(seed), *(("--ema",) if weights == "ema" else ()))
        arguments += () if guided else ("--cfg-scale", "1")
        disk = scale.sample_count * scale.side**2 * 3
        self._add(f"sample {model.name}", samples, "sample", *arguments, "--out", str(samples), disk=disk)
        out = samples.with_suffix(".evaluation.json")
        arguments = (str(samples), "--reference", reference, *extractor, "--json", str(out))
        return self._add(f"evaluate {model.name}", out, "evaluate", *arguments)

    def _classify(self, model: "_Model", seed: int, weights: Weights, guidance: float) -> Path:
        """Add samples at a guidance scale, and what a classifier of the decoded training images says of them."""
        data = ("--tokens", str(self.tokens), "--test-tokens", str(self.test_tokens))
        data += ("--tokenizer", str(self.tokenizer))
        folder = self.work / "classifier"
        classifier = self._add("classifier", folder, "train-classifier", *data, "--out", str(folder))
        samples = model.beside(weights, f"guidance-{guidance:g}.npz")
        arguments = ("--model", str(model.path), "--tokenizer", str(self.tokenizer), "--num", str(CLASS_SAMPLES))
        arguments += ("--seed", str(seed), *(("--ema",) if weights == "ema" else ()), "--cfg-scale", f"{guidance:g}")
        self._add(f"sample {model.name}", samples, "sample", *arguments, "--out", str(samples))
        out = samples.with_suffix(".evaluation.json")
        arguments = (str(samples), "--classifier", str(classifier), "--json", str(out))
        return self._add(f"classify {model.name}", out, "evaluate", *arguments)

    def _probe(self, model: "_Model", weights: Weights) -> Path:
        out = model.beside(weights, "probe.json")
        arguments = ("--model", str(model.path), "--tokens", str(self.tokens), "--test-tokens", str(self.test_tokens))
        arguments += (*self.scale.probe, *(("--weights", "ema") if weights == "ema" else ()))
        arguments += ("--cache", str(self.work / "cache"), "--out", str(out))
        first = not any(stage.command[0] == "probe" for stage in self.stages)  # all share the cache
        return self._add(f"probe {model.name}", out, "probe", *arguments, disk=self.scale.features if first else 0)

    def _likelihood(self, model: "_Model", weights: Weights) -> Path:
        out = model.beside(weights, "likelihood.json")
        arguments = ("--model", str(model.path), "--tokens", str(self.test_tokens))
        arguments += ("--weights", "ema") if weights == "ema" else ()
        return self._add(f"likelihood {model.name}", out, "likelihood", *arguments, "--out", str(out))

    def _maps(self, weights: Weights) -> Path:
        """Add the attention of every row, at the layers of the figure."""
        runs = {label: files.runs[0] for label, files in self.files.items()}
        layers: list[str] = []
        if depths := self.experiment.depths:
            depth = self.scale.config(self.experiment.rows[0].recipe, 0)[1].model.n_layers
            layers = ["--layers", *dict.fromkeys(str(max(1, round(depth * share))) for share in depths)]
        name = "-".join(["attention", *(["ema"] if weights == "ema" else []), *(run.name for run in runs.values())])
        return self._attention("attention", runs, self.work / name, weights, *layers)

    def _attention(self, name: str, runs: Mapping[str, Path], out: Path, weights: Weights, *layers: str) -> Path:
        models = ("--model", *map(str, runs.values()), "--names", *runs, *(("--ema",) if weights == "ema" else ()))
        data = ("--tokens", str(self.test_tokens), "--tokenizer", str(self.tokenizer))
        return self._add(name, out, "attention", *models, *layers, *data, "--out", str(out))


@dataclass(frozen=True)
class _Model:
    """The weights to measure: a run, or one of its kept steps."""

    path: Path
    stem: Path
    """Common prefix of the paths of its results."""

    @property
    def name(self) -> str:
        return self.stem.name

    def beside(self, weights: Weights, what: str) -> Path:
        return self.stem.with_name(f"{self.name}-{'ema-' if weights == 'ema' else ''}{what}")


def run_name(recipe: Recipe) -> str:
    """Return a folder name that is unique to a recipe."""
    parts = ["st-ar" if recipe.guided else "ar", recipe.size.lower(), f"{recipe.epochs}-epochs"]
    parts += [] if recipe.views is None else [f"{recipe.views}-views"]
    parts += ["centered"] if recipe.centered else []
    parts += [] if recipe.contrast is None else [f"depth-{recipe.contrast:g}"]
    parts += [f"{name.replace('_', '-')}-{str(value).lower()}" for name, value in sorted(recipe.changes.items())]
    parts += [] if recipe.accumulate == 1 else [f"{recipe.accumulate}-micro-batches"]
    parts += ["equal-time"] if recipe.equal_time else []
    parts += [recipe.equal_time] if recipe.equal_time not in ("", "ST-AR") else []
    parts += ["kept"] if recipe.keeps else []
    return "-".join(parts)


def fit_model(images: str | None, tokenizer: Path | None, side: int) -> dict[str, int]:
    """Return the model settings that the user's images and tokenizer require."""
    from st_ar.data.images import open_images
    from st_ar.tokenizer import load_tokenizer

    fit: dict[str, int] = {}
    if images is not None:
        fit["num_classes"] = len(open_images(images).class_names)
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        fit |= {"vocab_size": loaded.vocab_size, "grid": loaded.grid(side)}
    return fit
