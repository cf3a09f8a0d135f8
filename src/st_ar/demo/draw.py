"""Images that grow token by token in the demo, and the record that a saved one carries."""

import io
import json
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from st_ar.config import SampleSettings
from st_ar.demo.models import LoadedModel, ModelPool
from st_ar.errors import UserError, cause
from st_ar.files import parse_json
from st_ar.sampling import Sampler
from st_ar.settings import Checked, from_dict, require, to_dict
from st_ar.tokenizer import Tokenizer, to_uint8

FORMAT_VERSION = 1
KEY = "st-ar"
"""Of the text chunk."""
MOST_IMAGES = 16
"""Images that the page draws at once."""


@dataclass(frozen=True, kw_only=True)
class WeightsRecord(Checked, prefix="weights."):
    """Which weights."""

    file: str
    sha256: str
    ema: bool
    step: int


@dataclass(frozen=True, kw_only=True)
class GenerationRecord(Checked, prefix=""):
    """All that an image depends on."""

    weights: WeightsRecord
    tokenizer: str
    """Its fingerprint."""
    settings: SampleSettings
    labels: tuple[int, ...]
    """Of all images that were drawn at once: another number of them may change a rounding."""
    number: int
    """Which of them this is."""
    class_name: str
    dtype: str
    device: str
    threads: int
    torch: str
    """Version; it, the device and the threads may change a rounding too."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.format_version == FORMAT_VERSION, f"format_version {self.format_version} is not {FORMAT_VERSION}")
        require(1 <= len(self.labels) <= MOST_IMAGES, f"there are {len(self.labels)} labels, not 1 to {MOST_IMAGES}")
        require(min(self.labels) >= 0, f"label {min(self.labels)} is below 0")
        require(0 <= self.number < len(self.labels), f"number {self.number} is none of the {len(self.labels)} images")


def to_png(picture: np.ndarray, recipe: GenerationRecord) -> bytes:
    """A picture uint8 [H, W, 3] as a PNG file with its recipe in it."""
    info = PngInfo()
    info.add_text(KEY, json.dumps(to_dict(recipe)))  # ASCII
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read_recipe(data: bytes) -> GenerationRecord:
    """The recipe in a PNG file.

    Raises:
        UserError: no PNG, none of the page's, or with a damaged recipe.
    """
    try:
        image = cast(PngImageFile, Image.open(io.BytesIO(data), formats=("PNG",)))
        said = image.info.get(KEY)
    except Exception as error:  # Pillow raises nearly everything on damaged files
        raise UserError("this is no PNG file, or a damaged one: give one that was saved from the page") from error
    if not isinstance(said, str):
        raise UserError("this PNG does not say how it was drawn: give one that was saved from the page, unchanged")
    try:
        values = parse_json(said)
    except ValueError as error:
        raise UserError(
            f"what this PNG says of itself is damaged ({cause(error)}): give one saved from the page"
        ) from error
    return from_dict(GenerationRecord, values, "this PNG")


MOST_MODELS = 2
"""Weights that draw side by side."""
MOST_FRAMES = 12
"""Previews a second at most: more would only keep the browser busy."""
SHARE = 0.25
"""Of the time that previews may take from the drawing."""
ABOVE = 2
"""Rows of tokens above the new ones that are painted with them: how a token looks depends on those around it."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What there is to see of some images."""

    drawn: int
    """Tokens of each."""
    total: int
    pictures: np.ndarray
    """uint8 [n, H, W, 4], transparent where no token is drawn yet; whole images are [n, H, W, 3]."""
    seconds: float
    """Since the drawing began."""
    tokens: Tensor | None = None
    """int64 [n, T] when all are drawn."""
    recipes: tuple[GenerationRecord, ...] = ()
    """How each was drawn, when all are."""


