"""The verb that measures token invariance: a dataclass whose fields are the options and whose docstrings are the help."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.errors import UserError
from st_ar.evaluation_verbs import check_page
from st_ar.invariance_config import InvarianceSettings
from st_ar.printing import check_json, json_alone, keep_json, print_table


@dataclass(kw_only=True)
class Invariance:
    """Measure token invariance (the paper's Fig. 1c): the share of an image's tokens that stay when its view changes a little.

    Two views of each image, the second shifted, mirrored or resized, are tokenized and compared at corresponding places. Writes
    all numbers, the curve over the shift, and pictures of two views.
    """

    tokenizer: tuple[Path, ...]
    """Tokenizers: folders, or .pt files of LlamaGen's. Several are compared on the same views."""
    images: str
    """An image source (folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos, digits), a .npz file or a folder of PNGs."""
    out: Path
    """Folder for invariance.json, invariance.csv, the curve and the pictures."""
    names: tuple[str, ...] = ()
    """Names of the tokenizers in table and figures; by default those of their files."""
    settings: Annotated[InvarianceSettings, tyro.conf.arg(name="")] = field(default_factory=InvarianceSettings)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a VQ network computes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of a VQ network's activations."""
    json: str | None = None
    """File for what invariance.json holds; - for standard output, instead of the table."""
    page: Path | None = None
    """FILE.html for a page with the numbers, curve and pictures (extra quickstart)."""

    def run(self) -> None:
        from st_ar.evaluation.invariance_job import measure_invariance, summarise
        from st_ar.tokenizer import place_tokenizer

        check_json(self.json)
        check_page(self.page)
        names = choose_names(self.tokenizer, self.names)
        tokenizers = {
            name: place_tokenizer(path, self.device, self.dtype)
            for name, path in zip(names, self.tokenizer, strict=True)
        }
        result, found = measure_invariance(tokenizers, self.images, self.out, self.settings)
        summaries = [summarise(agreement) for agreement in found.values()]
        rows = [
            (label, *("-" if (value := each[label]) is None else _percent(*value) for each in summaries))
            for label in summaries[0]
        ]
        chance = ("different images", *(f"{100 * agreement.chance:.2f}" for agreement in found.values()))
        header, rows = ("equal tokens (%)", *names), [*rows, chance]
        if self.page:
            from st_ar.evaluation.pages import invariance_page

            invariance_page(self.page, header, rows, result, self.out)
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
