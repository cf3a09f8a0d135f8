"""Sets of images to be measured, read one after another: .npz files in ADM's layout, folders of PNGs, image sources."""

import contextlib
import hashlib
import math
import re
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from st_ar.data.decoding import default_workers, open_decoder
from st_ar.data.images import open_images
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
from st_ar.errors import UserError, cause
from st_ar.files import parse_json
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.sampling import JOB, METADATA
from st_ar.settings import matches_type

CHUNK = 64
"""Images that are read at once."""
_SOURCE = re.compile(r"(folder|parquet|hub):.|(photos|digits)(:\w+)?$")
Images = Iterator[tuple[int, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one size in a fixed order."""

    name: str
    """What the user called it."""
    count: int | None
    """Number of images; None if that is known only at the end."""
    size: tuple[int, int]
    """Height and width in pixels."""
    read: Callable[[int, int], Images]
    """(rank, ranks) -> the index and pixels uint8 [H, W, 3] of each image that is this rank's. Images that cannot be used are
    left out."""
    labels: np.ndarray | None = None
    """Classes [N], if they are known."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What is said beside the images on how they were made."""


def open_set(spec: str, *, size: int | None = None) -> ImageSet:
    """Open FILE.npz, a folder of PNGs, or an image source (folder:, parquet:, hub:, photos, digits).

    Args:
        size: side in pixels of the centre crops of an image source; what suits the source if None. Files of images are taken as
            they are, and must have this size if it is given.

    Raises:
        UserError: nothing there, damaged, not images, or of another size.
    """
    if is_source(spec):
        return of_source(open_images(spec), size)
    found = open_files(spec, ", or an image source such as folder:PATH or photos:test")
    if size is not None and found.size != (size, size):
        raise UserError(
            f"{spec} has images of {found.size[0]} x {found.size[1]} pixels, --size is {size}: leave --size out"
        )
    return found


def is_source(spec: str) -> bool:
    """Whether this names an image source, and no file or folder."""
    return not Path(spec).expanduser().exists() and _SOURCE.match(spec) is not None


def open_files(spec: str, others: str = "") -> ImageSet:
    """Open FILE.npz or a folder of PNGs; `others` says in the error what else would do."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _open_archive(path)
    cause = "is no .npz file" if path.exists() else "does not exist"
    raise UserError(f"{spec} {cause}: give a .npz file with arr_0 (uint8 [N, H, W, 3]) or a folder of PNGs{others}")


def slice_of(count: int, rank: int, world: int) -> range:
    """A rank's share of so many images that follow one another."""
    return range(count * rank // world, count * (rank + 1) // world)


# .npz files


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn what damaged .npz files raise into one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} holds no array {error}: give a .npz file with arr_0 (uint8 [N, H, W, 3])") from error
    except UserError:
        raise
    except Exception as error:  # what unpacks archives, and NumPy's reader of headers, raise nearly everything
        raise UserError(f"{path} is damaged or no .npz file ({cause(error)}): copy or make it again") from error


def array_names(path: Path) -> set[str]:
    """The arrays in a .npz file."""
    with reading(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_array(path: Path, name: str) -> np.ndarray:
    """An array of a .npz file, whole; never a pickled one, and no more than the file holds."""
    with reading(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _header(file)
        data = bytearray(file.read())
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{name} holds {len(data)} bytes, not {dtype} {list(shape)}")
        return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f".npy format {version} is not known")
    return read[version](file)


def _open_archive(path: Path) -> ImageSet:
    with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, fortran, dtype = _header(file)
        there = archive.getinfo("arr_0.npy").file_size - file.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
        order = ", columns first" if fortran else ""
        raise UserError(f"{path}: arr_0 must be images uint8 [N, H, W, 3], not {dtype} {list(shape)}{order}")
    size = math.prod(shape[1:])
    if shape[0] * size > there:
        last = there // size + 1
        raise UserError(f"{path} is cut short: arr_0 ends before image {last} of {shape[0]}; copy or make it again")

    def read(rank: int, world: int) -> Images:
        mine = slice_of(shape[0], rank, world)
        with reading(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            left = mine.start * size
            while left:  # read over what is the other ranks'
                left -= len(file.read(min(left, 1 << 24))) or left
            for start in range(mine.start, mine.stop, CHUNK):
                rows = min(CHUNK, mine.stop - start)
                pixels = np.frombuffer(file.read(rows * size), np.uint8)
                if pixels.size != rows * size:
                    raise UserError(
                        f"{path} is cut short: arr_0 ends before image {start + rows}; copy or make it again"
                    )
                yield from enumerate(pixels.reshape(rows, *shape[1:]), start)
            if mine.stop == shape[0]:
                file.read(1)  # the end, where the checksum is compared

    metadata, listed = _metadata(metadata_of(path), shape[0])
    labels = read_array(path, "arr_1") if "arr_1" in array_names(path) else listed
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        labels = None
    return ImageSet(
        name=str(path), count=shape[0], size=(shape[1], shape[2]), read=read, labels=labels, metadata=metadata
    )


# Folders and sources


def _open_folder(path: Path) -> ImageSet:
    if (path / JOB).exists():
        raise UserError(f"{path} holds unfinished samples: give the same `st-ar sample` again to finish them")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith("."))
    if not files:
        raise UserError(
            f"{path} holds no PNGs: give the folder that holds them, or folder:{path} for class sub-folders"
        )

    def picture(file: Path) -> np.ndarray:
        try:
            return np.asarray(read_image(file))
        except BrokenImageError as error:
            raise UserError(f"{file} cannot be used ({error}): make it again or take it out of the folder") from error

    size = picture(files[0]).shape[:2]

    def read(rank: int, world: int) -> Images:
        for index in slice_of(len(files), rank, world):
            pixels = picture(files[index])
            if pixels.shape[:2] != size:
                raise UserError(
                    f"{files[index]} has {pixels.shape[0]} x {pixels.shape[1]} pixels, {files[0].name} {size[0]} x {size[1]}: "
                    "images of one size are compared"
                )
            yield index, pixels

    metadata, labels = _metadata(metadata_of(path), len(files))
    height, width = size
    return ImageSet(name=str(path), count=len(files), size=(height, width), read=read, labels=labels, metadata=metadata)


def metadata_of(samples: Path) -> Path:
    """Where `st-ar sample` says how samples in a file or a folder were made."""
    return samples / METADATA if samples.is_dir() else samples.with_suffix(".json")


def _metadata(path: Path, count: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """What `st-ar sample` writes beside its images, and the labels in it; not the list of captions. Other JSON says nothing."""
    if not path.is_file():
        return {}, None
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is unreadable ({cause(error)}), and should say how the samples beside it were made: remove it, or copy it again"
        ) from error
    if not isinstance(found, dict) or "metrics" in found:  # something else, or an evaluation's result
        return {}, None
    labels, _ = found.pop("labels", None), found.pop("captions", None)
    known = matches_type(labels, list[int]) and len(labels) == count and 0 <= min(labels) <= max(labels) < MAX_CLASSES
    return found, np.array(labels) if known else None


def of_source(source: ImageSource, size: int | None = None) -> ImageSet:
    """The centre crops of an image source; images that cannot be decoded are left out."""
    crops = Crops(kind="center", size=source.size if size is None else size, range=source.range_for("center"))
    known = None if source.streaming else source.count

    def chunks(rank: int, world: int) -> Iterator[tuple[int, list[Example]]]:
        if known is not None:
            mine = slice_of(known, rank, world)
            examples = islice(source.examples(mine.start), len(mine))
            for start in range(mine.start, mine.stop, CHUNK):
                yield start, list(islice(examples, CHUNK))
            return
        examples = source.examples(0)
        for number in numbers():
            some = list(islice(examples, CHUNK))
            if not some:
                return
            if number % world == rank:
                yield number * CHUNK, some

    def read(rank: int, world: int) -> Images:
        starts: list[int] = []

        def examples() -> Iterator[list[Example]]:
            for start, some in chunks(rank, world):
                starts.append(start)
                yield some

        with open_decoder(crops.side, default_workers(source.count)) as decoder:
            for number, (_, decoded) in enumerate(decoder.decode(examples())):
                cut = crops.cut_pixels(decoded.pixels)[:, 0]
                yield from ((starts[number] + place, image) for place, image in zip(decoded.used, cut, strict=True))

    return ImageSet(name=source.name, count=source.count, size=(crops.size, crops.size), read=read)


def open_pictures(spec: str) -> ImageSource:
    """An image source, or a .npz file or a folder of PNGs as one.

    Raises:
        UserError: nothing there, or no images.
    """
    if is_source(spec):
        return open_images(spec)
    images = open_files(spec, ", or an image source such as folder:PATH or photos:test")

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
    )


class Pictures:
    """Some images of a source as squares of one size, as ADM resizes and crops: smaller ones are enlarged.

    They are drawn with the seed; of a source that can only be read from its beginning they are the first.
    """

    def __init__(self, source: ImageSource, *, num: int, seed: int) -> None:
        self.source, self.num, self.seed = source, num, seed
        known = None if source.streaming else source.count
        self.count = num if source.count is None else min(num, source.count)
        self.drawn = known is not None and known > num
        self.used = self.skipped = self.enlarged = 0
        self.digests = hashlib.sha256()

    def examples(self) -> Iterator[Example]:
        """The images that were chosen, in their order."""
        if not self.drawn or self.source.count is None:
            yield from islice(self.source.examples(0), self.count)
            return
        rng = numpy_generator(self.seed, RandomStream.EVALUATION)
        for index in np.sort(rng.choice(self.source.count, self.count, replace=False)):
            yield next(self.source.examples(int(index)))

    def batches(self, side: int, batch_size: int) -> Iterator[np.ndarray]:
        """Batches uint8 [b, side, side, 3]; images that cannot be decoded are counted and left out."""
        batch: list[np.ndarray] = []
        for example in self.examples():
            try:
                image = example.read()
                scale = side / min(image.size)
                check_pixels(image.width * scale, image.height * scale)
            except BrokenImageError:
                self.skipped += 1
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
    """SHA-256 of an image uint8 [H, W, 3]: its size as text and its bytes."""
    header = f"{pixels.shape[0]} {pixels.shape[1]} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).digest()