class Pace:
    """When another preview is due: not too often for the browser, nor for the drawing.

    Args:
        most: a second. share: of the time that previews may take.
    """

    def __init__(self, most: float = MOST_FRAMES, share: float = SHARE) -> None:
        self.most, self.share, self.due = most, share, 0.0

    def is_due(self) -> bool:
        """Whether it is time for one."""
        return time.perf_counter() >= self.due

    def made(self, seconds: float) -> None:
        """One has been made, and took so long."""
        self.due = time.perf_counter() + max(1 / self.most, seconds * (1 - self.share) / self.share)


class Preview:
    """Pictures that grow with their tokens: only the rows of tokens that are new are painted, with some above them.

    They are near the whole pictures, not equal to them: a VQ network's attention and norms see the rows alone that they are given.

    Args:
        tokenizer: that paints. grid: tokens of a side.
    """

    def __init__(self, tokenizer: Tokenizer, grid: int) -> None:
        self.tokenizer, self.grid, self.painted = tokenizer, grid, 0
        self.pictures = np.empty(0, np.uint8)

    def paint(self, tokens: Tensor) -> np.ndarray:
        """The pictures uint8 [n, H, W, 4] of the tokens so far [n, drawn], more than the last time; transparent where none is."""
        grid, drawn = self.grid, tokens.shape[1]
        first, end = self.painted // grid, -(-drawn // grid)
        top = max(0, first - ABOVE)
        codes = F.pad(tokens, (0, end * grid - drawn))[:, top * grid :].unflatten(1, (end - top, grid))
        made = to_uint8(self.tokenizer.decode(codes.cpu())).numpy()
        side = made.shape[2] // grid
        if not self.painted:
            self.pictures = np.zeros((len(tokens), grid * side, grid * side, 4), np.uint8)
        self.pictures[:, first * side : end * side, :, :3] = made[:, (first - top) * side :]
        there = (np.arange(grid * grid) < drawn).reshape(grid, grid).repeat(side, 0).repeat(side, 1)
        self.pictures[..., 3] = 255 * there.astype(np.uint8)
        self.painted = drawn
        return self.pictures.copy()


