"""`st-ar sweep`: FD of samples over guidance scales, temperatures and top-k."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Literal

from st_ar.config import Metric, SampleSettings
from st_ar.errors import UserError, damaged, note, require
from st_ar.evaluation.generation.evaluate import evaluate
from st_ar.evaluation.generation.features import Compute, Extractor
from st_ar.evaluation.generation.image_sets import open_set
from st_ar.evaluation.generation.references import Reference
from st_ar.figures import line_chart
from st_ar.files import is_nonempty, read_json, require_place, sha256, write_csv, write_json
from st_ar.sampling import Sampler, choose_conditions, open_model_and_tokenizer, sample_to
from st_ar.settings import matches_type

FILES = ("sweep.json", "sweep.csv", "distance.svg", "is.svg", "distance.json", "is.json")
SWEPT = ("cfg_scale", "temperature", "top_k")


def hash_settings(value: Any) -> str:
    """Return the first 16 digits of the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def list_settings(
    cfg_scales: Sequence[float], temperatures: Sequence[float], top_ks: Sequence[int], **rest: Any
) -> list[SampleSettings]:
    """Return every combination, with guidance innermost."""
    for flag, values in (("--cfg-scales", cfg_scales), ("--temperatures", temperatures), ("--top-ks", top_ks)):
        if not values or len(set(values)) < len(values):
            raise UserError(f"{flag} must name at least one value, and each value once, not {list(values)}")
    if wrong := [scale for scale in cfg_scales if not 1 <= scale < float("inf")]:
        raise UserError(f"--cfg-scales must be at least 1 (no guidance), not {wrong[0]:g}")
    combinations = product(temperatures, top_ks, cfg_scales)
    return [SampleSettings(cfg_scale=c, temperature=t, top_k=k, **rest) for t, k, c in combinations]


class SweptModel:
    """A model that writes samples of each setting to a folder. Samples of earlier calls are reused."""

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
        self.labels = choose_conditions(
            self.info.config, None, num, seed, mode=label_mode, empty=self.info.empty_classes
        )
        self.description = {
            "weights": sha256(self.info.source),
            "ema": ema,
            "tokenizer": self.tokenizer.fingerprint,
            "num": num,
            "label_mode": label_mode,
            "seed": seed,
            "dtype": str(self.model.output.weight.dtype),
        }

    def key(self, settings: SampleSettings) -> str:
        """Return a hash of all that the samples depend on."""
        return hash_settings({"what": self.description, "settings": asdict(settings)})

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the samples in pixels."""
        side = self.info.config.grid * self.tokenizer.patch
        return side, side

    def sample(self, settings: SampleSettings) -> Path:
        """Return the .npz file of a setting's samples. It is complete when its metadata file, which is written last, exists."""
        path = self.folder / f"{self.key(settings)}.npz"
        if not (path.exists() and path.with_suffix(".json").exists()) or path.with_name(f"{path.name}.parts").exists():
            sampler = Sampler(self.model, self.tokenizer, settings)
            sample_to(path, sampler, self.labels, self.info, label_mode=self.label_mode, batch_size=self.batch_size)
        return path


def check_sweep(sampler: SweptModel, grid: Sequence[SampleSettings], out: Path) -> None:
    """Check the settings, the packages and the output folder before sampling."""
    for settings in grid:
        settings.resolved(sampler.info.config, sampler.info.class_dropout)
    require("matplotlib")
    require_place(out)
    if is_nonempty(out, besides=("samples", "results", *FILES)):
        raise UserError(f"{out} is not empty and is not a sweep: choose another --out")


def sweep(
    sampler: SweptModel,
    grid: Sequence[SampleSettings],
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[Metric],
    out: Path,
    compute: Compute,
    *,
    resize: int | None = None,
) -> list[dict[str, Any]]:
    """Sample and evaluate every setting. Results of earlier calls are reused.

    Writes sweep.json, sweep.csv, distance.svg and, with IS, is.svg to `out`, and each figure's numbers as JSON.

    Returns:
        A row for each setting (cfg_scale, temperature, top_k, metrics, samples), lowest FD first.

    Raises:
        UserError: as sampling and evaluating; or `out` holds other files.
    """
    check_sweep(sampler, grid, out)
    rows: list[dict[str, Any]] = []
    fd, labels = extractor.label("fd"), list[str]()
    for settings in grid:
        samples = open_set(str(sampler.sample(settings)))
        compared = [reference.content, extractor.weights, list(metrics), resize]
        path = out / "results" / f"{sampler.key(settings)}-{hash_settings(compared)}.json"
        if not path.exists():
            write_json(path, evaluate(samples, reference, extractor, metrics, compute, resize=resize))
        result = read_json(path, "a sweep's results")
        numbers = result.get("metrics")
        if not matches_type(numbers, dict[str, float]) or fd not in numbers or set(numbers) != set(labels or numbers):
            raise damaged(path, "its metrics are not this sweep's", "remove it to measure again")
        for text in result.get("notes", []):
            note(str(text))
        labels = list(numbers)
        swept = {name: getattr(settings, name) for name in SWEPT}
        rows.append(swept | {"metrics": numbers, "samples": samples.name, "result": path.name})
    rows.sort(key=lambda row: row["metrics"][fd])
    labels = list(rows[0]["metrics"])
    source: dict[str, Any] = {"name": reference.name, "sha256": reference.content, "statistics": reference.statistics}
    source |= {**reference.skipped, "notes": list(reference.notes)}
    write_json(out / FILES[0], {"reference": source, "samples": sampler.description, "settings": rows})
    cells = ([*(row[name] for name in SWEPT), *(row["metrics"][label] for label in labels)] for row in rows)
    write_csv(out / FILES[1], [*SWEPT, *labels], cells)
    for label, file in ((fd, FILES[2]), (extractor.label("is"), FILES[3])):
        if label in labels:
            x = "classifier-free guidance scale"
            line_chart(_lines(rows, label), name=f"{label} over guidance", x=x, y=label).save(out / file)
    return rows


def _lines(rows: Sequence[dict[str, Any]], label: str) -> dict[str, tuple[list[float], list[float]]]:
    """One line per temperature and top-k."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["cfg_scale"]):
        top_k = "all codes" if row["top_k"] == 0 else f"top-k {row['top_k']}"
        xs, ys = lines.setdefault(f"temperature {row['temperature']:g}, {top_k}", ([], []))
        xs.append(row["cfg_scale"])
        ys.append(row["metrics"][label])
    return dict(sorted(lines.items()))
