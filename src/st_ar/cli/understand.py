"""Commands that ask what a model understands: probe, attention, likelihood, invariance."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.cli.options import (
    Device,
    Ema,
    EmaWeights,
    ImageSet,
    Json,
    MaskOwnPosition,
    MaskRatio,
    MaskSeed,
    Models,
    Names,
    Page,
    Result,
    Tokenizer,
    VQType,
    Weights,
    check_page,
)
from st_ar.config import InvarianceSettings
from st_ar.errors import UserError, require


@dataclass(kw_only=True)
class Probe:
    """Linear probes after MAE: how well a frozen model's features predict the class, after each number of tokens read.

    The network is given the null class, so no label leaks. Prints top-1 accuracy, and top-5 for more than five classes. Features
    are cached in --cache, and the next call reads them from there.
    """

    model: Models
    tokens: Path
    """Token store to train the probes on."""
    test_tokens: Path
    """Token store to test them on (its centre crops)."""
    names: Names = ()
    weights: Weights = "live"
    ema: EmaWeights = False
    layers: tuple[int, ...] | Literal["all"] = ()
    """Layers to probe, counted from 1, or all. Half the depth by default."""
    steps: tuple[int, ...] = ()
    """Numbers of positions read, 1..T. Eight uniformly spaced ones by default."""
    mean_over_steps: bool = False
    """Also probe the mean of the features over the steps."""
    train_crops: tuple[int, ...] | None = None
    """Which of the stored crops to train on. All by default; 4, the centre of a ten-crop store, is ten times as quick."""
    method: Literal["mae", "ridge", "logistic"] = "mae"
    """mae is the protocol that papers quote. ridge and logistic regression are quicker, give other numbers, and need scikit-learn
    (extra quickstart)."""
    penalty: float = 1.0
    """Penalty of ridge (alpha) and logistic regression (1 / C), on standardised features."""
    epochs: int = 90
    """Passes over the training features (mae)."""
    base_lr: float = 0.1
    """Learning rate for a batch of 256; it scales with the batch (mae)."""
    min_lr: float = 1.0
    """The scaled rate is at least this, so that probes on small data sets converge. 0 follows MAE to the letter (mae)."""
    seed: int = 0
    """Seed of the probes' initialisation and data order (mae)."""
    cache: Path | None = None
    """Folder for the features. By default `features` in $ST_AR_CACHE, or in st-ar below $XDG_CACHE_HOME or ~/.cache."""
    cache_limit: float = 50.0
    """Largest size of the cache in GB; the least recently used features go first. ImageNet's centre crops take 31 GB per layer
    (8 steps, 768 features, float32)."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """Type of cached features. float16 takes half the space and rounds them to 11 bits."""
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the model's matrix products. auto is bfloat16 on a GPU that has it. The probes are float32."""
    out: Result = None
    json: Json = None
    figure: Path | None = None
    """FILE.svg or FILE.png for the curves. Their numbers go to FILE.json."""
    page: Page = None

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
        )
        from st_ar.evaluation.probe_classifiers import NAMES, ProbeConfig
        from st_ar.evaluation.probe_features import GB, FeatureCache
        from st_ar.files import cache_folder, write_json
        from st_ar.hardware import choose_device, choose_dtype
        from st_ar.model.weights import EvalModel, open_eval_models
        from st_ar.report import json_alone, keep_json, print_table

        self._check_options()
        config = ProbeConfig(epochs=self.epochs, base_lr=self.base_lr, min_lr=self.min_lr, seed=self.seed)
        method = ProbeMethod(
            name=self.method, config=config, penalty=self.penalty, mean_over_steps=self.mean_over_steps
        )
        method.require_library()
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
        kept: list[str] = []
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
            kept.append(f"{subject.name}: {describe_cache(cache)}")
        _, first = probed[0]
        with json_alone(self.json):
            print(f"{NAMES[self.method]}, {first.train_images:,} training and {first.test_images:,} test images")
            if self.json != "-":
                print_table(*accuracy_table(probed))
            print("\n" + "\n".join([*notes, *kept]))
        record = describe_probes(probed, *stores, self.train_crops, method, dtype, self.cache_dtype)
        if self.out:
            write_json(self.out, record)
        keep_json(self.json, record)
        if self.page:
            from st_ar.evaluation.probe import probe_page

            probe_page(self.page, probed, method, record, notes)
        if self.figure:
            accuracy_figure(probed, method).save(self.figure)

    def _check_options(self) -> None:
        """Refuse what could not be kept at the end, and options of another method."""
        from st_ar.figures import require_drawable
        from st_ar.files import require_absent, require_place
        from st_ar.report import check_json

        check_json(self.json)
        check_page(self.page)
        if self.page:
            require("matplotlib")
        if self.out:
            require_absent(self.out, "a result")
            require_place(self.out)
        if self.figure:
            require_drawable(self.figure)
            numbers = self.figure.with_suffix(".json")
            if self.out and self.out.absolute() == numbers.absolute():
                raise UserError(f"--figure {self.figure} keeps its numbers in {numbers}, which is --out: rename one")
            for path in (self.figure, numbers):
                require_absent(path, "a figure", flag="--figure")
                require_place(path)
        foreign = ("penalty",) if self.method == "mae" else ("epochs", "base_lr", "min_lr", "seed")
        for name in foreign:
            if getattr(self, name) != getattr(Probe, name):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} has no meaning with --method {self.method}: leave it out")


