"""Samples that are being written: begun, filled part by part by one or several ranks, and finished.

A stopped job is continued by the same command, with any number of ranks, and ends with the same files.
"""

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.data.decode import BrokenImageError, read_image
from st_ar.distributed import Ranks
from st_ar.errors import UserError, cause
from st_ar.figures import strip
from st_ar.files import open_array, read_json, require_absent, save_array, sha256, write_json, written_aside
from st_ar.hardware import describe

JOB, METADATA = "job.json", "metadata.json"
"""In a folder of samples: marks them as unfinished, and says how they were made."""
PREVIEW = 64
"""Images of the preview."""


class SampleJob:
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

    def __init__(self, out: Path, count: int, record: dict[str, Any], batch_size: int, ranks: Ranks) -> None:
        if out.suffix[1:2].isalpha() and out.suffix != ".npz":  # a folder may be called cfg1.5
            raise UserError(
                f"--out {out}: samples are written to a .npz file or to a folder of PNGs, not to {out.suffix}"
            )
        self.out, self.count, self.batch_size, self.ranks = out, count, batch_size, ranks
        self.parts = -(-count // batch_size)
        self.packs = out.suffix == ".npz"
        self.folder = out.with_name(f"{out.name}.parts") if self.packs else out
        self.metadata = out.with_suffix(".json") if self.packs else out / METADATA
        self.preview = out.with_name(f"{out.name}.preview.png")
        self.record = json.loads(json.dumps({"images": count, "batch_size": batch_size, **record}))
        if ranks.rank == 0:
            self._claim()
        else:
            ranks.wait(self.folder, lambda: self._is_begun or self._is_drawn, lambda: f"rank 0 to begin {out}")
            if self._is_begun:
                self._compare()

    @property
    def _is_begun(self) -> bool:
        return (self.folder / JOB).exists()

    @property
    def _is_drawn(self) -> bool:
        """Whether every picture is where it belongs."""
        return self.metadata.exists()

    def _claim(self) -> None:
        if self._is_begun:
            self._compare()
            return
        for path in (self.out, self.metadata, self.preview, self.folder):
            require_absent(path, "a set of samples")
        write_json(self.folder / JOB, self.record)

    def _compare(self) -> None:
        begun = read_json(self.folder / JOB, "an unfinished set of samples")
        other = [name for name, value in self.record.items() if begun.get(name) != value]
        if other:
            raise UserError(
                f"{self.folder} holds unfinished samples of other {', '.join(other)}: give the same settings to go on, "
                "choose another --out, or remove it"
            )

    def numbers(self, part: int) -> range:
        """The images of a part."""
        return range(part * self.batch_size, min(self.count, (part + 1) * self.batch_size))

    def is_finished(self, part: int) -> bool:
        """Whether a part's pictures are there."""
        files = [self._path(part), self._seal(part)] if self.packs else map(self._path, self.numbers(part))
        return self._is_drawn or all(file.exists() for file in files)

    def _path(self, number: int) -> Path:
        """Of a part (.npz), or of an image (PNGs)."""
        return self.folder / (f"part-{number:06d}.npy" if self.packs else f"{number:06d}.png")

    def _seal(self, part: int) -> Path:
        """The checksum of a part (.npz), written after it; a PNG has one inside."""
        return self._path(part).with_suffix(".sha256")

    def beat(self) -> None:
        """Show the other ranks that this one is at work; not after its last part, when rank 0 clears the folder."""
        self.ranks.beat(self.folder)

    def write(self, part: int, pictures: np.ndarray) -> None:
        """Write a part's pictures."""
        self.beat()
        if self.packs:
            save_array(self._path(part), pictures)
            with written_aside(self._seal(part)) as aside:
                aside.write_text(sha256(self._path(part)) + "\n")
            return
        for number, picture in zip(self.numbers(part), pictures, strict=True):
            _save_picture(self._path(number), picture)

    def finish(self, labels: Sequence[int]) -> None:
        """Wait for the other ranks' parts; write a preview, the .npz, and the metadata. Rank 0's to do."""
        if not self._is_drawn:
            self._wait_for_all()
            _save_picture(self.preview, strip(self._first(min(self.count, PREVIEW)), min(self.count, 8)))
            if self.packs:
                with written_aside(self.out) as aside:
                    self._pack(aside, labels)
            write_json(self.metadata, {**self.record, "environment": describe()})
        self.ranks.clear(self.folder)
        if self.packs:
            for part in range(self.parts):
                self._path(part).unlink(missing_ok=True)
                self._seal(part).unlink(missing_ok=True)
        (self.folder / JOB).unlink()
        if self.packs:
            shutil.rmtree(self.folder)

    def _wait_for_all(self) -> None:
        todo = set(range(self.parts))

        def ready() -> bool:
            todo.difference_update([part for part in todo if self.is_finished(part)])
            return not todo

        self.ranks.wait(self.folder, ready, lambda: f"part {min(todo)} of {self.parts}")

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
        return UserError(
            f"{path} is damaged ({cause(error)}): remove it and give the same command to have it drawn again"
        )

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
    with written_aside(path) as aside:
        Image.fromarray(picture).save(aside, format="PNG")
