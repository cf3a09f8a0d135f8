"""Options that several commands share: their types, their help, and their checks."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.config import ExtractorName, Metric
from st_ar.errors import UserError


def _help(text: str) -> object:
    return tyro.conf.arg(help=text)


SOURCES = "folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]"
MODEL = "a run, an export folder, a .safetensors file or a LlamaGen .pt file"

ImageSource = Annotated[str, _help(f"Image source: {SOURCES}.")]
ImageSet = Annotated[str, _help(f"Images: a source ({SOURCES}), a .npz file or a folder of PNGs.")]
Model = Annotated[Path, _help(f"Model: {MODEL}.")]
Models = Annotated[tuple[Path, ...], _help(f"One or more models, each {MODEL}.")]
Names = Annotated[tuple[str, ...], _help("Display names, one for each. The last parts of the paths by default.")]
Weights = Annotated[Literal["live", "ema", "both"], _help("Which weights to measure.")]
Ema = Annotated[bool, _help("Use the EMA weights instead of the live ones.")]
EmaWeights = Annotated[bool, _help("Same as --weights ema.")]
Tokenizer = Annotated[Path, _help("Tokenizer of the model: its folder, or a LlamaGen .pt file.")]
Text = Annotated[Path | None, _help("Captions' features for a text model: a .safetensors file, or a folder of them.")]
LabelMode = Annotated[
    Literal["balanced", "random"], _help("Take the classes (or captions) in turn, or draw them at random.")
]
Metrics = Annotated[
    tuple[Metric, ...],
    _help("Metrics to compute. By default fid sfid is precision recall; fd precision recall with another extractor."),
]
Extractor = Annotated[
    ExtractorName,
    _help(
        "Feature network. Only Inception's distance is FID. efficientnet needs no download (extra metrics); dinov2 needs the extra dinov2."
    ),
]
Inception = Annotated[
    Path | None, _help("Inception's weights: the file or its folder. Downloaded into the cache by default.")
]
Size = Annotated[int | None, _help("Side in pixels of an image source's centre crops. The source's own by default.")]
Resize = Annotated[int | None, _help("Resize samples to this side first, bicubically, as LlamaGen does with 384 px.")]
MaskRatio = Annotated[
    float, _help("Share of the keys to mask at random, as ST-AR's training does (0.25). 0 masks nothing.")
]
MaskOwnPosition = Annotated[
    bool, _help("Hide a masked token from its own query too, as --selfguided.mask-own-position.")
]
MaskSeed = Annotated[int, _help("Seed of the masks.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], _help("Device to compute on.")]
ModelType = Annotated[
    Literal["auto", "float32", "bfloat16"],
    _help("Type of the model's weights and activations. auto is bfloat16 where the hardware has it."),
]
VQType = Annotated[
    Literal["float32", "bfloat16"],
    _help("Type of a VQ network's activations. bfloat16 is faster and changes a few codes."),
]
Workers = Annotated[
    int | None,
    _help("Processes that decode images; 0 for none. By default one per core, at most 8, none for few images."),
]
MaxSkipped = Annotated[
    float, _help("Largest share of unreadable images. They are skipped and listed in skipped.jsonl.")
]
Json = Annotated[str | None, _help("Write the result as JSON to a file; - prints it instead of the table.")]
Page = Annotated[
    Path | None, _help("Write an HTML page with numbers, figures and their provenance to FILE.html (extra quickstart).")
]
Result = Annotated[Path | None, _help("Write the result as JSON to a new file.")]


def check_page(page: Path | None) -> None:
    """Refuse a --page that could not be written at the end."""
    if page is not None:
        from st_ar.report import require_page

        require_page(page)


def check_seeds(*seeds: int | None) -> None:
    """Refuse a negative seed."""
    for seed in seeds:
        if seed is not None and seed < 0:
            raise UserError(f"seeds must be 0 or more, not {seed}")


def check_side(flag: str, side: int | None) -> None:
    """Refuse a size below one pixel."""
    if side is not None and side < 1:
        raise UserError(f"{flag} must be at least 1 pixel, not {side}")