@dataclass(kw_only=True)
class Attention:
    """Attention of one or more models: maps over images of a store, and statistics by layer.

    Prints the statistics. --out gets the maps, the numbers, and attention.html with both.
    """

    model: Models
    names: Names = ()
    tokens: Path
    """Token store with the images to read (their centre crops)."""
    tokenizer: Tokenizer
    out: Path
    """Folder for the maps, statistics.json, statistics.csv and the page."""
    layers: tuple[int, ...] = ()
    """Layers to draw, counted from 1. Half the depth by default. Statistics are of every layer."""
    heads: tuple[str, ...] = ("mean",)
    """Heads to draw: mean for their average, numbers counted from 1, or all for each on its own."""
    steps: tuple[int, ...] = ()
    """Numbers of tokens read after which to draw. By default fifths of the image, and all but its last token."""
    images: tuple[int, ...] = (0, 1, 2)
    """Which of the store's images to draw."""
    average: int = 256
    """Number of images for the statistics, evenly spaced in the store."""
    mask_ratio: MaskRatio = 0.0
    mask_own_position: MaskOwnPosition = True
    seed: MaskSeed = 0
    ema: Ema = False
    device: Device = "auto"
    json: Json = None

    def run(self) -> None:
        from st_ar.evaluation.attention import ImageMasks
        from st_ar.evaluation.attention_report import AttentionOptions, report_attention, statistics_table
        from st_ar.files import read_json
        from st_ar.report import check_json, json_alone, keep_json, print_table

        check_json(self.json)
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
        if self.json != "-":
            print_table(*statistics_table(statistics))
        with json_alone(self.json):
            print(f"\npage: {self.out / 'attention.html'}")
        if self.json:
            keep_json(self.json, read_json(self.out / "statistics.json", "attention's statistics"))


FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Likelihood:
    """The validation loss: how well models predict the tokens of unseen images, given their classes.

    The mean next-token loss in nats per token over the centre crop of each image, in float32, and its exponential, the perplexity.
    Losses compare only between models of one tokenizer.
    """

    model: Models
    tokens: Path
    """Token store of the images."""
    names: Names = ()
    weights: Weights = "live"
    ema: EmaWeights = False
    mask_ratio: MaskRatio = 0.0
    mask_own_position: MaskOwnPosition = True
    seed: MaskSeed = 0
    device: Device = "auto"
    out: Result = None
    json: Json = None

    def run(self) -> None:
        from st_ar.data.store import TokenStore
        from st_ar.evaluation.attention import ImageMasks
        from st_ar.evaluation.likelihood import validation_loss
        from st_ar.files import require_absent, require_place, write_json
        from st_ar.hardware import choose_device, describe
        from st_ar.model.weights import check_store, open_eval_models
        from st_ar.progress import progress
        from st_ar.report import check_json, keep_json, print_table

        check_json(self.json)
        if self.out:
            require_absent(self.out, "a result")
            require_place(self.out)
        masks = ImageMasks(ratio=self.mask_ratio, seed=self.seed, own_position=self.mask_own_position)
        device, store = choose_device(self.device), TokenStore(self.tokens)
        subjects = open_eval_models(self.model, self.names, self.weights, ema=self.ema)
        for subject in subjects:
            check_store(subject.info, store)
        store.verify()
        with progress("likelihood", len(store) * len(subjects), unit="images") as bar:
            losses = {
                subject.name: validation_loss(subject.open().to(device), store, masks=masks, advance=bar.advance)
                for subject in subjects
            }
        if self.json != "-":
            header = ("", "loss (nats per token)", "perplexity")
            print_table(header, [(name, f"{loss:.4f}", f"{math.exp(loss):.2f}") for name, loss in losses.items()])
            codes = store.meta.vocab_size
            hidden = f", {self.mask_ratio:.0%} of the keys masked" if self.mask_ratio else ""
            print(f"\n{len(store):,} images{hidden}; a uniform guess among {codes:,} tokens has {math.log(codes):.4f}")
        results = [{"model": s.name, "weights": s.describe(), "loss": losses[s.name]} for s in subjects]
        record = {"format_version": FORMAT_VERSION, "store": store.describe(), "results": results}
        record |= {"masks": asdict(masks)} if self.mask_ratio else {}
        record |= {"environment": describe()}
        if self.out:
            write_json(self.out, record)
        keep_json(self.json, record)


