"""A token store that is being written: claimed, filled shard by shard by one or several ranks, and finished."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from st_ar.data.store import JOB, META, SKIPPED, StoreMeta, TokenStore, shard_names
from st_ar.distributed import barrier, broadcast_from_rank0
from st_ar.errors import UserError, cause
from st_ar.files import atomic_write, claim, open_array, parse_json, save_array, sha256, write_json


@dataclass(frozen=True, order=True)
class Skipped:
    """An image that could not be used."""

    index: int
    name: str
    reason: str


class TokenStoreWriter:
    """The writing side of a token store (docs/formats.md).

    A shard's checksums are written last and mark it finished. A finished shard is rewritten only if an image that it lacks has been
    mended. meta.json, written last of all by rank 0, marks the store complete and takes the checksums over.

    Args:
        verb: the command that makes it, to be named in errors.
        settings: what must be the same for a stopped job to be continued.
        shards: how many there will be; None if that is known only at the end.
        needed_bytes: size of the finished shards, so that a job which the disk cannot hold is not begun.
        max_skipped: share of the images that may be unusable.

    Raises:
        UserError: `out` holds something else, a finished store, or a job of other settings; or its disk is too small.
    """

    def __init__(
        self,
        out: Path,
        *,
        verb: str,
        settings: dict[str, object],
        shards: int | None,
        needed_bytes: int = 0,
        max_skipped: float = 0.01,
    ) -> None:
        if not 0 <= max_skipped <= 1:
            raise UserError(f"--max-skipped must lie in [0, 1], not {max_skipped}: it is a share of the images")
        self.out, self.shards, self.max_skipped = out, shards, max_skipped
        broadcast_from_rank0(lambda: self._claim({"verb": verb, **settings}, needed_bytes))

    @property
    def is_complete(self) -> bool:
        """Whether meta.json is there."""
        return (self.out / META).exists()

    def _claim(self, settings: dict[str, object], needed: int) -> None:
        job = self.out / JOB
        if self.is_complete and not job.exists():
            raise UserError(f"{self.out} is a finished token store already: choose another --out or remove it")
        if not self.is_complete:
            self._check_space(needed)
        claim(job, settings, "a token store")
        if self.is_complete:  # killed while it cleared up
            self._clear()

    def _check_space(self, needed: int) -> None:
        there = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.is_dir())
        missing = needed - sum(path.stat().st_size for path in self.out.glob("*.npy"))
        free = shutil.disk_usage(there).free
        if missing > free:
            raise UserError(
                f"{self.out} needs {missing / 1e9:.3f} GB more, its disk has {free / 1e9:.3f} GB free: make room and give "
                "the same command, or choose an --out on another disk"
            )

    def is_finished(self, index: int) -> bool:
        """Whether a shard is there."""
        return self._sums_path(index).exists() and (self.out / shard_names(index, self.shards)[1]).exists()

    def reopen_mended(self, index: int, usable: Callable[[int], bool]) -> None:
        """Mark a finished shard unfinished if an image that it lacks can be used now; `usable` tells it by the image's index."""
        path = self._skipped_path(index)
        if self.is_finished(index) and path.exists() and any(usable(each.index) for each in self._skipped([path])):
            self._sums_path(index).unlink()
            path.unlink()

    def write(self, index: int, codes: np.ndarray, labels: np.ndarray, skipped: list[Skipped]) -> None:
        """Write a shard: codes uint16 [n, crops, T], labels int32 [n], and which images it lacks."""
        codes_name, labels_name = shard_names(index, self.shards)
        save_array(self.out / codes_name, codes)
        if skipped:
            _write_lines(self._skipped_path(index), skipped)
        else:
            self._skipped_path(index).unlink(missing_ok=True)
        save_array(self.out / labels_name, labels)
        write_json(self._sums_path(index), self._sums(index))

    def check_skipped(self, fresh: list[Skipped], images: int) -> None:
        """Stop the job if too many of the first `images` images are unusable, in finished shards and in `fresh`.

        The list of them is left in skipped.jsonl.
        """
        skipped = sorted(each for each in self._skipped() + fresh if each.index < images)
        if len(skipped) <= self.max_skipped * images + 1e-9:
            return
        _write_lines(self.out / SKIPPED, skipped)
        first = skipped[0]
        raise UserError(
            f"{len(skipped)} of {images} images cannot be used, more than --max-skipped {self.max_skipped}; the first is "
            f"{first.name}: {first.reason}; {self.out / SKIPPED} lists them. Mend them or raise --max-skipped, then give "
            "the same command to go on: finished shards are kept"
        )

    def finish(
        self,
        *,
        shards: int,
        source: str,
        tokenizer: str,
        vocab_size: int,
        grid: int,
        crops: list[str],
        names: list[str],
        notes: Sequence[str] = (),
    ) -> TokenStore:
        """Wait for all ranks, then (rank 0) write meta.json; returns the finished store.

        Args:
            names: names of the classes; empty if classes are numbered up to the largest label.
            notes: what was noted about the source.
        """
        barrier()
        broadcast_from_rank0(lambda: self._finish(shards, source, tokenizer, vocab_size, grid, crops, names, notes))
        return TokenStore(self.out)

    def _finish(
        self,
        shards: int,
        source: str,
        tokenizer: str,
        vocab_size: int,
        grid: int,
        crops: list[str],
        names: list[str],
        notes: Sequence[str],
    ) -> None:
        skipped = sorted(self._skipped())
        entries: list[dict[str, str | int]] = []
        classes = len(names)
        for index in range(shards):
            codes, labels = shard_names(index, self.shards)
            values = self._labels(index)
            if not names and len(values):
                classes = max(classes, int(values.max()) + 1)
            entries.append({"images": len(values), "codes": codes, "labels": labels, **self._sums(index)})
        images = sum(int(entry["images"]) for entry in entries)
        self.check_skipped([], images + len(skipped))
        if skipped:
            _write_lines(self.out / SKIPPED, skipped)
        else:
            (self.out / SKIPPED).unlink(missing_ok=True)
        if not images:
            raise UserError(
                f"{source} has no image that can be used, {self.out / SKIPPED} says why: mend them, and choose another --out or remove "
                "this one"
            )
        StoreMeta(
            source=source,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            grid=grid,
            crops=crops,
            class_names=names or [str(label) for label in range(classes)],
            images=images,
            shards=entries,
            skipped=len(skipped),
            notes=list(notes),
        ).write(self.out)
        self._clear()

    def _clear(self) -> None:
        """Remove what only an unfinished store has; its job.json last."""
        for path in (*self.out.glob("skipped-*.jsonl"), *self.out.glob("sums-*.json")):
            path.unlink()
        (self.out / JOB).unlink()

    def _sums(self, index: int) -> dict[str, str]:
        """The checksums of a shard's files."""
        codes, labels = shard_names(index, self.shards)
        return {"codes_sha256": sha256(self.out / codes), "labels_sha256": sha256(self.out / labels)}

    def _sums_path(self, index: int) -> Path:
        return self.out / shard_names(index, self.shards)[0].replace("codes", "sums").replace(".npy", ".json")

    def _skipped_path(self, index: int) -> Path:
        return self.out / shard_names(index, self.shards)[0].replace("codes", "skipped").replace(".npy", ".jsonl")

    def _skipped(self, paths: Iterable[Path] | None = None) -> list[Skipped]:
        """The unusable images of these lists; by default of all shards, this rank's and the others'."""
        try:
            lines = [line for path in paths or self.out.glob("skipped-*.jsonl") for line in _lines_of(path)]
            return [Skipped(**parse_json(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.out} has a damaged list of skipped images ({cause(error)}): remove the skipped-*.jsonl file that it is "
                "in with the labels-*.npy of its number, and give the same command"
            ) from error

    def _labels(self, index: int) -> np.ndarray:
        """The labels of a finished shard, if it is as it was written."""
        codes, labels = (self.out / name for name in shard_names(index, self.shards))
        try:
            values, length = open_array(labels), len(open_array(codes))
            if values.shape != (length,) or values.dtype != np.int32:
                raise ValueError(f"{values.dtype} {list(values.shape)} for the codes of {length} images")
            if self._sums(index) != parse_json(self._sums_path(index).read_text()):
                raise ValueError(f"they are not what {self._sums_path(index).name} says was written")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{labels} or its codes are damaged ({cause(error)}): remove it and give the same command to have its shard made again"
            ) from error
        return values


def _lines_of(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="replace").splitlines()


def _write_lines(path: Path, skipped: list[Skipped]) -> None:
    with atomic_write(path) as aside:
        aside.write_text("".join(json.dumps(asdict(each)) + "\n" for each in skipped))
