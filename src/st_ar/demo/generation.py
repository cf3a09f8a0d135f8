"""Images generated token by token in the demo, and the record of their settings that a saved image carries."""

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
from st_ar.settings import Checked, from_dict, require, to_dict
from st_ar.tokenizer import Tokenizer, to_uint8

FORMAT_VERSION = 1
PNG_KEY = "st-ar"
"""Keyword of the PNG text chunk that holds the record."""
MAX_IMAGES = 16
"""Largest number of images per request."""


@dataclass(frozen=True, kw_only=True)
class WeightsRecord(Checked, prefix="weights."):
    """The weights that generated an image."""

    file: str
    sha256: str
    ema: bool
    step: int


@dataclass(frozen=True, kw_only=True)
class GenerationRecord(Checked, prefix=""):
    """Everything that an image depends on."""

    weights: WeightsRecord
    tokenizer: str
    """The tokenizer's fingerprint."""
    settings: SampleSettings
    labels: tuple[int, ...]
    """Classes of the whole batch. The batch size can change rounding."""
    number: int
    """Index of this image in the batch."""
    class_name: str
    dtype: str
    device: str
    threads: int
    torch: str
    """Version of PyTorch. It, the device and the number of threads can change rounding too."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.format_version == FORMAT_VERSION, f"format_version {self.format_version} is not {FORMAT_VERSION}")
        require(1 <= len(self.labels) <= MAX_IMAGES, f"there are {len(self.labels)} labels, not 1 to {MAX_IMAGES}")
        require(min(self.labels) >= 0, f"label {min(self.labels)} is below 0")
        require(0 <= self.number < len(self.labels), f"number {self.number} is not one of {len(self.labels)} images")

    def in_words(self) -> str:
        """Return the settings in a few words."""
        settings = self.settings
        return (
            f"seed {settings.seed}, image {self.number} of {len(self.labels)}, "
            f"guidance {settings.cfg_scale:g} ({settings.cfg_schedule}), temperature {settings.temperature:g}, "
            f"top-k {settings.top_k}, top-p {settings.top_p:g}"
        )


def to_png(image: np.ndarray, record: GenerationRecord) -> bytes:
    """Encode an image uint8 [H, W, 3] as a PNG file with its record."""
    info = PngInfo()
    info.add_text(PNG_KEY, json.dumps(to_dict(record)))
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read_record(data: bytes) -> GenerationRecord:
    """Read the record in a PNG file; UserError if there is none, or if it is damaged."""
    try:
        image = cast(PngImageFile, Image.open(io.BytesIO(data), formats=("PNG",)))
        text = image.info.get(PNG_KEY)
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError("this file is not a PNG, or it is damaged: give a PNG saved from the demo") from error
    if not isinstance(text, str):
        raise UserError("this PNG has no record of its settings: give a PNG saved from the demo, unchanged")
    try:
        values = parse_json(text)
    except ValueError as error:
        raise UserError(
            f"the record in this PNG is damaged ({cause(error)}): give a PNG saved from the demo"
        ) from error
    return from_dict(GenerationRecord, values, "this PNG")


MAX_PREVIEWS = 12
"""Previews per second: more only keep the browser busy."""
PREVIEW_SHARE = 0.25
"""Largest share of the time spent on previews."""
CONTEXT_ROWS = 2
"""Rows of tokens decoded again above the new ones. The pixels of a token depend on its neighbours."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A batch of images during generation or when it is finished."""

    done: int
    """Tokens generated of each image."""
    total: int
    images: np.ndarray
    """uint8 [n, H, W, 4], transparent where tokens are missing; finished images are [n, H, W, 3]."""
    seconds: float
    """Time since the start of generation."""
    tokens: Tensor | None = None
    """int64 [n, T] of finished images."""
    records: tuple[GenerationRecord, ...] = ()
    """One for each finished image."""


def preview_delay(seconds: float) -> float:
    """Return the time to wait after a preview that took `seconds`."""
    return max(1 / MAX_PREVIEWS, seconds * (1 - PREVIEW_SHARE) / PREVIEW_SHARE)


