"""Sampling of images, in memory or to disk. The same call continues a stopped job."""

import json
import shutil
import zipfile
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig, SampleSettings
from st_ar.data.source import BrokenImageError, read_image
from st_ar.data.text import TextStore
from st_ar.distributed import JOB_TIMEOUT, barrier, broadcast_from_rank0, process_group
from st_ar.errors import UserError, damaged
from st_ar.figures import save_png, strip
from st_ar.files import atomic_write, claim, open_array, save_array, sha256, write_json, write_text
from st_ar.hardware import choose_compile, choose_device, choose_dtype, describe, local_device, side_stream
from st_ar.model.generate import TokenSampler
from st_ar.model.transformer import Transformer
from st_ar.model.weights import ModelInfo, open_model
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_seed
from st_ar.tokenizer import Tokenizer, decode_to_images, open_tokenizer

JOB, METADATA = "job.json", "metadata.json"
"""Files in a folder of samples: the settings of an unfinished job, and the description of the samples."""
PREVIEW = 64
"""Number of images in the preview."""


class SampleWriter:
    """Writes `count` images to FILE.npz or a folder of PNGs, in parts of `batch_size` (docs/formats.md).

    job.json marks an unfinished job and is removed last. The metadata file is written after all images and
    holds the settings in `record`. A stopped job continues only with the same settings.
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

    def numbers(self, part: int) -> range:
        """Return the numbers of a part's images."""
        return range(part * self.batch_size, min(self.count, (part + 1) * self.batch_size))

    def is_finished(self, part: int) -> bool:
        """Whether a part's images are written."""
        files = [self._path(part), self._checksum(part)] if self.packs else map(self._path, self.numbers(part))
        return self.metadata.exists() or all(file.exists() for file in files)

    def _path(self, number: int) -> Path:
        """Return the file of a part (.npz) or of an image (PNGs)."""
        return self.folder / (f"part-{number:06d}.npy" if self.packs else f"{number:06d}.png")

    def _checksum(self, part: int) -> Path:
        """Return the file with the checksum of a part (.npz), which is written after it. A PNG has a checksum inside."""
        return self._path(part).with_suffix(".sha256")

    def write(self, part: int, images: np.ndarray) -> None:
        """Write a part's images."""
        if self.packs:
            save_array(self._path(part), images)
            write_text(self._checksum(part), sha256(self._path(part)) + "\n")
            return
        for number, image in zip(self.numbers(part), images, strict=True):
            save_png(self._path(number), image)

    def finish(self, labels: Sequence[int]) -> None:
        """Wait for all ranks, then write a preview, the .npz and the metadata on rank 0."""
        barrier()
        broadcast_from_rank0(lambda: self._finish(labels))

    def _finish(self, labels: Sequence[int]) -> None:
        if not self.metadata.exists():  # otherwise the job was killed while it cleaned up
            save_png(self.preview, strip(self._read_first(min(self.count, PREVIEW)), min(self.count, 8)))
            if self.packs:
                with atomic_write(self.out) as aside:
                    self._pack(aside, labels)
            write_json(self.metadata, {**self.record, "environment": describe()})
        if self.packs:
            for path in self.folder.glob("part-*"):
                path.unlink()
        (self.folder / JOB).unlink()
        if self.packs:
            shutil.rmtree(self.folder)

    def _read_first(self, count: int) -> np.ndarray:
        if not self.packs:
            images = [self._read_image(number) for number in range(count)]
            if wrong := [number for number, image in enumerate(images) if image.shape != images[0].shape]:
                raise self._damaged(wrong[0], f"its shape is {list(images[wrong[0]].shape)}")
            return np.stack(images)
        parts = range(-(-count // self.batch_size))
        return np.concatenate([self._read_part(part) for part in parts])[:count]

    def _read_image(self, number: int) -> np.ndarray:
        try:
            return np.asarray(read_image(self._path(number)))
        except BrokenImageError as error:
            raise self._damaged(number, error) from error

    def _read_part(self, part: int) -> np.ndarray:
        """Read a part's images, memory-mapped."""
        try:
            images = open_array(self._path(part))
            if images.ndim != 4 or (len(images), images.dtype) != (len(self.numbers(part)), np.uint8):
                raise ValueError(f"it holds {images.dtype} {list(images.shape)}")
            if self._checksum(part).read_bytes().strip() != sha256(self._path(part)).encode():
                raise ValueError(f"it does not match {self._checksum(part).name}")
        except (OSError, ValueError) as error:
            raise self._damaged(part, error) from error
        if part and images.shape[1:] != open_array(self._path(0)).shape[1:]:
            raise self._damaged(part, f"its images have the shape {list(images.shape[1:])}")
        return images

    def _damaged(self, number: int, why: Exception | str) -> UserError:
        return damaged(self._path(number), why, "remove it and give the same command to draw it again")

    def _pack(self, path: Path, labels: Sequence[int]) -> None:
        """Write ADM's layout, images as arr_0 and labels as arr_1, with one part in memory at a time."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for part in range(self.parts):
                    images = self._read_part(part)
                    if part == 0:
                        header = np.lib.format.header_data_from_array_1_0(images)
                        header["shape"] = (self.count, *images.shape[1:])
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(images).data)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array(labels, np.int64), allow_pickle=False)


DECODE_BATCH = 16
"""Images to decode at once: a VQ network needs much memory for each."""
MAX_IMAGES = 10_000_000
"""Maximum number of images of a job. More are a mistake."""


def sample_images(
    model: Transformer,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    settings: SampleSettings | None = None,
    text: TextStore | None = None,
    *,
    batch_size: int = 256,
) -> np.ndarray:
    """Draw an image for each label: uint8 [images, H, W, 3]. Image n depends only on the seed, n and its label.

    Labels are classes, or for a text model indices of the captions in `text`.

    Raises:
        UserError: a label or setting is out of range, captions are missing or not for this model, or the tokenizer has another
            codebook than the model.
    """
    sampler = Sampler(model, tokenizer, settings or SampleSettings(), text)
    sampler.check(labels, batch_size)
    with progress("sample", len(labels), unit="images") as bar:
        starts = range(0, len(labels), batch_size)
        batches = [range(start, min(start + batch_size, len(labels))) for start in starts]
        return np.concatenate([sampler.pictures(sampler.tokens(each, labels, bar.advance)) for each in batches])


def open_model_and_tokenizer(
    model: Path,
    tokenizer: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    grid: int | None = None,
) -> tuple[Transformer, ModelInfo, Tokenizer]:
    """Load a model and its tokenizer onto a device. `dtype` is the model's, as for `choose_dtype`."""
    target = local_device(choose_device(device))
    network, info = open_model(model, ema=ema, grid=grid)
    codes = open_tokenizer(tokenizer, device, "float32")
    require_own_tokenizer(info, model, codes, tokenizer)
    return network.to(target, choose_dtype(dtype, target)), info, codes


def require_own_tokenizer(info: ModelInfo, model: Path, tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer, read from `path`, that the model was not trained with."""
    if info.tokenizer and tokenizer.fingerprint != info.tokenizer:
        raise UserError(
            f"{model} uses the codes of tokenizer {info.tokenizer[:12]}, but {path} is {tokenizer.fingerprint[:12]}: "
            "give the tokenizer that made the model's token store"
        )


class Sampler:
    """A model, its tokenizer and the sampling settings. `compiled`: see `CachedDecoder`."""

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
                f"the model is for {config.condition_name}: give captions to a text model, and only to a text model"
            )
        self.model, self.tokenizer, self.settings, self.text = model, tokenizer, settings.resolved(config), text
        self.device, self.compiled = model.output.weight.device, compiled
        choose_compile(compiled, self.device)  # refuses a missing compiler
        self.seed = torch_seed(settings.seed, RandomStream.SAMPLING)
        self.token_sampler: TokenSampler | None = None

    def check(self, labels: Sequence[int], batch_size: int) -> None:
        """Refuse labels and batch sizes that cannot be sampled."""
        if not labels:
            raise UserError("no labels were given: each image needs one")
        _require_count("--batch-size", batch_size)
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
        """Draw the tokens int64 [n, T] of the images with these numbers; `labels` are those of the whole job.

        `advance` is called after each token with the number of images that it completes, counting fractions.
        """
        count, length = len(numbers), self.model.config.sequence_length
        tokens = torch.empty(0)
        for tokens in self.steps(numbers, labels):
            if advance:
                drawn = tokens.shape[1]
                advance(count * drawn // length - count * (drawn - 1) // length)
        return tokens.clone()

    def steps(self, numbers: Sequence[int], labels: Sequence[int]) -> Generator[Tensor, None, None]:
        """Draw token by token: yield the tokens so far, [n, 1], [n, 2] .. [n, T], views of memory that the next step changes.

        The caller may stop at any token. Starting another batch with this sampler ends this one.
        """
        count = len(numbers)
        conditions = self._conditions([labels[number] for number in numbers]).to(self.device)
        if self.token_sampler is None or len(self.token_sampler.tokens) != count:
            self.token_sampler = None  # free its memory first
            self.token_sampler = TokenSampler(self.model, count, self.settings, compiled=self.compiled)
        sampler = self.token_sampler
        for drawn in sampler.steps(conditions, np.array(numbers), self.seed):
            yield sampler.tokens[:, :drawn]

    def pictures(self, tokens: Tensor) -> np.ndarray:
        """Decode tokens [n, T] to images uint8 [n, H, W, 3]."""
        return np.concatenate([decode_to_images(self.tokenizer, batch) for batch in tokens.split(DECODE_BATCH)])


def sample_to(
    out: Path,
    sampler: Sampler,
    labels: Sequence[int],
    info: ModelInfo,
    *,
    label_mode: str = "balanced",
    scale_origin: str = "as given",
    batch_size: int = 256,
) -> None:
    """Draw an image for each label into a .npz file (ADM's layout: arr_0 images, arr_1 labels) or a folder of PNGs.

    metadata.json, or the .json beside the .npz, describes them. Under torchrun the ranks share the parts.

    Raises:
        UserError: as `sample_images` and `SampleWriter`, or the disk is full.
    """
    sampler.check(labels, batch_size)
    text = sampler.text
    if text is None:
        conditions: dict[str, Any] = {"labels": list(labels)}
    else:
        conditions = {"captions": list(labels), "text": {"encoder": text.encoder, "fingerprint": text.fingerprint}}
    record = {
        "weights": {"file": info.source.name, "sha256": sha256(info.source), "ema": info.ema, "step": info.step},
        "dtype": str(sampler.model.output.weight.dtype).removeprefix("torch."),
        "compiled": sampler.compiled,
        "tokenizer": sampler.tokenizer.fingerprint,
        "settings": asdict(sampler.settings),
        "cfg_scale_origin": scale_origin,
        "label_mode": label_mode,
        **conditions,
    }
    with process_group("cpu", JOB_TIMEOUT) as (ranks, _):
        job = SampleWriter(out, len(labels), record, batch_size)
        share = range(ranks.rank, job.parts, ranks.world)
        unfinished = [part for part in share if not job.is_finished(part)]
        total, todo = (sum(len(job.numbers(part)) for part in parts) for parts in (share, unfinished))
        with (
            progress("sample", total, unit="images", done=total - todo, shown=ranks.rank == 0) as bar,
            side_stream(sampler.device) as run,
        ):
            for part in unfinished:
                tokens = sampler.tokens(job.numbers(part), labels, bar.count)
                run(lambda part=part, tokens=tokens: job.write(part, sampler.pictures(tokens)))
        job.finish(labels)


def _require_count(flag: str, count: int) -> None:
    if not 1 <= count <= MAX_IMAGES:
        bound = "least 1" if count < 1 else f"most {MAX_IMAGES}"
        raise UserError(f"{flag} must be at {bound}, not {count}")


def choose_labels(
    num: int,
    num_classes: int,
    seed: int,
    *,
    mode: Literal["balanced", "random"],
    only: Sequence[int] = (),
    empty: Collection[int] = (),
) -> list[int]:
    """Choose the labels of `num` images from those of `only`, or all classes but `empty`: cycling through them, or at random."""
    _require_count("--num", num)
    if wrong := [label for label in only if not 0 <= label < num_classes]:
        raise UserError(f"--labels {wrong[0]} is out of range: the model knows classes 0 to {num_classes - 1}")
    classes = np.array(only or [label for label in range(num_classes) if label not in empty])
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
    empty: Collection[int] = (),
) -> list[int]:
    """Choose the conditions of `num` images: classes (64 if None), or indices of a text model's captions (all if None).

    `per_class` is the number of images of each class or caption, instead of `num`. Classes in `empty` have no training images:
    they are left out unless `labels` names them.
    """
    if per_class is not None:
        if num is not None:
            raise UserError("give --num or --per-class, not both")
        if mode == "random":
            raise UserError("--per-class cycles through the classes: leave out --label-mode random, or give --num")
        _require_count("--per-class", per_class)
        labels = tuple(dict.fromkeys(labels))
        num = per_class * (len(text) if text is not None else len(labels) or config.num_classes - len(empty))
    if text is None:
        return choose_labels(64 if num is None else num, config.num_classes, seed, mode=mode, only=labels, empty=empty)
    if labels:
        raise UserError(
            "--labels are classes, but this model is for captions: leave them out; --text gives the captions"
        )
    return choose_labels(len(text) if num is None else num, len(text), seed, mode=mode)
