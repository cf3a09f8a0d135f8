"""Samples and their distance over guidance scales, temperatures and top-k, and the setting with the least distance."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Literal

from st_ar.config import Metric, SampleSettings
from st_ar.errors import UserError, damaged, require
from st_ar.evaluation.generation.evaluate import Reference, evaluate
from st_ar.evaluation.generation.features import Compute, Extractor
from st_ar.evaluation.generation.image_sets import open_set
from st_ar.figures import line_chart
from st_ar.files import is_nonempty, read_json, require_place, sha256, write_csv, write_json
from st_ar.sampling import Sampler, choose_conditions, open_model_and_tokenizer, sample_to
from st_ar.settings import matches_type

FILES = ("sweep.json", "sweep.csv", "distance.svg", "is.svg", "distance.json", "is.json")
SWEPT = ("cfg_scale", "temperature", "top_k")


def key_of(value: Any) -> str:
    """The first 16 digits of the SHA-256 of settings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def settings_of(
    cfg_scales: Sequence[float], temperatures: Sequence[float], top_ks: Sequence[int], **rest: Any
) -> list[SampleSettings]:
    """Every combination, guidance innermost; UserError: none, or one of them twice."""
    for flag, values in (("--cfg-scales", cfg_scales), ("--temperatures", temperatures), ("--top-ks", top_ks)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{flag} must name each value once, and at least one: not {list(values)}")
    if wrong := [scale for scale in cfg_scales if not 1 <= scale < float("inf")]:
        raise UserError(f"--cfg-scales must be at least 1 (none), not {wrong[0]:g}")
    combinations = product(temperatures, top_ks, cfg_scales)
    return [SampleSettings(cfg_scale=c, temperature=t, top_k=k, **rest) for t, k, c in combinations]


class SweptModel:
    """Draws a model's samples into a folder, each setting once: what is there already is taken as it is."""

    def __init__(
        self,
        model: Path,
        tokenizer: Path,
        folder: Path,
        *,
        num: int,
        label_mode: Literal["balanced", "random"] = "balanced",
        seed: int = 0,
        batch_size: int = 256,
        ema: bool = False,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.model, self.info, self.tokenizer = open_model_and_tokenizer(
            model, tokenizer, device=device, dtype=dtype, ema=ema
        )
        self.info.config.require_classes("st-ar sweep")
        self.folder = folder
        self.label_mode, self.batch_size = label_mode, batch_size
        self.labels = choose_conditions(self.info.config, None, num, seed, mode=label_mode)
        self.what = {
            "weights": sha256(self.info.source),
            "ema": ema,
            "tokenizer": self.tokenizer.fingerprint,
            "num": num,
            "label_mode": label_mode,
            "seed": seed,
            "dtype": str(self.model.output.weight.dtype),
        }

    def key(self, settings: SampleSettings) -> str:
        """Tells samples of other weights, numbers or settings apart."""
        return key_of({"what": self.what, "settings": asdict(settings)})

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the samples in pixels."""
        side = self.info.config.grid * self.tokenizer.patch
        return side, side

    def draw(self, settings: SampleSettings) -> Path:
        """The .npz file of a setting's samples; the metadata beside it, written last, mark it whole."""
        path = self.folder / f"{self.key(settings)}.npz"
        if not (path.exists() and path.with_suffix(".json").exists()) or path.with_name(f"{path.name}.parts").exists():
            sampler = Sampler(self.model, self.tokenizer, settings)
            sample_to(path, sampler, self.labels, self.info, label_mode=self.label_mode, batch_size=self.batch_size)
        return path


def check_sweep(sampler: SweptModel, grid: Sequence[SampleSettings], out: Path) -> None:
    """Refuse a setting that the model has not, and a place that is taken, before anything is drawn."""
    for settings in grid:
        settings.resolved(sampler.info.config)
    require("matplotlib")
    require_place(out)
    if is_nonempty(out, besides=("samples", "results", *FILES)):
        raise UserError(f"{out} holds something else than a sweep: choose another --out")


def sweep(
    sampler: SweptModel,
    grid: Sequence[SampleSettings],
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[Metric],
    out: Path,
    place: Compute,
    *,
    resize: int | None = None,
) -> list[dict[str, Any]]:
    """Sample and evaluate every setting; what an earlier call finished is read, not done again.

    Writes `out`/sweep.json, sweep.csv, distance.svg and, if IS is among the metrics, is.svg, with their numbers as JSON.

    Returns:
        A row for each setting (cfg_scale, temperature, top_k, metrics, samples), the least distance first.

    Raises:
        UserError: as sampling and evaluating, or `out` holds something else.
    """
    check_sweep(sampler, grid, out)
    rows: list[dict[str, Any]] = []
    distance = extractor.label("fd")
    for settings in grid:
        samples = open_set(str(sampler.draw(settings)))
        compared = [reference.content, extractor.weights, list(metrics), resize]
        kept = out / "results" / f"{sampler.key(settings)}-{key_of(compared)}.json"
        if not kept.exists():
            write_json(kept, evaluate(samples, reference, extractor, metrics, place, resize=resize))
        numbers = read_json(kept, "a sweep's results").get("metrics")
        if (
            not matches_type(numbers, dict[str, float])
            or numbers.keys() != (rows[0]["metrics"] if rows else {**numbers, distance: 0}).keys()
        ):
            raise damaged(kept, "it has no metrics of this sweep", "remove it to have them measured again")
        chosen = {name: getattr(settings, name) for name in SWEPT}
        rows.append(chosen | {"metrics": numbers, "samples": samples.name, "result": kept.name})
    rows.sort(key=lambda row: row["metrics"][distance])
    _write(out, rows, distance, reference, sampler)
    return rows


def _write(out: Path, rows: list[dict[str, Any]], distance: str, reference: Reference, sampler: SweptModel) -> None:
    described = {"name": reference.name, "sha256": reference.content, "statistics": reference.statistics}
    write_json(out / FILES[0], {"reference": described, "samples": sampler.what, "settings": rows})
    labels = list(rows[0]["metrics"])
    cells = ([*(row[name] for name in SWEPT), *(row["metrics"][label] for label in labels)] for row in rows)
    write_csv(out / FILES[1], [*SWEPT, *labels], cells)
    for label, file in ((distance, FILES[2]), ("IS", FILES[3])):
        if label in labels:
            line_chart(
                _lines(rows, label), name=f"{label} over guidance", x="classifier-free guidance scale", y=label
            ).save(out / file)


def _lines(rows: Sequence[dict[str, Any]], label: str) -> dict[str, tuple[list[float], list[float]]]:
    """A line for each temperature and top-k."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        top_k = "all codes" if row["top_k"] == 0 else f"top-k {row['top_k']}"
        name = f"temperature {row['temperature']:g}, {top_k}"
        lines.setdefault(name, []).append((row["cfg_scale"], row["metrics"][label]))
    return {name: tuple(map(list, zip(*sorted(points), strict=True))) for name, points in sorted(lines.items())}  # pyright: ignore[reportReturnType] -- pairs