def choose_labels(classes: Sequence[Any], count: Any, known: int) -> list[int]:
    """The classes of `count` images: those chosen, in turn.

    Raises:
        UserError: none is chosen, one that the model does not know, or more images than the page draws at once.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_IMAGES:
        raise UserError(f"the page draws 1 to {MOST_IMAGES} images at once, not {count}; st-ar sample draws any number")
    if not classes:
        raise UserError("no class is chosen: choose one or several, by their names")
    if wrong := [c for c in classes if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < known]:
        raise UserError(f"there is no class {wrong[0]}: the model knows classes 0 to {known - 1}")
    return [int(classes[index % len(classes)]) for index in range(count)]


def draw(
    shelf: ModelPool, names: Sequence[str], labels: Sequence[int], settings: SampleSettings, pace: Pace | None = None
) -> Generator[list[Frame], None, None]:
    """Draw an image for each label with each of some weights, all with the same draws, token by token in turn.

    Yields a frame for each of the weights whenever `pace` finds it time, and at last the whole images with their tokens.

    Args:
        names: of one or two weights of the shelf. labels: as of `choose_labels`.

    Raises:
        UserError: other names, the same twice, or a label or a setting that does not suit the weights.
    """
    if not 1 <= len(names) <= MOST_MODELS or len(set(names)) < len(names):
        raise UserError(f"choose {'two different weights' if len(names) > 1 else 'weights'} to draw with")
    if len(labels) > MOST_IMAGES:
        raise UserError(f"the page draws {MOST_IMAGES} images at most at once, not {len(labels)}")
    for name in names:
        shelf.find(name)
    return shelf.each(_draw(shelf, names, labels, settings, pace or Pace()))


def _draw(
    shelf: ModelPool, names: Sequence[str], labels: Sequence[int], settings: SampleSettings, pace: Pace
) -> Generator[list[Frame], None, None]:
    begun = time.perf_counter()
    opened = [shelf.open(name) for name in names]
    samplers = [each.sampler_for(shelf.tokenizer, settings) for each in opened]
    for sampler in samplers:
        sampler.check(labels, len(labels))
    previews = [Preview(shelf.previewer, sampler.model.config.grid) for sampler in samplers]
    total = max(sampler.model.config.sequence_length for sampler in samplers)
    steps = [sampler.steps(range(len(labels)), labels) for sampler in samplers]
    sofar = [torch.empty(0)] * len(samplers)
    for drawn in range(1, total + 1):
        sofar = [next(more, last) for more, last in zip(steps, sofar, strict=True)]
        if drawn < total and pace.is_due():
            made = time.perf_counter()
            yield [
                Frame(
                    drawn=tokens.shape[1], total=preview.grid**2, pictures=preview.paint(tokens), seconds=made - begun
                )
                for preview, tokens in zip(previews, sofar, strict=True)
            ]
            pace.made(time.perf_counter() - made)
    yield [
        Frame(
            drawn=tokens.shape[1],
            total=tokens.shape[1],
            pictures=sampler.pictures(tokens),
            seconds=time.perf_counter() - begun,
            tokens=tokens.cpu().clone(),
            recipes=tuple(_recipe(shelf, each, sampler, labels, number) for number in range(len(labels))),
        )
        for each, sampler, tokens in zip(opened, samplers, sofar, strict=True)
    ]


def _recipe(
    shelf: ModelPool, opened: LoadedModel, sampler: Sampler, labels: Sequence[int], number: int
) -> GenerationRecord:
    info, names = opened.info, opened.weights.class_names
    return GenerationRecord(
        weights=WeightsRecord(file=info.source.name, sha256=opened.sha256, ema=info.ema, step=info.step),
        tokenizer=shelf.tokenizer.fingerprint,
        settings=sampler.settings,
        labels=tuple(labels),
        number=number,
        class_name=names[labels[number]],
        dtype=str(opened.dtype).removeprefix("torch."),
        device=shelf.device.type,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def find_drawer(shelf: ModelPool, recipe: GenerationRecord) -> str:
    """The name of the weights that a recipe was drawn with; call it in the models' thread.

    Raises:
        UserError: they are not here, or not with the tokenizer or the type that the recipe says.
    """
    wanted = recipe.weights
    if recipe.tokenizer != shelf.tokenizer.fingerprint:
        raise UserError(
            f"the picture was painted by tokenizer {recipe.tokenizer[:12]}, the page has {shelf.tokenizer.fingerprint[:12]}: "
            "start it with the picture's --model and --tokenizer"
        )
    alike = [name for name in shelf.names if shelf.weights[name].ema == wanted.ema]
    found = next((name for name in alike if shelf.open(name).sha256 == wanted.sha256), None)
    if found is None:
        raise UserError(
            f"the picture was drawn with {'averaged' if wanted.ema else 'live'} weights of step {wanted.step} ({wanted.file}, "
            f"SHA-256 {wanted.sha256[:12]}), which the page does not have: start it with their --model"
        )
    dtype = str(shelf.dtype).removeprefix("torch.")
    if recipe.dtype != dtype:
        raise UserError(
            f"the picture was drawn in {recipe.dtype}, the page draws in {dtype}: start it with --dtype {recipe.dtype}"
        )
    return found


def compare_pictures(drawn: np.ndarray, given: np.ndarray, recipe: GenerationRecord, shelf: ModelPool) -> str:
    """In words, whether a picture was drawn again bit for bit, and if not, what may be the cause."""
    if drawn.shape == given.shape and (drawn == given).all():
        return "The same image, bit for bit."
    here = {"device": shelf.device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    other = [
        f"{name} {getattr(recipe, name)} then, {now} now" for name, now in here.items() if getattr(recipe, name) != now
    ]
    cause = "; ".join(other) if other else "the picture was changed after it was saved"
    if drawn.shape != given.shape:
        return f"Another size than the picture's: {cause}."
    return f"{int((drawn != given).any(-1).sum())} of {given[..., 0].size} pixels differ: {cause}."
