"""LlamaGen's tokens on disk (one .npy file for each image) -> a token store."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from st_ar.data.source import MAX_CLASSES, Crops
from st_ar.data.store import TokenStore
from st_ar.data.store_writer import Skipped, TokenStoreWriter
from st_ar.errors import UserError, cause
from st_ar.files import open_array
from st_ar.progress import progress

READERS = 8
"""Files read at once: what takes time is the disk's, or the network's, answer."""


class UnreadableError(Exception):
    """A file that is cut short or no array; the message is the reason."""


@dataclass(frozen=True)
class _Folders:
    codes: Sequence[Path]
    labels: Path
    shapes: Sequence[tuple[int, int]]
    """(crops, T) of each folder of codes."""
    vocab_size: int

    def read(self, number: int) -> tuple[np.ndarray, int]:
        """Codes uint16 [crops, T] of all folders and the label of one image."""
        parts = [self._codes(path, number, shape) for path, shape in zip(self.codes, self.shapes, strict=True)]
        path = self.labels / f"{number}.npy"
        label = _load(path)
        if label.size != 1 or not np.issubdtype(label.dtype, np.integer):
            raise UserError(
                f"{path} holds {label.dtype} {list(label.shape)}, not one label: give LlamaGen's label folder"
            )
        return np.concatenate(parts), int(label.item())

    def _codes(self, folder: Path, number: int, shape: tuple[int, int]) -> np.ndarray:
        path = folder / f"{number}.npy"
        codes = _load(path)
        if codes.shape != (1, *shape) or not np.issubdtype(codes.dtype, np.integer):
            raise UserError(
                f"{path} holds {codes.dtype} {list(codes.shape)}, the folder's first file integers [1, {shape[0]}, {shape[1]}]: "
                "import folders of one image size at a time"
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"{path} has codes from {low} to {high}, not within --vocab-size {self.vocab_size}: give the tokenizer's"
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
    """Make a store of LlamaGen's `imagenet{size}_codes/{i}.npy` [1, crops, T] and `imagenet{size}_labels/{i}.npy` [1].

    Images come in the order of their numbers. A stopped import is continued by calling it again. Files that are cut
    short are left out and listed, like images that cannot be decoded.

    Args:
        more_codes: a second set of crops of the same images (LlamaGen's at range 1.05): so many more crops.
        num_classes: number of classes; by default the largest label and one.
        tokenizer: fingerprint of the tokenizer that made the codes, if it is at hand.

    Raises:
        UserError: folders that do not belong together, codes or labels out of range, files of another shape, too many
            unreadable ones, or an `out` that holds something else.
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
        raise UserError(
            f"{codes} has {shapes[0][1]} tokens for each crop, which is no square: is it a folder of codes?"
        )
    names = _crop_names(shapes[0][0], "") + (_crop_names(shapes[1][0], "second-") if more_codes else [])
    reader = _Folders(folders, labels, shapes, vocab_size)
    settings: dict[str, object] = {
        "codes": str(codes),
        "labels": str(labels),
        "more_codes": str(more_codes),
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
        out, verb="import-tokens", settings=settings, shards=shards, needed_bytes=needed, max_skipped=max_skipped
    )
    if job.is_complete:  # but for what it had to clear up
        return TokenStore(out)
    for index in range(shards):
        job.reopen_mended(index, lambda image: _readable(reader, numbers[image]))
    starts = {index: index * images_per_shard for index in range(shards) if not job.is_finished(index)}
    parts = {index: numbers[start : start + images_per_shard] for index, start in starts.items()}
    done = len(numbers) - sum(map(len, parts.values()))
    with ThreadPoolExecutor(READERS) as threads, progress("import", len(numbers), unit="images", done=done) as bar:
        for index, part in parts.items():
            array = np.empty((len(part), len(names), grid**2), np.uint16)
            values: list[int] = []
            skipped: list[Skipped] = []
            for place, (number, found) in enumerate(_read_all(reader, part, threads)):
                if isinstance(found, UnreadableError):
                    skipped.append(Skipped(starts[index] + place, f"{number}.npy", str(found)))
                    job.check_skipped(skipped, len(numbers))
                else:
                    array[len(values)], label = found
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


def _readable(reader: _Folders, number: int) -> bool:
    try:
        reader.read(number)
    except UnreadableError:
        return False
    return True


def _read_all(
    reader: _Folders, numbers: Sequence[int], threads: ThreadPoolExecutor
) -> Iterator[tuple[int, tuple[np.ndarray, int] | UnreadableError]]:
    """Each image's codes and label, in order; a bounded number is read ahead."""

    def read(number: int) -> tuple[int, tuple[np.ndarray, int] | UnreadableError]:
        try:
            return number, reader.read(number)
        except UnreadableError as error:
            return number, error

    source = iter(numbers)
    while some := list(islice(source, 64 * READERS)):
        yield from threads.map(read, some)


def _load(path: Path) -> np.ndarray:
    try:
        return np.array(open_array(path))
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path}: {cause(error)}") from error


def _numbers(folder: Path) -> list[int]:
    """The i of all {i}.npy in a folder, in order."""
    try:
        with os.scandir(folder) as entries:
            stems = [entry.name[:-4] for entry in entries if entry.name.endswith(".npy")]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give LlamaGen's folder of .npy files") from error
    numbers = sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())
    if not numbers:
        raise UserError(f"{folder} holds no files named 0.npy, 1.npy, ..: give LlamaGen's folder of .npy files")
    return numbers


def _compare(ours: list[int], labels: Path, theirs: list[int], codes: Path) -> None:
    if ours == theirs:
        return
    for has, lacks, missing in ((labels, codes, set(ours) - set(theirs)), (codes, labels, set(theirs) - set(ours))):
        if missing:
            raise UserError(
                f"{lacks} lacks {len(missing)} of the images that {has} has, such as {min(missing)}.npy: give folders "
                "that were written together, whole"
            )


def _first_shape(folder: Path, numbers: Sequence[int]) -> tuple[int, int]:
    """(crops, T), from the first file that can be read."""
    for number in numbers:
        try:
            codes = _load(folder / f"{number}.npy")
        except UnreadableError:
            continue
        if codes.ndim != 3 or len(codes) != 1 or codes.size == 0:
            raise UserError(f"{folder / f'{number}.npy'} holds {list(codes.shape)}, not LlamaGen's [1, crops, tokens]")
        return codes.shape[1], codes.shape[2]
    raise UserError(f"{folder} has no .npy file that can be read: fetch it again")


def _crop_names(crops: int, prefix: str) -> list[str]:
    """LlamaGen's order: ten crops as torchvision's, or the centre and its mirror image."""
    ten = Crops(kind="ten", size=1, range=1).names
    names = {10: ten, 2: ["center", "mirrored-center"], 1: ["center"]}.get(crops, [f"crop-{i}" for i in range(crops)])
    return [prefix + name for name in names]


def _check_label(label: int, num_classes: int | None, path: Path) -> int:
    if not 0 <= label < (num_classes or MAX_CLASSES):
        bound = f"--num-classes {num_classes}" if num_classes else f"{MAX_CLASSES:,} classes"
        raise UserError(f"{path} holds label {label}, which is none of {bound}: give the right number, or other labels")
    return label
