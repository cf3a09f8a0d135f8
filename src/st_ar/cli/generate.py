"""Commands that generate images: sample and sweep."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.cli import options
from st_ar.config import Metric, SampleSettings

COMPILED_FROM = 1000
"""Images from which `sample --compile auto` compiles on a GPU: the compilation takes longer than a few images."""


@dataclass(kw_only=True)
class Sample:
    """Sample images from a model into a .npz file (ADM's layout) or a folder of PNGs, with a file of the settings.

    Run the same command again to continue a stopped job. Under torchrun the ranks share the images:
    torchrun --nproc-per-node 4 "$(which st-ar)" sample ..
    """

    model: options.Model
    tokenizer: options.Tokenizer
    out: Path
    """FILE.npz, or a folder for PNGs."""
    text: options.Text = None
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-images"])] = None
    """Number of images. 64 by default, or one per caption. Under torchrun, which refuses --num, write --num-images."""
    per_class: int | None = None
    """Images per class, instead of --num. FID uses 50,000 images: 50 for each of 1,000 classes."""
    labels: tuple[int, ...] = ()
    """Classes to sample. All by default."""
    label_mode: options.LabelMode = "balanced"
    settings: Annotated[SampleSettings, tyro.conf.arg(name="")] = field(default_factory=SampleSettings)
    batch_size: int = 256
    """Images per batch. It changes images by rounding at most."""
    ema: options.Ema = False
    grid: int | None = None
    """Tokens per side, if not as trained: 24 for 384 px with LlamaGen's 256 px weights."""
    device: options.Device = "auto"
    dtype: options.ModelType = "auto"
    compile: bool | Literal["auto"] = "auto"
    """Compile the blocks with torch.compile: faster after some seconds. auto compiles on GPUs from 1,000 images on."""

    def run(self) -> None:
        from st_ar.data.text import open_text
        from st_ar.distributed import Ranks
        from st_ar.errors import listed, note
        from st_ar.hardware import choose_compile
        from st_ar.sampling import Sampler, choose_conditions, open_model_and_tokenizer, sample_to

        ranks = Ranks.from_environment()
        model, info, tokenizer = open_model_and_tokenizer(
            self.model, self.tokenizer, device=self.device, dtype=self.dtype, ema=self.ema, grid=self.grid
        )
        text = open_text(self.text, info.config, info.encoder)
        labels = choose_conditions(
            info.config,
            text,
            self.num,
            self.settings.seed,
            mode=self.label_mode,
            labels=self.labels,
            per_class=self.per_class,
            empty=info.empty_classes,
        )
        settings = self.settings.resolved(info.config, info.class_dropout)
        origin = self.settings.scale_origin(info.config, info.class_dropout)
        if ranks.rank == 0:
            if empty := [str(c) for c in info.empty_classes if c in self.labels or not self.labels]:
                left_out = "" if self.labels else "; they are left out, and --labels can name them"
                note(f"the model has seen no image of class {listed(empty)}{left_out}")
            note(f"guidance scale {settings.cfg_scale:g}: {origin}")
        wanted = self.compile if self.compile != "auto" or len(labels) >= COMPILED_FROM else False
        compiled = choose_compile(wanted, model.output.weight.device)
        sampler = Sampler(model, tokenizer, settings, text, compiled=compiled)
        sample_to(
            self.out,
            sampler,
            labels,
            info,
            label_mode=self.label_mode,
            scale_origin=origin,
            batch_size=self.batch_size,
        )
        if ranks.rank == 0:
            size = info.config.grid * tokenizer.patch
            print(f"{self.out}: {len(labels):,} images of {size} x {size} pixels")


@dataclass(kw_only=True)
class Sweep:
    """Sample and evaluate a model over guidance scales, temperatures and top-k, and print the best setting.

    Samples and results stay in --out and are reused. Run the same command again to continue a stopped sweep.
    """

    model: options.Model
    tokenizer: options.Tokenizer
    reference: str
    """Reference, as for `st-ar evaluate`. A file of `st-ar reference` is fastest."""
    out: Path
    """Folder for samples, results, sweep.csv, sweep.json and the figures."""
    cfg_scales: tuple[float, ...]
    """Classifier-free guidance scales."""
    temperatures: tuple[float, ...] = (1.0,)
    """Sampling temperatures."""
    top_ks: tuple[int, ...] = (0,)
    """Values of k: sample from the k most likely tokens; 0 for all."""
    num: int = 10_000
    """Images per setting. Fewer images give a larger FD: compare equal numbers only."""
    label_mode: options.LabelMode = "balanced"
    metrics: options.Metrics = ()
    extractor: options.Extractor = "inception"
    inception: options.Inception = None
    classifier: options.Classifier = None
    size: options.Size = None
    resize: options.Resize = None
    max_skipped: options.MaxLeftOut = 0.01
    ema: options.Ema = False
    seed: int = 0
    """Random seed of labels and samples."""
    batch_size: int = 64
    """Images to sample and to measure at once."""
    device: options.Device = "auto"
    dtype: options.ModelType = "auto"
    json: options.Json = None

    def run(self) -> None:
        from st_ar.evaluation.generation.evaluate import check_sizes, choose_metrics, format_number
        from st_ar.evaluation.generation.features import CLASSIFIER, Compute
        from st_ar.evaluation.generation.references import open_reference
        from st_ar.evaluation.generation.sweep import FILES, SWEPT, SweptModel, check_sweep, list_settings, sweep
        from st_ar.files import read_json
        from st_ar.hardware import choose_device

        options.check_results(self.json)
        options.check_side("--resize", self.resize)
        default: dict[str, tuple[Metric, ...]] = {"inception": ("fid", "is"), CLASSIFIER: ("is", "class-accuracy")}
        chosen = CLASSIFIER if self.classifier else self.extractor
        metrics = choose_metrics([*(self.metrics or default.get(chosen, ())), "fd"], chosen)
        grid = list_settings(self.cfg_scales, self.temperatures, self.top_ks, seed=self.seed)
        device = choose_device(self.device)
        compute = Compute(device=device, batch_size=self.batch_size)
        sampler = SweptModel(
            self.model,
            self.tokenizer,
            self.out / "samples",
            num=self.num,
            label_mode=self.label_mode,
            seed=self.seed,
            batch_size=self.batch_size,
            ema=self.ema,
            device=self.device,
            dtype=self.dtype,
        )
        check_sweep(sampler, grid, self.out)
        extractor = options.open_extractor(self.extractor, device, self.inception, self.classifier)
        reference = open_reference(
            self.reference,
            extractor,
            metrics,
            compute,
            size=self.size,
            seed=self.seed,
            max_skipped=self.max_skipped,
            check=lambda size: check_sizes(sampler.size, size, self.resize),
        )
        rows = sweep(sampler, grid, reference, extractor, metrics, self.out, compute, resize=self.resize)
        labels = list(rows[0]["metrics"])
        cells = [
            (*(f"{row[name]:g}" for name in SWEPT), *(format_number(m, row["metrics"][m]) for m in labels))
            for row in rows
        ]
        best, label = rows[0], extractor.label("fd")
        text = (
            f"\nbest {label} of {self.num:,} samples: --cfg-scale {best['cfg_scale']:g} "
            f"--temperature {best['temperature']:g} --top-k {best['top_k']}; curve in {self.out / 'distance.svg'}"
        )
        record = read_json(self.out / FILES[0], "a sweep")
        options.report(self.json, record, ("guidance", "temperature", "top-k", *labels), cells, text)
