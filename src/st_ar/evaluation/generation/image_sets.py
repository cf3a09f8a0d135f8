"""Sets of images to measure: .npz files in ADM's layout, folders of PNGs, image sources."""

import contextlib
import hashlib
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from st_ar.data.decoding import default_workers, open_decoder
from st_ar.data.images import images_in, open_images
from st_ar.data.skipped import SkippedImages
from st_ar.data.source import (
    MAX_CLASSES,
    BrokenImageError,
    Crops,
    Example,
    ImageSource,
    center_crop,
    check_pixels,
    read_image,
)
from st_ar.distributed import Ranks
from st_ar.errors import UserError, cause, note
from st_ar.files import parse_json, printable
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.sampling import JOB, METADATA
from st_ar.settings import matches_type

CHUNK = 64
_SOURCE = re.compile(r"(folder|parquet|hub):.|(photos|digits)(:\w+)?$")
Images = Iterator[tuple[int, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one size in a fixed order."""

    name: str
    """The path or source that the user gave."""
    count: int | None
    """Number of images; None if it is only known at the end."""
    size: tuple[int, int]
    """Height and width in pixels."""
    read: Callable[[int, int], Images]
    """(rank, world size) -> index and pixels uint8 [H, W, 3] of each image in this rank's shard."""
    name_of: Callable[[int], str] = "image {}".format
    """The name of the image with an index."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the images were found."""
    skipped: SkippedImages = field(default_factory=SkippedImages)
    """Unusable images that `read` has left out."""
    labels: np.ndarray | None = None
    """Classes [N], if known."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """How the images were made, from the metadata file beside them."""


def open_set(spec: str, *, size: int | None = None, max_skipped: float = 0.01) -> ImageSet:
    """Open FILE.npz, a folder of PNGs, or an image source (folder:, parquet:, hub:, photos, digits).

    Args:
        size: side in pixels of an image source's centre crops; the source's default if None. Images in files are never resized and
            must have this size.
        max_skipped: largest share of unusable images of an image source.

    Raises:
        UserError: the images are missing, damaged, or of another size.
    """
    if is_source(spec):
        return from_source(open_images(spec), size, max_skipped)
    images = open_files(spec, or_source=True)
    if size is not None and images.size != (size, size):
        raise UserError(
            f"{spec} has images of {images.size[0]} x {images.size[1]} pixels, --size is {size}: leave --size out"
        )
    return images


def is_source(spec: str) -> bool:
    """Whether this names an image source, not a file or folder."""
    return not Path(spec).expanduser().exists() and _SOURCE.match(spec) is not None


def open_files(spec: str, *, or_source: bool = False) -> ImageSet:
    """Open FILE.npz or a folder of PNGs. With `or_source` the error message also offers an image source."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path, or_source)
    if path.is_file() and path.suffix == ".npz":
        return _open_archive(path)
    problem = "is not a .npz file" if path.exists() else "does not exist"
    others = ", or an image source such as folder:PATH or photos:test" if or_source else ""
    raise UserError(f"{spec} {problem}: give a .npz file with arr_0 (uint8 [N, H, W, 3]) or a folder of PNGs{others}")


def _shard(count: int, rank: int, world: int) -> range:
    return range(count * rank // world, count * (rank + 1) // world)


# .npz files


@contextlib.contextmanager
def _open_npz(path: Path) -> Generator[zipfile.ZipFile]:
    """A .npz file open for reading; errors of damaged files become a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except KeyError as error:
        raise UserError(f"{path} has no array {error}: give a .npz file with arr_0 (uint8 [N, H, W, 3])") from error
    except UserError:
        raise
    except Exception as error:  # zipfile and NumPy's header parser raise nearly every type of error
        raise UserError(f"{path} is damaged or not a .npz file ({cause(error)}): copy or make it again") from error


def array_names(path: Path) -> set[str]:
    """Return the names of the arrays in a .npz file."""
    with _open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_array(path: Path, name: str) -> np.ndarray:
    """Read an array of a .npz file. Pickles are refused, and a false shape in the header allocates no memory."""
    with _open_npz(path) as archive, archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _read_header(file)
        data = bytearray(file.read())
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{name} holds {len(data)} bytes, not {dtype} {list(shape)}")
        return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"unknown .npy format {version}")
    return read[version](file)


def _open_archive(path: Path) -> ImageSet:
    with _open_npz(path) as archive, archive.open("arr_0.npy") as file:
        shape, fortran, dtype = _read_header(file)
        available = archive.getinfo("arr_0.npy").file_size - file.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
        order = ", columns first" if fortran else ""
        raise UserError(f"{path}: arr_0 must be images uint8 [N, H, W, 3], not {dtype} {list(shape)}{order}")
    size = math.prod(shape[1:])
    if shape[0] * size > available:
        last = available // size + 1
        raise UserError(f"{path} is cut short: arr_0 ends before image {last} of {shape[0]}; copy or make it again")

    def read(rank: int, world: int) -> Images:
        shard = _shard(shape[0], rank, world)
        with _open_npz(path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            remaining = shard.start * size
            while remaining:  # skip the other ranks' images: a compressed file cannot seek
                remaining -= len(file.read(min(remaining, 1 << 24))) or remaining
            for start in range(shard.start, shard.stop, CHUNK):
                rows = min(CHUNK, shard.stop - start)
                pixels = np.frombuffer(file.read(rows * size), np.uint8)
                if pixels.size != rows * size:
                    raise UserError(
                        f"{path} is cut short: arr_0 ends before image {start + rows}; copy or make it again"
                    )
                yield from enumerate(pixels.reshape(rows, *shape[1:]), start)
            if shard.stop == shape[0]:
                file.read(1)  # zipfile compares the checksum at the end

    metadata, listed_labels = _read_metadata(path, shape[0])
    labels = read_array(path, "arr_1") if "arr_1" in array_names(path) else listed_labels
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        labels = None
    return ImageSet(
        name=printable(str(path)),
        count=shape[0],
        size=(shape[1], shape[2]),
        read=read,
        labels=labels,
        metadata=metadata,
    )


# Folders and sources


def _open_folder(path: Path, or_source: bool) -> ImageSet:
    if (path / JOB).exists():
        raise UserError(f"{path} holds unfinished samples: run the same `st-ar sample` again to finish them")
    loose, below = images_in(path)
    files = sorted(path / name for name in loose if Path(name).suffix.lower() == ".png")
    others = Counter(suffix for name in loose if (suffix := Path(name).suffix.lower()) != ".png")
    left_out = [f"{count} {suffix}" for suffix, count in sorted(others.items())]
    left_out += [f"{len(below)} in sub-folders, such as {printable(below[0])}"] if below else []
    remedy = "give the folder with the PNGs"
    if left_out:
        reads = f"folder:{path} reads images of all types, all in the folder or all in its sub-folders"
        remedy = reads if or_source else "convert them to .png, and move them into the folder"
    if not files:
        only = f", only {', '.join(left_out)}" if left_out else ""
        raise UserError(f"{path} holds no PNGs{only}: {remedy}")
    notes = (f"{path}: only its {len(files)} PNGs are read, not {', '.join(left_out)}; {remedy}",) if left_out else ()
    if notes and Ranks.from_environment().rank == 0:
        note(notes[0])

    def read_file(file: Path) -> np.ndarray:
        try:
            return np.asarray(read_image(file))
        except BrokenImageError as error:
            raise UserError(f"{file} cannot be used ({error}): make it again, or remove it from the folder") from error

    size = read_file(files[0]).shape[:2]

    def read(rank: int, world: int) -> Images:
        for index in _shard(len(files), rank, world):
            pixels = read_file(files[index])
            if pixels.shape[:2] != size:
                raise UserError(
                    f"{files[index]} has {pixels.shape[0]} x {pixels.shape[1]} pixels, {files[0].name} {size[0]} x {size[1]}: "
                    "give images of one size"
                )
            yield index, pixels

    metadata, labels = _read_metadata(path, len(files))
    height, width = size
    return ImageSet(
        name=printable(str(path)),
        count=len(files),
        size=(height, width),
        read=read,
        name_of=lambda index: printable(files[index].name),
        notes=notes,
        labels=labels,
        metadata=metadata,
    )


def metadata_path(samples: Path) -> Path:
    """Return the file in which `st-ar sample` describes samples in a file or folder."""
    return samples / METADATA if samples.is_dir() else samples.with_suffix(".json")


def _read_metadata(samples: Path, count: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return the description beside samples, without the captions, and the labels. Other JSON files are ignored."""
    path = metadata_path(samples)
    if not path.is_file():
        return {}, None
    try:
        metadata = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is unreadable ({cause(error)}) and should describe the samples beside it: remove it, or copy it again"
        ) from error
    if not isinstance(metadata, dict) or "metrics" in metadata:  # another program's file, or an evaluation's result
        return {}, None
    labels, _ = metadata.pop("labels", None), metadata.pop("captions", None)
    known = matches_type(labels, list[int]) and len(labels) == count and 0 <= min(labels) <= max(labels) < MAX_CLASSES
    return metadata, np.array(labels) if known else None


def from_source(source: ImageSource, size: int | None = None, max_skipped: float = 0.01) -> ImageSet:
    """The centre crops of an image source. Up to a share `max_skipped` of its images may be unusable; they are left out."""
    skipped = SkippedImages(source.name, max_skipped)
    crops = Crops(kind="center", size=source.size if size is None else size, range=source.range_for("center"))

    def chunks(rank: int, world: int) -> Iterator[tuple[int, list[Example]]]:
        if source.count is not None and not source.streaming:
            shard = _shard(source.count, rank, world)
            examples = islice(source.examples(shard.start), len(shard))
            for start in range(shard.start, shard.stop, CHUNK):
                yield start, list(islice(examples, CHUNK))
            return
        examples, start = source.examples(0), 0
        while chunk := list(islice(examples, CHUNK)):
            if start // CHUNK % world == rank:
                yield start, chunk
            start += CHUNK

    def read(rank: int, world: int) -> Images:
        ahead, current = tee(chunks(rank, world))  # workers decode ahead
        with open_decoder(crops.side, default_workers(source.count)) as decoder:
            decoding = decoder.decode(chunk for _, chunk in ahead)
            for (chunk, decoded), (start, _) in zip(decoding, current, strict=True):
                for offset, reason in decoded.broken:
                    skipped.add(start + offset, chunk[offset].name, reason, source.count or source.expected)
                images = crops.cut_pixels(decoded.pixels)[:, 0]
                yield from ((start + index, image) for index, image in zip(decoded.used, images, strict=True))

    def name_of(index: int) -> str:
        return ("" if source.streaming else next(source.examples(index)).name) or f"image {index}"

    return ImageSet(
        name=source.name,
        count=source.count,
        size=(crops.size, crops.size),
        read=read,
        name_of=name_of,
        notes=source.notes,
        skipped=skipped,
    )


def open_pictures(spec: str) -> ImageSource:
    """Open an image source, or a .npz file or folder of PNGs as a source."""
    if is_source(spec):
        return open_images(spec)
    images = open_files(spec, or_source=True)

    def examples(start: int) -> Iterator[Example]:
        for index, pixels in images.read(0, 1):
            if index >= start:
                yield Example(Image.fromarray(pixels), 0)

    return ImageSource(
        name=images.name,
        class_names=(),
        count=images.count,
        examples=examples,
        size=min(images.size),
        crop_range=1.0,
        mirror=True,
        streaming=True,
        notes=images.notes,
    )


class Pictures:
    """Some images of a source as squares of one size, resized and cropped as in ADM. Smaller images are enlarged.

    They are a random subset; the first images of a source that can only be streamed.
    """

    def __init__(self, source: ImageSource, *, num: int, seed: int, max_skipped: float = 0.01) -> None:
        self.source, self.num, self.seed = source, num, seed
        self.count = num if source.count is None else min(num, source.count)
        self.random = not source.streaming and source.count is not None and source.count > num
        self.skipped = SkippedImages(source.name, max_skipped)
        self.used = self.enlarged = 0
        self.digests = hashlib.sha256()

    def examples(self) -> Iterator[tuple[int, Example]]:
        """The chosen images with their indices, in order."""
        if not self.random or self.source.count is None:
            yield from enumerate(islice(self.source.examples(0), self.count))
            return
        rng = numpy_generator(self.seed, RandomStream.EVALUATION)
        for index in np.sort(rng.choice(self.source.count, self.count, replace=False)):
            yield int(index), next(self.source.examples(int(index)))

    def batches(self, side: int, batch_size: int) -> Iterator[np.ndarray]:
        """Batches uint8 [b, side, side, 3]. Unusable images are listed and left out."""
        batch: list[np.ndarray] = []
        for index, example in self.examples():
            try:
                image = example.read()
                scale = side / min(image.size)
                check_pixels(image.width * scale, image.height * scale)
            except BrokenImageError as error:
                self.skipped.add(index, example.name, str(error), self.count)
                continue
            self.used += 1
            self.enlarged += scale > 1
            batch.append(center_crop(image, side))
            self.digests.update(image_digest(batch[-1]))
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)


def image_digest(pixels: np.ndarray) -> bytes:
    """Return the SHA-256 of an image uint8 [H, W, 3]: of its size and its pixels."""
    header = f"{pixels.shape[0]} {pixels.shape[1]} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).digest()
