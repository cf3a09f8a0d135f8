"""Import of LlamaGen's tokens, one .npy file for each image, into a token store."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from st_ar.data.skipped import Skipped
from st_ar.data.source import MAX_CLASSES, Crops
from st_ar.data.store import TokenStore
from st_ar.data.store_writer import TokenStoreWriter
from st_ar.errors import UserError, cause
from st_ar.files import open_array, printable
from st_ar.progress import progress

READERS = 8
"""Files read at once, to hide the latency of disk or network."""


class UnreadableError(Exception):
    """A file that is truncated or not an array; the message is the reason."""


@dataclass(frozen=True)
class _Folders:
    codes: Sequence[Path]
    labels: Path
    shapes: Sequence[tuple[int, int]]
    """(crops, T) of each folder of codes."""
    vocab_size: int

    def read(self, number: int) -> tuple[np.ndarray, int] | UnreadableError:
        """The codes uint16 [crops, T] of all folders and the label of an image, or why they are unreadable."""
        path = self.labels / f"{number}.npy"
        try:
            parts = [self._codes(folder, number, shape) for folder, shape in zip(self.codes, self.shapes, strict=True)]
            label = _load(path)
        except UnreadableError as error:
            return error
        if label.size != 1 or not np.issubdtype(label.dtype, np.integer):
            raise UserError(f"{path} is {label.dtype} {list(label.shape)}, not one label: give LlamaGen's label folder")
        return np.concatenate(parts), int(label.item())

    def _codes(self, folder: Path, number: int, shape: tuple[int, int]) -> np.ndarray:
        path = folder / f"{number}.npy"
        codes = _load(path)
        if codes.shape != (1, *shape) or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(
                f"{path} is {codes.dtype} {list(codes.shape)}, but the folder's first file is integers [1, {shape[0]}, {shape[1]}]: "
                "import folders of one image size at a time"
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"{path} has codes from {low} to {high}, outside --vocab-size {self.vocab_size}: give the tokenizer's"
            )
        return codes[0].astype(np.uint16)


def import_tokens(
    codes: Path,
    labels: Path,
    out: Path,
    *,
    vocab_size: int,
    more_codes: Path | None = None,
    num_classes: int | None = None,
    tokenizer: str = "",
    images_per_shard: int = 16384,
    max_skipped: float = 0.01,
) -> TokenStore:
    """Convert LlamaGen's `imagenet{size}_codes/{i}.npy` [1, crops, T] and `imagenet{size}_labels/{i}.npy` [1].

    Images are sorted by number. Another call continues a stopped import. Truncated files are left out and listed.

    Args:
        more_codes: a second set of crops of the same images, such as LlamaGen's at range 1.05.
        num_classes: number of classes; the default is the largest label + 1.
        tokenizer: fingerprint of the tokenizer that made the codes, if known.

    Raises:
        UserError: folders that do not belong together, codes or labels out of range, files of another shape, too many
            unreadable files, or an `out` that holds something else.
    """
    if not 1 <= vocab_size <= 1 << 16:
        raise UserError(f"--vocab-size must lie between 1 and 65536, the store's 16 bits, not {vocab_size}")
    if num_classes is not None and num_classes < 1:
        raise UserError(f"--num-classes must be 1 or more, not {num_classes}")
    folders = [codes] + ([more_codes] if more_codes else [])
    numbers = _numbers(labels)
    for folder in folders:
        _compare(numbers, labels, _numbers(folder), folder)
    shapes = [_first_shape(folder, numbers) for folder in folders]
    if len({tokens for _, tokens in shapes}) > 1:
        raise UserError(
            f"{codes} has {shapes[0][1]} tokens for each crop, {more_codes} has {shapes[1][1]}: give two of one size"
        )
    grid = math.isqrt(shapes[0][1])
    if grid**2 != shapes[0][1]:
        raise UserError(f"{codes} has {shapes[0][1]} tokens for each crop, not a square: give a folder of codes")
    names = _crop_names(shapes[0][0], "") + (_crop_names(shapes[1][0], "second-") if more_codes else [])
    reader = _Folders(folders, labels, shapes, vocab_size)
    settings: dict[str, object] = {
        "codes": printable(str(codes)),
        "labels": printable(str(labels)),
        "more_codes": printable(str(more_codes)),
        "images": len(numbers),
        "vocab_size": vocab_size,
        "num_classes": num_classes,
        "tokenizer": tokenizer,
        "crops": names,
        "tokens": grid**2,
        "images_per_shard": images_per_shard,
    }
    shards = -(-len(numbers) // images_per_shard)
    needed = len(numbers) * (len(names) * grid**2 * 2 + 4)
    job = TokenStoreWriter(
        out, command="import-tokens", settings=settings, shards=shards, needed_bytes=needed, max_skipped=max_skipped
    )
    if job.is_complete:
        return TokenStore(out)
    for index in range(shards):
        job.reopen_mended(index, lambda image: not isinstance(reader.read(numbers[image]), UnreadableError))
    starts = {index: index * images_per_shard for index in range(shards) if not job.is_finished(index)}
    parts = {index: numbers[start : start + images_per_shard] for index, start in starts.items()}
    done = len(numbers) - sum(map(len, parts.values()))
    with ThreadPoolExecutor(READERS) as threads, progress("import", len(numbers), unit="images", done=done) as bar:
        for index, part in parts.items():
            array = np.empty((len(part), len(names), grid**2), np.uint16)
            values: list[int] = []
            skipped: list[Skipped] = []
            for offset, (number, result) in enumerate(_read_all(reader, part, threads)):
                if isinstance(result, UnreadableError):
                    skipped.append(Skipped(starts[index] + offset, f"{number}.npy", str(result)))
                    job.check_skipped(skipped, len(numbers))
                else:
                    array[len(values)], label = result
                    values.append(_check_label(label, num_classes, labels / f"{number}.npy"))
                bar.advance(1)
            job.write(index, array[: len(values)], np.array(values, np.int32), skipped)
    return job.finish(
        shards=shards,
        source=f"llamagen:{codes}",
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        grid=grid,
        crops=names,
        names=[str(label) for label in range(num_classes or 0)],
    )


def _read_all(
    reader: _Folders, numbers: Sequence[int], threads: ThreadPoolExecutor
) -> Iterator[tuple[int, tuple[np.ndarray, int] | UnreadableError]]:
    """The result for each image, in order; a bounded number is read ahead."""
    source = iter(numbers)
    while batch := list(islice(source, 64 * READERS)):
        yield from zip(batch, threads.map(reader.read, batch), strict=True)


def _load(path: Path) -> np.ndarray:
    try:
        return np.array(open_array(path))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path}: {cause(error)}") from error


def _numbers(folder: Path) -> list[int]:
    """The sorted numbers i of all {i}.npy in a folder."""
    try:
        with os.scandir(folder) as entries:
            stems = [entry.name[:-4] for entry in entries if entry.name.endswith(".npy")]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give LlamaGen's folder of .npy files") from error
    numbers = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())
    if not numbers:
        raise UserError(f"{folder} has no files 0.npy, 1.npy, ..: give LlamaGen's folder of .npy files")
    return numbers


def _compare(labelled: list[int], labels: Path, coded: list[int], codes: Path) -> None:
    for has, lacks, missing in (
        (labels, codes, set(labelled) - set(coded)),
        (codes, labels, set(coded) - set(labelled)),
    ):
        if missing:
            raise UserError(
                f"{lacks} lacks {len(missing)} of the images that {has} has, such as {min(missing)}.npy: give complete "
                "folders that were written together"
            )


def _first_shape(folder: Path, numbers: Sequence[int]) -> tuple[int, int]:
    """(crops, T) of the first readable file."""
    for number in numbers:
        try:
            codes = _load(folder / f"{number}.npy")
        except UnreadableError:
            continue
        if codes.ndim != 3 or len(codes) != 1 or codes.size == 0:
            raise UserError(
                f"{folder / f'{number}.npy'} is {list(codes.shape)}, not [1, crops, tokens]: give LlamaGen's folder of codes"
            )
        return codes.shape[1], codes.shape[2]
    raise UserError(f"{folder} has no readable .npy file: fetch it again")


def _crop_names(crops: int, prefix: str) -> list[str]:
    """Names in LlamaGen's order: torchvision's ten crops, or the centre and its mirror image."""
    ten = Crops(kind="ten", size=1, range=1).names
    names = {10: ten, 2: ["center", "mirrored-center"], 1: ["center"]}.get(crops, [f"crop-{i}" for i in range(crops)])
    return [prefix + name for name in names]


def _check_label(label: int, num_classes: int | None, path: Path) -> int:
    if not 0 <= label < (num_classes or MAX_CLASSES):
        bound = f"--num-classes {num_classes}" if num_classes else f"{MAX_CLASSES:,} classes"
        raise UserError(f"{path} has label {label}, outside {bound}: give the right number, or other labels")
    return label
