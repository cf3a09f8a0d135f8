"""Writing a token store shard by shard, on one or several ranks."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from st_ar.data.skipped import Skipped, require_share, too_many
from st_ar.data.store import JOB, META, SKIPPED, StoreMeta, TokenStore, shard_names
from st_ar.distributed import barrier, broadcast_from_rank0
from st_ar.errors import UserError, cause
from st_ar.files import claim, open_array, parse_json, save_array, sha256, write_json, write_json_lines


class TokenStoreWriter:
    """Writes a token store (docs/formats.md).

    The checksums of a shard are written last and mark it as finished. A finished shard is rewritten only if a skipped image of it
    can be used now. Rank 0 writes meta.json last, which completes the store.

    Args:
        command: the command that writes the store, for error messages.
        settings: settings that must not change when a stopped job continues.
        shards: number of shards; None if unknown before the end.
        needed_bytes: size of the shards, to refuse a disk that is too small.
        max_skipped: largest share of unusable images.
    """

    def __init__(
        self,
        out: Path,
        *,
        command: str,
        settings: dict[str, object],
        shards: int | None,
        needed_bytes: int = 0,
        max_skipped: float = 0.01,
    ) -> None:
        require_share(max_skipped)
        self.out, self.shards, self.max_skipped = out, shards, max_skipped
        broadcast_from_rank0(lambda: self._claim({"verb": command, **settings}, needed_bytes))

    @property
    def is_complete(self) -> bool:
        """Whether meta.json exists."""
        return (self.out / META).exists()

    def _claim(self, settings: dict[str, object], needed: int) -> None:
        job = self.out / JOB
        if self.is_complete and not job.exists():
            raise UserError(f"{self.out} is a finished token store already: choose another --out or remove it")
        if not self.is_complete:
            self._check_space(needed)
        claim(job, settings, "a token store")
        if self.is_complete:  # an earlier job was killed while it removed its temporary files
            self._remove_job_files()

    def _check_space(self, needed: int) -> None:
        folder = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.is_dir())
        missing = needed - sum(path.stat().st_size for path in self.out.glob("*.npy"))
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise UserError(
                f"{self.out} needs {missing / 1e9:.3f} GB more, but its disk has {free / 1e9:.3f} GB free: free some space and "
                "give the same command, or choose an --out on another disk"
            )

    def is_finished(self, index: int) -> bool:
        """Whether a shard was written completely."""
        return self._sums_path(index).is_file() and self._path("labels", index).exists()

    def reopen_mended(self, index: int, usable: Callable[[int], bool]) -> None:
        """Reopen a finished shard if an image that it skipped is usable now. `usable` takes the image's index."""
        path = self._path("skipped", index, ".jsonl")
        if self.is_finished(index) and path.exists() and any(usable(each.index) for each in self._skipped([path])):
            self._sums_path(index).unlink()
            path.unlink()

    def write(self, index: int, codes: np.ndarray, labels: np.ndarray, skipped: list[Skipped]) -> None:
        """Write a shard: codes uint16 [n, crops, T], labels int32 [n], and the images left out."""
        save_array(self._path("codes", index), codes)
        _write_lines(self._path("skipped", index, ".jsonl"), skipped)
        save_array(self._path("labels", index), labels)
        write_json(self._sums_path(index), self._sums(index))

    def check_skipped(self, new: list[Skipped], images: int) -> None:
        """Stop the job if too many of the first `images` images are unusable: those of finished shards and `new`.

        The list stays in skipped.jsonl.
        """
        skipped = sorted(image for image in self._skipped() + new if image.index < images)
        if why := too_many(skipped, images, self.max_skipped):
            _write_lines(self.out / SKIPPED, skipped)
            raise UserError(
                f"{why}; {self.out / SKIPPED} lists them. Repair them or raise --max-skipped, then give the same command to "
                "continue: finished shards are kept"
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
        """Wait for all ranks, let rank 0 write meta.json, and return the finished store.

        Args:
            names: names of the classes; empty if they are numbered up to the largest label.
            notes: notes about the source.
        """

        def write() -> None:
            skipped = sorted(self._skipped())
            entries: list[dict[str, str | int]] = []
            classes = 0
            for index in range(shards):
                codes_name, labels_name = shard_names(index, self.shards)
                labels, sums = self._verify(index)
                classes = max(classes, int(labels.max(initial=-1)) + 1)
                entries.append({"images": len(labels), "codes": codes_name, "labels": labels_name, **sums})
            images = sum(int(entry["images"]) for entry in entries)
            self.check_skipped([], images + len(skipped))
            _write_lines(self.out / SKIPPED, skipped)
            if not images:
                raise UserError(
                    f"{source} has no usable image; {self.out / SKIPPED} gives the reasons: repair them, and choose another "
                    "--out or remove this one"
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
            self._remove_job_files()

        barrier()
        broadcast_from_rank0(write)
        return TokenStore(self.out)

    def _remove_job_files(self) -> None:
        """Remove the files of an unfinished store, job.json last."""
        for path in (*self.out.glob("skipped-*.jsonl"), *self.out.glob("sums-*.json")):
            path.unlink()
        (self.out / JOB).unlink()

    def _sums(self, index: int) -> dict[str, str]:
        """The checksums of a shard's files."""
        return {f"{kind}_sha256": sha256(self._path(kind, index)) for kind in ("codes", "labels")}

    def _path(self, kind: str, index: int, suffix: str = ".npy") -> Path:
        return self.out / shard_names(index, self.shards)[0].replace("codes", kind).replace(".npy", suffix)

    def _sums_path(self, index: int) -> Path:
        return self._path("sums", index, ".json")

    def _skipped(self, paths: Iterable[Path] | None = None) -> list[Skipped]:
        """The unusable images in these lists. The default are those of all finished shards of all ranks."""
        try:
            paths = paths or self.out.glob("skipped-*.jsonl")
            texts = [path.read_bytes().decode(errors="replace") for path in paths]
            return [Skipped(**parse_json(line)) for text in texts for line in text.splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.out} has a damaged list of skipped images ({cause(error)}): remove that skipped-*.jsonl file and the "
                "labels-*.npy with its number, and give the same command"
            ) from error

    def _verify(self, index: int) -> tuple[np.ndarray, dict[str, str]]:
        """Return the labels of a finished shard and its files' checksums; refuses a damaged one."""
        path = self._path("labels", index)
        try:
            labels, length = open_array(path), len(open_array(self._path("codes", index)))
            if labels.shape != (length,) or labels.dtype != np.int32:
                raise ValueError(f"{labels.dtype} {list(labels.shape)} for the codes of {length} images")
            sums = self._sums(index)
            if sums != parse_json(self._sums_path(index).read_text(encoding="utf-8")):
                raise ValueError(f"they do not match {self._sums_path(index).name}")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} or its codes are damaged ({cause(error)}): remove it and give the same command to write its shard again"
            ) from error
        return labels, sums


def _write_lines(path: Path, skipped: list[Skipped]) -> None:
    """Write the list; remove an old one if there is nothing to list."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    write_json_lines(path, map(asdict, skipped))
