"""Commands that evaluate models and tokenizers without sampling: probe, attention, likelihood, invariance."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.cli import options
from st_ar.config import InvarianceSettings
from st_ar.errors import UserError, listed, require
from st_ar.files import printable
from st_ar.settings import flag_name


@dataclass(kw_only=True)
class Probe:
    """Train linear probes after MAE: they predict the class from a frozen model's features after some of the tokens.

    The model gets the null class, so that no label leaks. Prints top-1 accuracy, and top-5 for more than five classes. The
    features are cached in --cache for the next call.
    """

    model: options.Models
    tokens: Path
    """Token store to train the probes on."""
    test_tokens: Path
    """Token store to test the probes on (its centre crops)."""
    names: options.Names = ()
    weights: options.Weights = "live"
    ema: options.EmaWeights = False
    layers: tuple[int, ...] | Literal["all"] = ()
    """Layers to probe, counted from 1, or all. By default the middle layer."""
    steps: tuple[int, ...] = ()
    """Numbers of positions read before each probe, 1 to T. By default eight, uniformly spaced."""
    mean_over_steps: bool = False
    """Also probe the mean of the features over the steps."""
    train_crops: tuple[int, ...] | None = None
    """Indices of the stored crops to train on. All by default. 4, the centre of ten crops, alone is ten times faster."""
    method: Literal["mae", "ridge", "logistic"] = "mae"
    """mae is the published protocol. ridge and logistic are faster, give other numbers and need scikit-learn (extra quickstart)."""
    penalty: float = 1.0
    """Penalty of ridge (alpha) and logistic regression (1 / C) on standardised features."""
    epochs: int = 90
    """Passes over the training features (mae)."""
    base_lr: float = 0.1
    """Learning rate for a batch of 256, scaled with the batch size (mae)."""
    min_lr: float = 1.0
    """Lower bound of the scaled rate, so that probes on small data sets converge. 0 is MAE's own rule (mae)."""
    seed: int = 0
    """Random seed of the probes' initialisation and data order (mae)."""
    cache: Path | None = None
    """Folder for the features. By default `features` in $ST_AR_CACHE, or in st-ar in $XDG_CACHE_HOME or ~/.cache."""
    cache_limit: float = 50.0
    """Largest size of the cache in GB. The least recently used features are deleted first."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """Data type of cached features. float16 takes half the space and rounds to 11 bits."""
    device: options.Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the model's matrix products. auto is bfloat16 on GPUs that support it. Probes are float32."""
    out: options.Result = None
    json: options.Json = None
    figure: Path | None = None
    """FILE.svg or FILE.png for the curves. FILE.json gets their numbers."""
    page: options.Page = None

    def run(self) -> None:
        from st_ar.data.store import TokenStore
        from st_ar.evaluation.probe import (
            ProbeMethod,
            ProbeResult,
            accuracy_figure,
            accuracy_table,
            choose_eval_features,
            describe_cache,
            describe_probes,
            probe_layers,
            probe_page,
        )
        from st_ar.evaluation.probe_classifiers import NAMES, ProbeConfig
        from st_ar.evaluation.probe_features import GB, FeatureCache
        from st_ar.files import cache_folder, write_json
        from st_ar.hardware import choose_device, choose_dtype
        from st_ar.model.weights import EvalModel, open_eval_models

        self._check_options()
        config = ProbeConfig(epochs=self.epochs, base_lr=self.base_lr, min_lr=self.min_lr, seed=self.seed)
        method = ProbeMethod(
            name=self.method, config=config, penalty=self.penalty, mean_over_steps=self.mean_over_steps
        )
        device = choose_device(self.device)
        dtype = choose_dtype("float32" if (self.dtype, device.type) == ("auto", "cpu") else self.dtype, device)
        stores = TokenStore(self.tokens), TokenStore(self.test_tokens)
        subjects = open_eval_models(self.model, self.names, self.weights, ema=self.ema)
        readings = [
            choose_eval_features(s, *stores, self.layers, self.steps, self.train_crops, dtype) for s in subjects
        ]
        for store in stores:
            store.verify()
        probed: list[tuple[EvalModel, ProbeResult]] = []
        notes: list[str] = []
        cached: list[str] = []
        for subject, reading in zip(subjects, readings, strict=True):
            cache = FeatureCache(self.cache or cache_folder() / "features", self.cache_limit * GB, self.cache_dtype)
            results = probe_layers(
                subject.open().to(device),
                *stores,
                layers=reading.layers,
                steps=reading.steps,
                train_crops=self.train_crops,
                method=method,
                dtype=dtype,
                cache=cache,
                weights=subject.sha256,
            )
            probed += [(subject, result) for result in results]
            found = dict.fromkeys(note for result in results for note in result.notes)
            notes += [f"{subject.name}: {note}" for note in found]
            cached.append(f"{subject.name}: {describe_cache(cache)}")
        _, first = probed[0]
        title = f"{NAMES[self.method]}, {first.train_images:,} training and {first.test_images:,} test images"
        record = describe_probes(probed, *stores, self.train_crops, method, dtype, self.cache_dtype)
        if self.out:
            write_json(self.out, record)
        if self.page:
            probe_page(self.page, probed, method, record, notes)
        text = "\n" + "\n".join([*notes, *cached])
        options.report(self.json, record, *accuracy_table(probed), text, title=title, page=self.page)
        if self.figure:
            accuracy_figure(probed, method).save(self.figure)

    def _check_options(self) -> None:
        """Raise a UserError if a result cannot be written, or for options of another method."""
        from st_ar.figures import require_drawable
        from st_ar.files import require_absent, require_place

        options.check_results(self.json, self.page, self.out)
        if self.page:
            require("matplotlib")
        if self.figure:
            require_drawable(self.figure)
            numbers = self.figure.with_suffix(".json")
            if self.out and self.out.absolute() == numbers.absolute():
                raise UserError(f"--figure {self.figure} writes its numbers to {numbers}, which is --out: rename one")
            for path in (self.figure, numbers):
                require_absent(path, "a figure", flag="--figure")
                require_place(path)
        for name in ("penalty",) if self.method == "mae" else ("epochs", "base_lr", "min_lr", "seed"):
            if getattr(self, name) != getattr(Probe, name):
                raise UserError(f"--{flag_name(name)} has no effect with --method {self.method}: leave it out")