class PreviewDecoder:
    """Decodes images as their tokens are generated: only rows with new tokens, and CONTEXT_ROWS above them.

    The result approximates the finished image: a VQ decoder's attention and norms see only those rows. `grid`: tokens per side.
    """

    def __init__(self, tokenizer: Tokenizer, grid: int) -> None:
        self.tokenizer, self.grid, self.decoded = tokenizer, grid, 0
        self.images = np.empty(0, np.uint8)

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Return the images uint8 [n, H, W, 4] of the tokens so far [n, done], transparent where tokens are missing."""
        grid, done = self.grid, tokens.shape[1]
        first, end = self.decoded // grid, -(-done // grid)
        top = max(0, first - CONTEXT_ROWS)
        codes = F.pad(tokens, (0, end * grid - done))[:, top * grid :].unflatten(1, (end - top, grid))
        rows = to_uint8(self.tokenizer.decode(codes.cpu())).numpy()
        patch = rows.shape[2] // grid
        if not self.decoded:
            self.images = np.zeros((len(tokens), grid * patch, grid * patch, 4), np.uint8)
        self.images[:, first * patch : end * patch, :, :3] = rows[:, (first - top) * patch :]
        mask = (np.arange(grid * grid) < done).reshape(grid, grid).repeat(patch, 0).repeat(patch, 1)
        self.images[..., 3] = 255 * mask.astype(np.uint8)
        self.decoded = done
        return self.images.copy()


def choose_labels(classes: Sequence[Any], count: int, num_classes: int) -> list[int]:
    """Return the classes of `count` images: the chosen classes, repeated in order. UserError if none or a wrong one is chosen."""
    if not classes:
        raise UserError("no class is chosen: choose one or more classes by name")
    if wrong := [c for c in classes if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < num_classes]:
        raise UserError(f"there is no class {wrong[0]}: the model has classes 0 to {num_classes - 1}")
    return [int(classes[index % len(classes)]) for index in range(count)]


def generate_frames(
    pool: ModelPool, names: Sequence[str], labels: Sequence[int], settings: SampleSettings
) -> Generator[list[Frame], None, None]:
    """Generate an image for each label with one or two models, which take turns and share the random numbers.

    Yields one frame per model whenever a preview is due, and finally the finished images. UserError if a name is unknown or given
    twice, or if the model does not support a label or setting.
    """
    if len(set(names)) < len(names):
        raise UserError("both sides have the same weights: choose two different ones")
    for name in names:
        pool.find(name)
    return pool.iterate(_generate(pool, names, labels, settings))


def _generate(
    pool: ModelPool, names: Sequence[str], labels: Sequence[int], settings: SampleSettings
) -> Generator[list[Frame], None, None]:
    start = time.perf_counter()
    models = [pool.open(name) for name in names]
    samplers = [model.sampler_for(pool.tokenizer, settings) for model in models]
    for sampler in samplers:
        sampler.check(labels, len(labels))
    previews = [PreviewDecoder(pool.preview_tokenizer, sampler.model.config.grid) for sampler in samplers]
    total = max(sampler.model.config.sequence_length for sampler in samplers)
    steps = [sampler.steps(range(len(labels)), labels) for sampler in samplers]
    tokens = [torch.empty(0)] * len(samplers)
    preview_due = start
    for done in range(1, total + 1):
        tokens = [next(step, finished) for step, finished in zip(steps, tokens, strict=True)]
        if done < total and (now := time.perf_counter()) >= preview_due:
            yield [
                Frame(done=t.shape[1], total=preview.grid**2, images=preview.decode(t), seconds=now - start)
                for preview, t in zip(previews, tokens, strict=True)
            ]
            end = time.perf_counter()
            preview_due = end + preview_delay(end - now)
    yield [
        Frame(
            done=t.shape[1],
            total=t.shape[1],
            images=sampler.pictures(t),
            seconds=time.perf_counter() - start,
            tokens=t.cpu().clone(),
            records=tuple(_record(pool, model, sampler.settings, labels, number) for number in range(len(labels))),
        )
        for model, sampler, t in zip(models, samplers, tokens, strict=True)
    ]


def _record(
    pool: ModelPool, model: LoadedModel, settings: SampleSettings, labels: Sequence[int], number: int
) -> GenerationRecord:
    info = model.info
    return GenerationRecord(
        weights=WeightsRecord(file=info.source.name, sha256=model.sha256, ema=info.ema, step=info.step),
        tokenizer=pool.tokenizer.fingerprint,
        settings=settings,
        labels=tuple(labels),
        number=number,
        class_name=info.class_names[labels[number]],
        **_conditions(pool),
    )


def _conditions(pool: ModelPool) -> dict[str, Any]:
    """What can change the rounding of an image."""
    dtype, device = str(pool.dtype).removeprefix("torch."), pool.device.type
    return {"dtype": dtype, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def match_weights(pool: ModelPool, record: GenerationRecord) -> str:
    """Return the name of the weights that made an image; UserError if the demo has others. Call it in the models' thread."""
    wanted = record.weights
    if record.tokenizer != pool.tokenizer.fingerprint:
        raise UserError(
            f"the image was decoded by tokenizer {record.tokenizer[:12]}, the demo has {pool.tokenizer.fingerprint[:12]}: "
            "start the demo with the image's --model and --tokenizer"
        )
    candidates = [name for name in pool.names if pool.weights[name].ema == wanted.ema]
    found = next((name for name in candidates if pool.open(name).sha256 == wanted.sha256), None)
    if found is None:
        raise UserError(
            f"the image was generated with {'EMA' if wanted.ema else 'live'} weights of step {wanted.step} ({wanted.file}, "
            f"SHA-256 {wanted.sha256[:12]}), which the demo does not have: start the demo with their --model"
        )
    if record.dtype != (dtype := _conditions(pool)["dtype"]):
        raise UserError(
            f"the image was generated in {record.dtype}, the demo uses {dtype}: start the demo with --dtype {record.dtype}"
        )
    return found


def compare_images(generated: np.ndarray, saved: np.ndarray, record: GenerationRecord, pool: ModelPool) -> str:
    """Say whether an image generated again equals the saved one bit for bit, and if not, the possible cause."""
    if np.array_equal(generated, saved):
        return "The same image, bit for bit."
    now = _conditions(pool).items()
    changed = [f"{key} was {getattr(record, key)}, now {new}" for key, new in now if getattr(record, key) != new]
    reason = "; ".join(changed) or "the image was changed after it was saved"
    if generated.shape != saved.shape:
        return f"The saved image has another size: {reason}."
    return f"{int((generated != saved).any(-1).sum())} of {saved[..., 0].size} pixels differ: {reason}."
