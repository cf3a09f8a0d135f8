"""Images from a model, in memory or on disk. A stopped job is continued by the same call."""

import json
import shutil
import zipfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from st_ar.config import ModelConfig, SampleSettings
from st_ar.data.source import BrokenImageError, read_image
from st_ar.data.text import TextStore
from st_ar.distributed import JOB_TIMEOUT, barrier, broadcast_from_rank0, process_group
from st_ar.errors import UserError, damaged
from st_ar.figures import strip
from st_ar.files import atomic_write, claim, open_array, save_array, sha256, write_json
from st_ar.hardware import SideStream, choose_device, choose_dtype, describe, local_device, require_compiler
from st_ar.model.generate import TokenSampler
from st_ar.model.transformer import Transformer
from st_ar.model.weights import ModelInfo, open_model
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_seed
from st_ar.tokenizer import Tokenizer, decode_to_images, open_tokenizer

JOB, METADATA = "job.json", "metadata.json"
"""In a folder of samples: marks them as unfinished, and says how they were made."""
PREVIEW = 64
"""Images of the preview."""


class SampleWriter:
    """Pictures on their way to a .npz file or a folder of PNGs (docs/formats.md).

    job.json marks the job as begun and is removed last of all; the metadata are written when every picture is there.

    Args:
        out: FILE.npz, or a folder.
        count: images of the whole job.
        record: what must be the same for a stopped job to be continued; it becomes part of the metadata.
        batch_size: images of a part, drawn at once and written at once.

    Raises:
        UserError: something else is there, or a job that was begun with other settings.
    """

    def __init__(self, out: Path, count: int, record: dict[str, Any], batch_size: int) -> None:
        if out.suffix[1:2].isalpha() and out.suffix != ".npz":  # a folder may be called cfg1.5
            raise UserError(
                f"--out {out}: samples are written to a .npz file or to a folder of PNGs, not to {out.suffix}"
            )
        self.out, self.count, self.batch_size = out, count, batch_size
        self.parts = -(-count // batch_size)
        self.packs = out.suffix == ".npz"
        self.folder = out.with_name(f"{out.name}.parts") if self.packs else out
        self.metadata = out.with_suffix(".json") if self.packs else out / METADATA
        self.preview = out.with_name(f"{out.name}.preview.png")
        self.record = json.loads(json.dumps({"images": count, "batch_size": batch_size, **record}))
        taken = [self.out, self.metadata, self.preview]
        broadcast_from_rank0(lambda: claim(self.folder / JOB, self.record, "a set of samples", taken=taken))

    @property
    def _is_complete(self) -> bool:
        """Whether every image is where it belongs. A job that was killed after that has only to clear up."""
        return self.metadata.exists()

    def numbers(self, part: int) -> range:
        """The images of a part."""
        return range(part * self.batch_size, min(self.count, (part + 1) * self.batch_size))

    def is_finished(self, part: int) -> bool:
        """Whether a part's pictures are there."""
        files = [self._path(part), self._seal(part)] if self.packs else map(self._path, self.numbers(part))
        return self._is_complete or all(file.exists() for file in files)

    def _path(self, number: int) -> Path:
        """Of a part (.npz), or of an image (PNGs)."""
        return self.folder / (f"part-{number:06d}.npy" if self.packs else f"{number:06d}.png")

    def _seal(self, part: int) -> Path:
        """The checksum of a part (.npz), written after it; a PNG has one inside."""
        return self._path(part).with_suffix(".sha256")

    def write(self, part: int, pictures: np.ndarray) -> None:
        """Write a part's pictures."""
        if self.packs:
            save_array(self._path(part), pictures)
            with atomic_write(self._seal(part)) as aside:
                aside.write_text(sha256(self._path(part)) + "\n")
            return
        for number, picture in zip(self.numbers(part), pictures, strict=True):
            _save_picture(self._path(number), picture)

    def finish(self, labels: Sequence[int]) -> None:
        """Wait for all ranks, then (rank 0) write a preview, the .npz and the metadata."""
        barrier()
        broadcast_from_rank0(lambda: self._finish(labels))

    def _finish(self, labels: Sequence[int]) -> None:
        if not self._is_complete:
            _save_picture(self.preview, strip(self._first(min(self.count, PREVIEW)), min(self.count, 8)))
            if self.packs:
                with atomic_write(self.out) as aside:
                    self._pack(aside, labels)
            write_json(self.metadata, {**self.record, "environment": describe()})
        if self.packs:
            for part in range(self.parts):
                self._path(part).unlink(missing_ok=True)
                self._seal(part).unlink(missing_ok=True)
        (self.folder / JOB).unlink()
        if self.packs:
            shutil.rmtree(self.folder)

    def _first(self, count: int) -> np.ndarray:
        if not self.packs:
            return np.stack([self._picture(number) for number in range(count)])
        parts = range(-(-count // self.batch_size))
        return np.concatenate([self._part(part) for part in parts])[:count]

    def _picture(self, number: int) -> np.ndarray:
        try:
            picture = np.asarray(read_image(self._path(number)))
        except BrokenImageError as error:
            raise self._damaged(number, error) from error
        if number and picture.shape != self._picture(0).shape:
            raise self._damaged(number, ValueError(f"its shape is {list(picture.shape)}"))
        return picture

    def _part(self, part: int) -> np.ndarray:
        """A part's pictures, memory-mapped."""
        try:
            pictures = open_array(self._path(part))
            if pictures.ndim != 4 or (len(pictures), pictures.dtype) != (len(self.numbers(part)), np.uint8):
                raise ValueError(f"it holds {pictures.dtype} {list(pictures.shape)}")
            if self._seal(part).read_bytes().strip() != sha256(self._path(part)).encode():
                raise ValueError(f"{self._seal(part).name} is the checksum of something else")
        except (OSError, ValueError) as error:
            raise self._damaged(part, error) from error
        if part and pictures.shape[1:] != open_array(self._path(0)).shape[1:]:
            raise self._damaged(part, ValueError(f"its pictures have the shape {list(pictures.shape[1:])}"))
        return pictures

    def _damaged(self, number: int, error: Exception) -> UserError:
        path = self._path(number)
        return damaged(path, error, "remove it and give the same command to have it drawn again")

    def _pack(self, path: Path, labels: Sequence[int]) -> None:
        """ADM's layout, arr_0 pictures and arr_1 labels, one part in memory at a time."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for part in range(self.parts):
                    pictures = self._part(part)
                    if part == 0:
                        header = np.lib.format.header_data_from_array_1_0(pictures)
                        header["shape"] = (self.count, *pictures.shape[1:])
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(pictures).data)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array(labels, np.int64), allow_pickle=False)


def _save_picture(path: Path, picture: np.ndarray) -> None:
    with atomic_write(path) as aside:
        Image.fromarray(picture).save(aside, format="PNG")


PICTURES_AT_ONCE = 16
MOST = 10_000_000
"""Images of a job: more are a mistake."""


def sample_images(
    model: Transformer,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    settings: SampleSettings | None = None,
    text: TextStore | None = None,
    *,
    batch_size: int = 256,
) -> np.ndarray:
    """Draw an image for each label: uint8 [images, H, W, 3]. Image n depends on the seed, n and its label alone.

    Args:
        labels: classes; for a text model, indices of the captions in `text`.
        text: the captions, for a text model and no other.
        batch_size: images drawn at once.

    Raises:
        UserError: a label or a setting out of range, captions missing or not wanted, or a tokenizer with another codebook
            than the model's.
    """
    sampler = Sampler(model, tokenizer, settings or SampleSettings(), text)
    sampler.check(labels, batch_size)
    with progress("sample", len(labels), unit="images") as bar:
        pictures: list[np.ndarray] = []
        for start in range(0, len(labels), batch_size):
            numbers = range(start, min(start + batch_size, len(labels)))
            pictures.append(sampler.pictures(sampler.tokens(numbers, labels, bar.advance)))
    return np.concatenate(pictures)


def open_model_and_tokenizer(
    model: Path,
    tokenizer: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    grid: int | None = None,
) -> tuple[Transformer, ModelInfo, Tokenizer]:
    """Load both and put them where they compute; `dtype`, of the model alone, as for `choose_dtype`.

    Raises:
        UserError: either is missing or damaged, they do not belong together, or there is no such device.
    """
    place = local_device(choose_device(device))
    network, info = open_model(model, ema=ema, grid=grid)
    painter = open_tokenizer(tokenizer, device, "float32")
    require_own_tokenizer(info, model, painter, tokenizer)
    return network.to(place, choose_dtype(dtype, place)), info, painter


def require_own_tokenizer(info: ModelInfo, model: Path, painter: Tokenizer, tokenizer: Path) -> None:
    """Refuse a tokenizer that a model was not trained with; `model` and `tokenizer` are where the two are from."""
    if info.tokenizer and painter.fingerprint != info.tokenizer:
        raise UserError(
            f"{model} speaks the codes of tokenizer {info.tokenizer[:12]}, {tokenizer} is {painter.fingerprint[:12]}: "
            "give the tokenizer that made the model's token store"
        )


class Sampler:
    """A model, its tokenizer and how to draw from them; `compiled` as for `Decoder`."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: SampleSettings,
        text: TextStore | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        config = model.config
        if tokenizer.vocab_size != config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} codes, the model {config.vocab_size}: give the model's own tokenizer"
            )
        if (config.condition == "text") != (text is not None):
            raise UserError(
                f"the model is drawn for {config.condition_name}: captions are for text models, which need them"
            )
        self.model, self.tokenizer, self.settings, self.text = model, tokenizer, settings.resolved(config), text
        self.device, self.compiled = model.output.weight.device, compiled
        if compiled:
            require_compiler(self.device)
        self.seed = torch_seed(settings.seed, RandomStream.SAMPLING)
        self.drawer: tuple[int, TokenSampler] | None = None

    def check(self, labels: Sequence[int], batch_size: int) -> None:
        """Refuse what could not be drawn, before anything is."""
        if not labels:
            raise UserError("no labels were given: each image needs one")
        if batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {batch_size}")
        if batch_size > MOST:
            raise UserError(f"--batch-size must be at most {MOST}, not {batch_size}")
        self._conditions([min(labels), max(labels)])

    def _conditions(self, labels: Sequence[int]) -> Tensor:
        if self.text is not None:
            return self.text.features(np.array(labels), self.model.config.text_tokens)
        conditions = torch.tensor(labels)
        self.model.cls_embedding.check(conditions)
        return conditions

    def tokens(
        self, numbers: Sequence[int], labels: Sequence[int], advance: Callable[[int], None] | None = None
    ) -> Tensor:
        """Tokens int64 [n, T] of the images with these numbers, of a job whose labels are given.

        advance: called after each token with how many images more that makes.
        """
        count, length = len(numbers), self.model.config.sequence_length
        tokens = torch.empty(0)
        for tokens in self.steps(numbers, labels):
            if advance:
                drawn = tokens.shape[1]
                advance(count * drawn // length - count * (drawn - 1) // length)
        return tokens.clone()

    def steps(self, numbers: Sequence[int], labels: Sequence[int]) -> Generator[Tensor, None, None]:
        """What `tokens` does, token by token: the tokens so far [n, 1], [n, 2] .. [n, T], a view of memory that is written on.

        It may be left at any token, and is over when other images are drawn.
        """
        count = len(numbers)
        conditions = self._conditions([labels[number] for number in numbers]).to(self.device)
        if self.drawer is None or self.drawer[0] != count:
            self.drawer = None  # its memory makes room for the next
            self.drawer = count, TokenSampler(self.model, count, self.settings, compiled=self.compiled)
        drawer = self.drawer[1]
        for drawn in drawer.steps(conditions, np.array(numbers), self.seed):
            yield drawer.tokens[:, :drawn]

    def pictures(self, tokens: Tensor) -> np.ndarray:
        """Tokens [n, T] -> uint8 [n, H, W, 3]; a few at a time, since a VQ network needs much memory for each."""
        return np.concatenate([decode_to_images(self.tokenizer, some) for some in tokens.split(PICTURES_AT_ONCE)])


def sample_to(
    out: Path,
    sampler: Sampler,
    labels: Sequence[int],
    info: ModelInfo,
    *,
    label_mode: str = "balanced",
    batch_size: int = 256,
) -> None:
    """Draw an image for each label into a .npz file (ADM's layout: arr_0 images, arr_1 labels) or a folder of PNGs.

    metadata.json, or the .json beside the .npz, says how they were made. Under torchrun, ranks take parts in turn.

    Raises:
        UserError: as `sample_images` and `SampleWriter`, or a full disk.
    """
    sampler.check(labels, batch_size)
    text = sampler.text
    record = {
        "weights": {"file": info.source.name, "sha256": sha256(info.source), "ema": info.ema, "step": info.step},
        "dtype": str(sampler.model.output.weight.dtype).removeprefix("torch."),
        "compiled": sampler.compiled,
        "tokenizer": sampler.tokenizer.fingerprint,
        "settings": asdict(sampler.settings),
        "label_mode": label_mode,
        **(
            {"labels": list(labels)}
            if text is None
            else {"captions": list(labels), "text": {"encoder": text.encoder, "fingerprint": text.fingerprint}}
        ),
    }
    with process_group("cpu", JOB_TIMEOUT) as (ranks, _):
        job = SampleWriter(out, len(labels), record, batch_size)
        own = range(ranks.rank, job.parts, ranks.world)
        left = [part for part in own if not job.is_finished(part)]
        total, todo = (sum(len(job.numbers(part)) for part in parts) for parts in (own, left))
        with (
            progress("sample", total, unit="images", done=total - todo, shown=ranks.rank == 0) as bar,
            SideStream(sampler.device) as side,
        ):
            for part in left:
                tokens = sampler.tokens(job.numbers(part), labels, bar.count)
                side.run(partial(_decode_and_write, job, sampler, part, tokens))
        job.finish(labels)


def _decode_and_write(job: SampleWriter, sampler: Sampler, part: int, tokens: Tensor) -> None:
    job.write(part, sampler.pictures(tokens))


def choose_labels(
    num: int, num_classes: int, seed: int, *, mode: Literal["balanced", "random"], only: Sequence[int] = ()
) -> list[int]:
    """Labels of `num` images: in turn over the classes (or those of `only`), or drawn at random from them.

    Raises:
        UserError: no images, or a class that the model does not know.
    """
    if num < 1:
        raise UserError(f"--num must be at least 1, not {num}")
    if num > MOST:
        raise UserError(f"--num must be at most {MOST}, not {num}")
    if wrong := [label for label in only if not 0 <= label < num_classes]:
        raise UserError(f"--labels {wrong[0]} is out of range: the model knows classes 0 to {num_classes - 1}")
    classes = np.array(only or range(num_classes))
    if mode == "random":
        return np.random.default_rng([seed, RandomStream.SAMPLING]).choice(classes, num).tolist()
    return np.resize(classes, num).tolist()


def choose_conditions(
    config: ModelConfig,
    text: TextStore | None,
    num: int | None,
    seed: int,
    *,
    mode: Literal["balanced", "random"],
    labels: Sequence[int] = (),
    per_class: int | None = None,
) -> list[int]:
    """What `num` images are drawn for: classes (64 if None), or indices of a text model's captions (each one if None).

    per_class: in place of `num`, so many of each class or caption.

    Raises:
        UserError: as `choose_labels`; classes asked of a text model; or `per_class` beside what contradicts it.
    """
    if per_class is not None:
        if num is not None:
            raise UserError("give --num or --per-class, not both")
        if mode == "random":
            raise UserError("--per-class takes the classes in turn: leave out --label-mode random, or give --num")
        if per_class < 1:
            raise UserError(f"--per-class must be at least 1, not {per_class}")
        labels = tuple(dict.fromkeys(labels))
        num = per_class * (len(text) if text is not None else len(labels) or config.num_classes)
    if text is None:
        return choose_labels(64 if num is None else num, config.num_classes, seed, mode=mode, only=labels)
    if labels:
        raise UserError(
            "--labels are classes, and this model is drawn for captions: leave them out; --text says what to draw"
        )
    return choose_labels(len(text) if num is None else num, len(text), seed, mode=mode)