@dataclass(kw_only=True)
class Attention:
    """Plot attention maps of one or more models on images of a store, and measure attention by layer.

    Prints the statistics. --out gets the maps, the numbers and attention.html, which shows both.
    """

    model: options.Models
    names: options.Names = ()
    tokens: Path
    """Token store of the images (their centre crops)."""
    tokenizer: options.Tokenizer
    out: Path
    """Folder for the maps, statistics.json, statistics.csv and attention.html."""
    layers: tuple[int, ...] = ()
    """Layers to plot, counted from 1. The middle layer by default. Statistics cover all layers."""
    heads: tuple[str, ...] = ("mean",)
    """Heads to plot: mean for their average, numbers counted from 1, or all for each separately."""
    steps: tuple[int, ...] = ()
    """Numbers of tokens read at which to plot. By default every fifth of the image, and all but the last token."""
    images: tuple[int, ...] = (0, 1, 2)
    """Indices of the images to plot."""
    average: int = 256
    """Number of images for the statistics, evenly spaced in the store."""
    mask_ratio: options.MaskRatio = 0.0
    mask_own_position: options.MaskOwnPosition = True
    seed: options.MaskSeed = 0
    ema: options.Ema = False
    device: options.Device = "auto"
    json: options.Json = None

    def run(self) -> None:
        from st_ar.evaluation.attention import ImageMasks
        from st_ar.evaluation.attention_report import AttentionOptions, report_attention, statistics_table
        from st_ar.files import read_json

        options.check_results(self.json)
        chosen = AttentionOptions(
            layers=self.layers,
            heads=self.heads,
            steps=self.steps,
            images=self.images,
            average=self.average,
            masks=ImageMasks(ratio=self.mask_ratio, seed=self.seed, own_position=self.mask_own_position),
        )
        statistics = report_attention(
            self.model,
            self.tokens,
            self.tokenizer,
            self.out,
            chosen,
            names=self.names,
            ema=self.ema,
            device=self.device,
        )
        record, page = read_json(self.out / "statistics.json", "attention's statistics"), self.out / "attention.html"
        options.report(self.json, record, *statistics_table(statistics), "", page=page)


FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Likelihood:
    """Measure the validation loss of models: the next-token loss on unseen images, given their classes.

    Prints the mean next-token loss in nats per token over the centre crop of each image, in float32, and the perplexity, its
    exponential. Losses are comparable only between models of one tokenizer.
    """

    model: options.Models
    tokens: Path
    """Token store of the images."""
    names: options.Names = ()
    weights: options.Weights = "live"
    ema: options.EmaWeights = False
    mask_ratio: options.MaskRatio = 0.0
    mask_own_position: options.MaskOwnPosition = True
    seed: options.MaskSeed = 0
    device: options.Device = "auto"
    out: options.Result = None
    json: options.Json = None

    def run(self) -> None:
        from st_ar.data.store import TokenStore
        from st_ar.evaluation.attention import ImageMasks
        from st_ar.evaluation.likelihood import validation_loss
        from st_ar.files import write_json
        from st_ar.hardware import choose_device, describe
        from st_ar.model.weights import check_store, open_eval_models
        from st_ar.progress import progress

        options.check_results(self.json, out=self.out)
        masks = ImageMasks(ratio=self.mask_ratio, seed=self.seed, own_position=self.mask_own_position)
        device, store = choose_device(self.device), TokenStore(self.tokens)
        models = open_eval_models(self.model, self.names, self.weights, ema=self.ema)
        for model in models:
            check_store(model.info, store)
        store.verify()
        with progress("likelihood", len(store) * len(models), unit="images") as bar:
            losses = {
                model.name: validation_loss(model.open().to(device), store, masks=masks, advance=bar.advance)
                for model in models
            }
        header, codes = ("", "loss (nats per token)", "perplexity"), store.meta.vocab_size
        if diverged := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            raise UserError(f"the loss of {listed(diverged)} is not finite: the training of these weights has diverged")
        rows = [
            (name, f"{loss:.4f}", f"{math.exp(loss) if loss < 700 else math.inf:.2f}") for name, loss in losses.items()
        ]
        hidden = f", {self.mask_ratio:.0%} of the keys masked" if self.mask_ratio else ""
        text = f"\n{len(store):,} images{hidden}; a uniform guess among {codes:,} tokens has {math.log(codes):.4f}"
        results = [{"model": m.name, "weights": m.describe(), "loss": losses[m.name]} for m in models]
        record = {"format_version": FORMAT_VERSION, "store": store.describe(), "results": results}
        record |= {"masks": asdict(masks)} if self.mask_ratio else {}
        record |= {"environment": describe()}
        if self.out:
            write_json(self.out, record)
        options.report(self.json, record, header, rows, text)


@dataclass(kw_only=True)
class Invariance:
    """Measure token invariance (the paper's Fig. 1c): the share of an image's tokens that stay the same when it shifts.

    Two views of each image, the second shifted, mirrored or resized, are tokenized and compared at corresponding positions. Writes
    all numbers, the curve over the shift, and images of two views.
    """

    tokenizer: tuple[Path, ...]
    """Tokenizers: folders, or LlamaGen .pt files. Several are compared on the same views."""
    images: options.ImageSet
    out: Path
    """Folder for invariance.json, invariance.csv, the curve and the images."""
    names: options.Names = ()
    settings: Annotated[InvarianceSettings, tyro.conf.arg(name="")] = field(default_factory=InvarianceSettings)
    device: options.Device = "auto"
    dtype: options.VQType = "float32"
    json: options.Json = None
    page: options.Page = None

    def run(self) -> None:
        from st_ar.evaluation.invariance import invariance_page, measure_invariance, summarise
        from st_ar.tokenizer import open_tokenizer

        options.check_results(self.json, self.page)
        names = choose_names(self.tokenizer, self.names)
        tokenizers = {
            name: open_tokenizer(path, self.device, self.dtype)
            for name, path in zip(names, self.tokenizer, strict=True)
        }
        result, found, drawings = measure_invariance(tokenizers, self.images, self.out, self.settings)
        summaries = [summarise(agreement) for agreement in found.values()]
        rows = [
            (label, *(f"{100 * v[0]:.1f} ± {100 * v[1]:.1f}" if (v := each[label]) else "-" for each in summaries))
            for label in summaries[0]
        ]
        chance = ("different images", *(f"{100 * agreement.chance:.2f}" for agreement in found.values()))
        header, rows = ("equal tokens (%)", *names), [*rows, chance]
        if self.page:
            invariance_page(self.page, header, rows, result, drawings)
        images = result["images"]
        if images["enlarged"]:
            side = result["settings"]["side"]
            print(f"st-ar: {images['enlarged']} images smaller than {side} pixels are enlarged", file=sys.stderr)
        text = (
            f"\n{images['count']:,} images of {images['name']} ({images['sha256'][:8]}), mean ± standard error\n"
            f"{self.out / 'invariance.json'}: all numbers; curve in {self.out / 'curve.svg'}"
        )
        options.report(self.json, result, header, rows, text, page=self.page)


def choose_names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Return a name for each tokenizer: the given names, or the last parts of the paths, or the paths if those are equal."""
    if not paths:
        raise UserError("--tokenizer is empty: give at least one tokenizer")
    if not names:
        short = [path.stem if path.suffix == ".pt" else path.name for path in paths]
        names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"--names {' '.join(names)}: give each of the {len(paths)} tokenizers a different name")
    return list(map(printable, names))
