"""The verb that asks what a model understands: its options are the fields, and its help their docstrings.

What it needs is imported when it runs, so that help is quick.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from st_ar.errors import UserError
from st_ar.evaluation_verbs import check_page
from st_ar.printing import check_json, json_alone, keep_json, print_table


@dataclass(kw_only=True)
class Probe:
    """Linear probes after MAE: how well a frozen model's features tell the class after each number of tokens read.

    The network is given the null condition, so no label leaks. Prints top-1 accuracies, and top-5 of more than five classes;
    --out keeps them as JSON, --figure draws them. Features are kept in --cache, and the next call reads them from there.
    """

    model: tuple[Path, ...]
    """One or several of: a run, an export folder, a .safetensors file, a .pt file of LlamaGen's."""
    tokens: Path
    """Token store to train the probes on."""
    test_tokens: Path
    """Token store to test them on (its centre crop)."""
    names: tuple[str, ...] = ()
    """What to call the models, one name each; by default their paths' last parts."""
    weights: Literal["live", "ema", "both"] = "live"
    """Probe the live weights, the averaged ones, or both."""
    ema: bool = False
    """The same as --weights ema."""
    layers: tuple[int, ...] | Literal["all"] = ()
    """Layers to probe, counted from 1, or all; half the depth by default."""
    steps: tuple[int, ...] = ()
    """Numbers of positions read, 1..T; 8 uniformly spaced ones by default."""
    mean_over_steps: bool = False
    """One probe more, on the mean of the features over the steps."""
    train_crops: tuple[int, ...] | None = None
    """Which of the stored crops to train on; all by default. 4 is the centre of a ten-crop store, which is ten times as quick."""
    method: Literal["mae", "ridge", "logistic"] = "mae"
    """mae is the protocol that papers quote. ridge and logistic regression are quicker, give other numbers, and need scikit-learn
    (extra quickstart)."""
    penalty: float = 1.0
    """Of ridge (alpha) and logistic regression (1 / C), on standardised features."""
    epochs: int = 90
    """Passes over the training features (mae)."""
    base_lr: float = 0.1
    """Learning rate for a batch of 256; it scales with the batch (mae)."""
    min_lr: float = 1.0
    """The peak rate is not scaled below this, so that probes on small data sets converge; 0 for MAE's rule to the letter (mae)."""
    seed: int = 0
    """Seed of the probes' initialisation and order (mae)."""
    cache: Path | None = None
    """Folder for the features; by default `features` in $ST_AR_CACHE, or in st-ar below $XDG_CACHE_HOME or ~/.cache."""
    cache_limit: float = 50.0
    """GB that the features there may take; the ones not used for longest make room. ImageNet's centre crops take 31 GB a layer at
    8 steps of 768 features in float32."""
    cache_dtype: Literal["float32", "float16"] = "float32"
    """Type of the features on disk; float16 takes half the room and rounds them to 11 bits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the model's matrix products; auto takes bfloat16 on a GPU that has it. The probes are float32."""
    out: Path | None = None
    """JSON file for the results, with all that identifies them; never written over."""
    json: str | None = None
    """File for the same JSON; - for standard output, instead of the table."""
    figure: Path | None = None
    """FILE.svg or FILE.png for the curves; their numbers go beside it as FILE.json."""
    page: Path | None = None
    """FILE.html for a page with the numbers, the curves, and what identifies them (extra quickstart)."""

    def run(self) -> None:
        from st_ar.data.store import TokenStore
        from st_ar.evaluation.feature_cache import GB, FeatureCache
        from st_ar.evaluation.lars import ProbeConfig
        from st_ar.evaluation.probe import ProbeMethod, probe_layers
        from st_ar.evaluation.probe_report import (
            Probed,
            accuracy_figure,
            accuracy_table,
            choose_subjects_reading,
            describe_cache,
            describe_probes,
        )
        from st_ar.evaluation.shallow import NAMES
        from st_ar.evaluation.subjects import find_subjects
        from st_ar.files import cache_folder, write_json
        from st_ar.hardware import choose_device, choose_dtype

        self._check_options()
        config = ProbeConfig(epochs=self.epochs, base_lr=self.base_lr, min_lr=self.min_lr, seed=self.seed)
        method = ProbeMethod(
            name=self.method, config=config, penalty=self.penalty, mean_over_steps=self.mean_over_steps
        )
        method.require_library()
        device = choose_device(self.device)
        dtype = choose_dtype("float32" if (self.dtype, device.type) == ("auto", "cpu") else self.dtype, device)
        stores = TokenStore(self.tokens), TokenStore(self.test_tokens)
        subjects = find_subjects(self.model, self.names, self.weights, ema=self.ema)
        readings = [
            choose_subjects_reading(s, *stores, self.layers, self.steps, self.train_crops, dtype) for s in subjects
        ]
        for store in stores:
            store.verify()
        probed: list[Probed] = []
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
            probed += [Probed(subject=subject, result=result) for result in results]
            found = dict.fromkeys(note for result in results for note in result.notes)
            notes += [f"{subject.name}: {note}" for note in found]
            kept.append(f"{subject.name}: {describe_cache(cache)}")
        first = probed[0].result
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
            from st_ar.evaluation.pages import probe_page

            probe_page(self.page, probed, method, record, notes)
        if self.figure:
            accuracy_figure(probed, method).save(self.figure)

    def _check_options(self) -> None:
        """Refuse what could not be kept at the end, and options of another method."""
        from st_ar.figures import require_drawable, require_matplotlib
        from st_ar.files import require_absent, require_place

        check_json(self.json)
        check_page(self.page)
        if self.page:
            require_matplotlib()
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