@dataclass(kw_only=True)
class Invariance:
    """Measure token invariance (the paper's Fig. 1c): the share of an image's tokens that stay when its view changes a little.

    Two views of each image, the second shifted, mirrored or resized, are tokenized and compared at corresponding positions. Writes
    all numbers, the curve over the shift, and pictures of two views.
    """

    tokenizer: tuple[Path, ...]
    """Tokenizers: folders, or LlamaGen .pt files. Several are compared on the same views."""
    images: ImageSet
    out: Path
    """Folder for invariance.json, invariance.csv, the curve and the pictures."""
    names: Names = ()
    settings: Annotated[InvarianceSettings, tyro.conf.arg(name="")] = field(default_factory=InvarianceSettings)
    device: Device = "auto"
    dtype: VQType = "float32"
    json: Json = None
    page: Page = None

    def run(self) -> None:
        from st_ar.evaluation.invariance import measure_invariance, summarise
        from st_ar.report import check_json, json_alone, keep_json, print_table
        from st_ar.tokenizer import open_tokenizer

        check_json(self.json)
        check_page(self.page)
        names = choose_names(self.tokenizer, self.names)
        tokenizers = {
            name: open_tokenizer(path, self.device, self.dtype)
            for name, path in zip(names, self.tokenizer, strict=True)
        }
        result, found, drawings = measure_invariance(tokenizers, self.images, self.out, self.settings)
        summaries = [summarise(agreement) for agreement in found.values()]
        rows = [
            (label, *("-" if (value := each[label]) is None else _percent(*value) for each in summaries))
            for label in summaries[0]
        ]
        chance = ("different images", *(f"{100 * agreement.chance:.2f}" for agreement in found.values()))
        header, rows = ("equal tokens (%)", *names), [*rows, chance]
        if self.page:
            from st_ar.evaluation.invariance import invariance_page

            invariance_page(self.page, header, rows, result, drawings)
        if self.json != "-":
            print_table(header, rows)
        about = result["images"]
        if about["skipped"]:
            print(f"st-ar: {about['skipped']} images that cannot be decoded were left out", file=sys.stderr)
        if about["enlarged"]:
            side = result["settings"]["side"]
            print(f"st-ar: {about['enlarged']} images were smaller than {side} pixels and enlarged", file=sys.stderr)
        with json_alone(self.json):
            source = f"{about['name']} ({about['sha256'][:8]})"
            print(f"\n{about['count']:,} images of {source}, mean ± standard error over them")
            print(f"{self.out / 'invariance.json'}: all numbers; the curve is {self.out / 'curve.svg'}")
        keep_json(self.json, result)


def _percent(mean: float, error: float) -> str:
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


def choose_names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """A name for each tokenizer: those given, or those of their files, or their whole paths where these are not different.

    Raises:
        UserError: no tokenizer, or names that are too few, too many or the same.
    """
    if not paths:
        raise UserError("--tokenizer must name at least one tokenizer")
    if not names:
        short = [path.stem if path.suffix == ".pt" else path.name for path in paths]
        names = short if len(set(short)) == len(short) else [str(path) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"--names must give each of {len(paths)} tokenizers a name of its own, not {', '.join(names)}")
    return list(names)
