"""The verb that looks for the best guidance: a dataclass whose fields are the options and whose docstrings are the help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from st_ar.evaluation.names import ExtractorName, Metric
from st_ar.evaluation_verbs import check_side
from st_ar.printing import check_json, json_alone, keep_json, print_table


@dataclass(kw_only=True)
class Sweep:
    """Sample and evaluate a model over guidance scales (and temperatures, top-k), and name the best setting.

    Samples and results are kept in --out and reused; the same command again continues a stopped sweep.
    """

    model: Path
    """A run, an export folder, a .safetensors file, or a .pt file of LlamaGen's; a model of classes."""
    tokenizer: Path
    """The tokenizer that the model was trained with: its folder, or a .pt file of LlamaGen's."""
    reference: str
    """As for `st-ar evaluate`; best a file of `st-ar reference`."""
    out: Path
    """Folder for samples, results, sweep.csv, sweep.json and the figures."""
    cfg_scales: tuple[float, ...]
    """Classifier-free guidance scales."""
    temperatures: tuple[float, ...] = (1.0,)
    """What logits are divided by."""
    top_ks: tuple[int, ...] = (0,)
    """Draw from the k likeliest tokens; 0 for all."""
    num: int = 10_000
    """Images of each setting. Distances of fewer are larger and compare with one another alone."""
    label_mode: Literal["balanced", "random"] = "balanced"
    """Take the classes in turn, or draw them at random."""
    metrics: tuple[Metric, ...] = ()
    """What to measure; by default fid is, and with another extractor fd. The best setting has the least fid or fd."""
    extractor: ExtractorName = "inception"
    """The network whose features are compared; see `st-ar evaluate --help`."""
    inception: Path | None = None
    """Inception's file of weights, or its folder; by default it is downloaded once into the cache."""
    size: int | None = None
    """Side in pixels of the centre crops of an image source; by default what suits it."""
    resize: int | None = None
    """Resize the samples to so many pixels first, bicubically, as LlamaGen's evaluation does with 384 px."""
    ema: bool = False
    """Draw from the averaged weights instead of the live ones."""
    seed: int = 0
    """Seed of the labels and the draws."""
    batch_size: int = 64
    """Images drawn, and put through the network, at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the model's weights and activations; auto takes bfloat16 where the hardware has it."""
    json: str | None = None
    """File for what sweep.json holds; - for standard output, instead of the table."""

    def run(self) -> None:
        from st_ar.evaluation.collect import Place
        from st_ar.evaluation.extractors import load_extractor
        from st_ar.evaluation.generation import check_sizes, choose_metrics, format_number
        from st_ar.evaluation.references import open_reference
        from st_ar.evaluation.sweep import FILES, SweptModel, check_sweep, settings_of, sweep
        from st_ar.files import read_json
        from st_ar.hardware import choose_device

        check_json(self.json)
        check_side("--resize", self.resize)
        is_inception = self.extractor == "inception"
        default: tuple[Metric, ...] = ("fid", "is") if is_inception else ("fd",)
        metrics = choose_metrics([*(self.metrics or default), "fd"], is_inception)
        grid = settings_of(self.cfg_scales, self.temperatures, self.top_ks, seed=self.seed)
        device = choose_device(self.device)
        place = Place(device=device, batch_size=self.batch_size)
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
        extractor = load_extractor(self.extractor, device, inception=self.inception)
        reference = open_reference(
            self.reference,
            extractor,
            metrics,
            place,
            size=self.size,
            seed=self.seed,
            check=lambda size: check_sizes(sampler.size, size, self.resize),
        )
        rows = sweep(sampler, grid, reference, extractor, metrics, self.out, place, resize=self.resize)
        labels = list(rows[0]["metrics"])
        cells = [
            (
                f"{r['cfg_scale']:g}",
                f"{r['temperature']:g}",
                str(r["top_k"]),
                *(format_number(m, r["metrics"][m]) for m in labels),
            )
            for r in rows
        ]
        if self.json != "-":
            print_table(("guidance", "temperature", "top-k", *labels), cells)
        best, label = rows[0], extractor.label("fd")
        with json_alone(self.json):
            print(
                f"\nbest by {label} of {self.num:,} samples: --cfg-scale {best['cfg_scale']:g} "
                f"--temperature {best['temperature']:g} --top-k {best['top_k']}; the curve is {self.out / 'distance.svg'}"
            )
        if self.json:
            keep_json(self.json, read_json(self.out / FILES[0], "a sweep"))
