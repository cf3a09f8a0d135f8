"""A token store that is being written: claimed, filled shard by shard by one or several ranks, and finished."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from st_ar.data.store import JOB, META, SKIPPED, StoreMeta, TokenStore, shard_names
from st_ar.distributed import Ranks
from st_ar.errors import UserError, cause
from st_ar.files import atomic_write, is_nonempty, open_array, parse_json, read_json, save_array, sha256, write_json


@dataclass(frozen=True, order=True)
class Skipped:
    """An image that could not be used."""

    index: int
    name: str
    reason: str


class TokenStoreWriter:
    """The writing side of a token store (docs/formats.md).

    A shard's checksums are written last and mark it finished; a finished shard is never rewritten; meta.json, written last
    of all by rank 0, marks the store complete and takes the checksums over.

    Args:
        verb: the command that makes it, to be named in errors.
        settings: what must be the same for a stopped job to be continued.
        shards: how many there will be; None if that is known only at the end.
        needed_bytes: size of the finished shards, so that a job which the disk cannot hold is not begun.
        max_skipped: share of the images that may be unusable.
        ranks: which of how many processes this is; by default the only one.

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
        ranks: Ranks | None = None,
    ) -> None:
        if not 0 <= max_skipped <= 1:
            raise UserError(f"--max-skipped is a share of the images, between 0 and 1, not {max_skipped}")
        self.out, self.shards, self.max_skipped, self.ranks = out, shards, max_skipped, ranks or Ranks()
        settings = {"verb": verb, **settings}
        if self.ranks.rank == 0:
            self._claim(settings, needed_bytes)
        else:
            self.ranks.wait(out, lambda: (out / JOB).exists() or self.is_complete, lambda: f"rank 0 to begin {out}")
            if not self.is_complete:
                self._compare(settings)

    @property
    def is_complete(self) -> bool:
        """Whether meta.json is there."""
        return (self.out / META).exists()

    def _claim(self, settings: dict[str, object], needed: int) -> None:
        begun = (self.out / JOB).exists()
        if self.is_complete and begun:  # killed while it cleared up
            self._compare(settings)
            self._clear()
            return
        if self.is_complete:
            raise UserError(f"{self.out} is a finished token store already: choose another --out or remove it")
        if begun:
            self._compare(settings)
        elif is_nonempty(self.out):
            raise UserError(f"{self.out} exists already and is not a token store: choose another --out")
        self._check_space(needed)
        if not begun:
            write_json(self.out / JOB, settings)

    def _check_space(self, needed: int) -> None:
        there = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.is_dir())
        missing = needed - sum(path.stat().st_size for path in self.out.glob("*.npy"))
        free = shutil.disk_usage(there).free
        if missing > free:
            raise UserError(
                f"{self.out} needs {missing / 1e9:.3f} GB more, its disk has {free / 1e9:.3f} GB free: make room and give "
                "the same command, or choose an --out on another disk"
            )

    def _compare(self, settings: dict[str, object]) -> None:
        begun = read_json(self.out / JOB, "an unfinished token store")
        for key, value in settings.items():
            if begun.get(key) != value:
                raise UserError(
                    f"{self.out} holds an unfinished store of other {key} ({begun.get(key)}, now {value}): "
                    "give the same settings to finish it, or choose another --out"
                )

    def is_finished(self, index: int) -> bool:
        """Whether a shard is there."""
        return self._sums_path(index).exists() and (self.out / shard_names(index, self.shards)[1]).exists()

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
        """Stop the job if the finished shards and `fresh` have more unusable images than may be of `images`.

        The list of them is left in skipped.jsonl.
        """
        skipped = sorted(self._skipped() + fresh)
        if len(skipped) <= self.max_skipped * images + 1e-9:
            return
        _write_lines(self.out / SKIPPED, skipped)
        first = skipped[0]
        raise UserError(
            f"{len(skipped)} of {images} images cannot be used, more than --max-skipped {self.max_skipped}; the first is "
            f"{first.name}: {first.reason}; {self.out / SKIPPED} lists them. Mend them or raise --max-skipped, then give "
            "the same command to go on: finished shards are kept"
        )

    def beat(self) -> None:
        """Show the other ranks that this one is alive; call it often."""
        self.ranks.beat(self.out)

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
    ) -> TokenStore:
        """Wait for all `shards`, then (rank 0) write meta.json; the finished store.

        Args:
            names: the classes' names; empty if classes are numbered up to the largest label.
        """
        if self.ranks.rank > 0:
            self.ranks.wait(self.out, lambda: self.is_complete, lambda: f"rank 0 to finish {self.out}")
            return TokenStore(self.out)
        self.ranks.wait(
            self.out, lambda: not self._missing(shards), lambda: f"shards {self._missing(shards)} of {self.out}"
        )
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
        ).write(self.out)
        self._clear()
        return TokenStore(self.out)

    def _clear(self) -> None:
        """Remove what only an unfinished store has; its job.json last."""
        for path in (*self.out.glob("skipped-*.jsonl"), *self.out.glob("sums-*.json")):
            path.unlink()
        self.ranks.clear(self.out)
        (self.out / JOB).unlink()

    def _missing(self, shards: int) -> list[int]:
        return [index for index in range(shards) if not self.is_finished(index)]

    def _sums(self, index: int) -> dict[str, str]:
        """The checksums of a shard's files."""
        codes, labels = shard_names(index, self.shards)
        return {"codes_sha256": sha256(self.out / codes), "labels_sha256": sha256(self.out / labels)}

    def _sums_path(self, index: int) -> Path:
        return self.out / shard_names(index, self.shards)[0].replace("codes", "sums").replace(".npy", ".json")

    def _skipped_path(self, index: int) -> Path:
        return self.out / shard_names(index, self.shards)[0].replace("codes", "skipped").replace(".npy", ".jsonl")

    def _skipped(self) -> list[Skipped]:
        """The unusable images of all finished shards, this rank's and the others'."""
        try:
            lines = [line for path in self.out.glob("skipped-*.jsonl") for line in _lines_of(path)]
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
