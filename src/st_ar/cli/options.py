"""Options that several commands share: types, help texts and checks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from st_ar.config import ExtractorName, Metric
from st_ar.errors import UserError

if TYPE_CHECKING:
    import torch

    from st_ar.evaluation.generation.features import Extractor as Network


def _help(text: str) -> object:
    return tyro.conf.arg(help=text)


SOURCES = "folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]"
MODEL = "a run, an export folder, a .safetensors file or a LlamaGen .pt file"

ImageSource = Annotated[str, _help(f"Image source: {SOURCES}.")]
ImageSet = Annotated[str, _help(f"Images: a source ({SOURCES}), a .npz file or a folder of PNGs.")]
Model = Annotated[Path, _help(f"Model: {MODEL}.")]
Models = Annotated[tuple[Path, ...], _help(f"One or more models, each {MODEL}.")]
Names = Annotated[
    tuple[str, ...], _help("Display names, one per model or tokenizer. By default the last part of each path.")
]
Weights = Annotated[Literal["live", "ema", "both"], _help("Which weights to measure.")]
Ema = Annotated[bool, _help("Use the EMA weights instead of the live ones.")]
EmaWeights = Annotated[bool, _help("Same as --weights ema.")]
Tokenizer = Annotated[Path, _help("Tokenizer of the model: its folder, or a LlamaGen .pt file.")]
Text = Annotated[Path | None, _help("Caption features for a text model: a .safetensors file, or a folder of them.")]
LabelMode = Annotated[
    Literal["balanced", "random"],
    _help("balanced repeats the classes (or captions) in order; random draws them at random."),
]
Metrics = Annotated[
    tuple[Metric, ...],
    _help(
        "Metrics to compute. By default fid sfid is precision recall with Inception, and fd precision recall with other extractors. "
        "With --classifier also is and class-accuracy, the share of samples that show the class that was asked for."
    ),
]
Extractor = Annotated[
    ExtractorName,
    _help(
        "Feature network. Only Inception gives FID. efficientnet needs the extra metrics and no download; dinov2 needs the extra dinov2."
    ),
]
Inception = Annotated[
    Path | None, _help("Inception weights: a file or its folder. By default they are downloaded into the cache.")
]
Classifier = Annotated[
    Path | None,
    _help("Folder of `st-ar train-classifier`: the feature network to use instead of --extractor."),
]
Size = Annotated[int | None, _help("Side of an image source's centre crops in pixels. By default the source's size.")]
Resize = Annotated[
    int | None, _help("Resize the samples to this side first, bicubically, as LlamaGen does for 384 px.")
]
MaskRatio = Annotated[
    float, _help("Fraction of the attention keys to mask at random. ST-AR trains with 0.25; 0 masks nothing.")
]
MaskOwnPosition = Annotated[
    bool, _help("Hide a masked token from its own query too, like --selfguided.mask-own-position.")
]
MaskSeed = Annotated[int, _help("Random seed of the masks.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], _help("Device to compute on. auto uses a GPU if there is one.")]
ModelType = Annotated[
    Literal["auto", "float32", "bfloat16"],
    _help("Data type of weights and activations. auto is bfloat16 where the hardware supports it."),
]
VQType = Annotated[
    Literal["float32", "bfloat16"],
    _help("Data type of a VQ network's activations. bfloat16 is faster and changes a few codes."),
]
Workers = Annotated[
    int | None,
    _help(
        "Processes that decode images; 0 decodes without extra processes. By default one per core, at most 8, and 0 for few images."
    ),
]
MaxSkipped = Annotated[
    float, _help("Largest fraction of unreadable images to accept. They are skipped and listed in skipped.jsonl.")
]
MaxLeftOut = Annotated[
    float, _help("Largest fraction of unreadable images to accept. They are left out and listed in the result.")
]
Json = Annotated[str | None, _help("Write the results as JSON to a file; - prints them instead of the table.")]
Page = Annotated[
    Path | None,
    _help(
        "Write an HTML page with the numbers, figures and their provenance to FILE.html (needs the extra quickstart)."
    ),
]
Result = Annotated[Path | None, _help("Write the results as JSON to a new file.")]


def open_extractor(
    name: ExtractorName, device: "torch.device", inception: Path | None, classifier: Path | None
) -> "Network":
    """Load the feature network of --extractor, or of --classifier in its place; rank 0 first, so that only it downloads."""
    from st_ar.distributed import rank0_first
    from st_ar.evaluation.generation.classifier import load_classifier
    from st_ar.evaluation.generation.features import load_extractor

    if classifier is None:
        return rank0_first(lambda: load_extractor(name, device, inception=inception))
    if inception is not None or name != "inception":
        raise UserError("--classifier is the feature network: leave --extractor and --inception out")
    return load_classifier(classifier, device)


def check_results(json: str | None, page: Path | None = None, out: Path | None = None) -> None:
    """Raise a UserError before the work if --json, --page or --out cannot be written."""
    from st_ar.files import require_absent, require_place
    from st_ar.report import check_json, require_page

    check_json(json)
    if page:
        require_page(page)
    if out:
        require_absent(out, "a result")
        require_place(out)


def report(
    json: str | None,
    record: Mapping[str, Any],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: str,
    *,
    title: str = "",
    page: Path | None = None,
) -> None:
    """Print a table between a title and a text, name the page, and write the record to --json.

    With --json -, the table is left out, and the title and text go to standard error.
    """
    from st_ar.report import json_alone, keep_json, print_table

    with json_alone(json):
        if title:
            print(title)
        if json != "-":
            print_table(header, rows)
        print(f"{text}\npage: {page}" if page else text)
    keep_json(json, record)


def check_seeds(*seeds: int | None) -> None:
    """Raise a UserError if a seed is negative."""
    for seed in seeds:
        if seed is not None and seed < 0:
            raise UserError(f"seeds must be 0 or more, not {seed}")


def check_side(flag: str, side: int | None) -> None:
    """Raise a UserError if a size is below one pixel."""
    if side is not None and side < 1:
        raise UserError(f"{flag} must be at least 1 pixel, not {side}")
