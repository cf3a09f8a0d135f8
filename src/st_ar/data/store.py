"""The token store: a folder of images' codes (docs/formats.md), and training batches from it."""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.source import POSITIONS
from st_ar.distributed import Ranks
from st_ar.errors import UserError, damaged, note
from st_ar.files import open_array, read_json, sha256, write_json
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.settings import Checked, from_dict

FORMAT_VERSION = 1
OPEN = 256
"""Shards that are mapped at once. Each takes a file descriptor; the limit of a process is often 1,024."""
META, JOB, SKIPPED = "meta.json", "job.json", "skipped.jsonl"


def shard_names(index: int, shards: int | None) -> tuple[str, str]:
    """File names of a shard's codes and labels; `shards` is None if their number is unknown while writing."""
    suffix = f"{index:05d}.npy" if shards is None else f"{index:05d}-of-{shards:05d}.npy"
    return f"codes-{suffix}", f"labels-{suffix}"


@dataclass(frozen=True, kw_only=True)
class StoreMeta(Checked, prefix=""):
    """The content of meta.json."""

    source: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    grid: int
    """Tokens per side."""
    crops: list[str]
    class_names: list[str]
    images: int
    shards: list[dict[str, str | int]]
    """{images, codes, labels, codes_sha256, labels_sha256} of each shard."""
    skipped: int = 0
    """Unusable images of the source; skipped.jsonl lists them."""
    notes: list[str] = field(default_factory=list)
    """Notes about the source, as printed when it was opened."""
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write meta.json, which completes the store."""
        write_json(folder / META, {name: value for name, value in asdict(self).items() if name != "notes" or value})


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two lists of class names agree. Names 0, 1, .. mean that the names are unknown: they agree with any that are not numbers."""
    lists = [[unicodedata.normalize("NFC", name) for name in names] for names in (ours, theirs)]
    if lists[0] == lists[1] or len(ours) != len(theirs):
        return lists[0] == lists[1]
    numbered = [all(name.isdecimal() for name in names) for names in lists]
    return not all(numbered) and [str(index) for index in range(len(ours))] in lists


def difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """The first difference between two lists of class names."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"class {index} is {a!r} and {b!r}"
    return "one list has more names"


def note_same_images(train: "TokenStore", test: "TokenStore") -> None:
    """Print a note if the test store holds the training images."""
    same_source = (train.meta.source, train.meta.images) == (test.meta.source, test.meta.images)
    if train.fingerprint == test.fingerprint or same_source:
        note(f"{test.folder} has the images of {train.folder}: results on it are results on training images")


class TokenStore:
    """A token store opened for reading. Shards are memory-mapped when they are read.

    Opening checks that every shard exists with the shape and type in meta.json; `verify` also checks the content.

    Raises:
        UserError: not a store, another format version, or a missing or truncated shard.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a token store: no such folder; `st-ar tokenize` makes one")
        if not (self.folder / META).exists() and (self.folder / JOB).exists():
            verb = read_json(self.folder / JOB, "an unfinished token store").get("verb", "tokenize")
            raise UserError(f"{folder} is an unfinished token store: run the same `st-ar {verb}` again to finish it")
        saved = read_json(self.folder / META, "a token store")
        version = saved.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{self.folder / META} has format version {version}; this st-ar reads {FORMAT_VERSION}")
        try:
            self.meta = from_dict(StoreMeta, saved, META)
        except UserError as error:
            raise damaged(self.folder / META, error, "tokenize again") from error
        self._check_shards()
        sizes = [len(self._map(shard, "codes")) for shard in self.meta.shards]
        labels = [np.array(self._map(shard, "labels")) for shard in self.meta.shards]
        self.labels = np.concatenate(labels).astype(np.int64) if labels else np.zeros(0, np.int64)
        if len(self.labels) != self.meta.images or self.meta.images < 1:
            raise UserError(
                f"{self.folder} has {len(self.labels)} images, but its meta.json says {self.meta.images}; tokenize again"
            )
        classes = len(self.meta.class_names)
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise UserError(
                f"{self.folder} has labels {self.labels.min()} to {self.labels.max()}, but its meta.json names "
                f"{classes} classes; tokenize again"
            )
        self._starts = np.cumsum([0, *sizes])
        self._codes = lru_cache(maxsize=OPEN)(lambda shard: self._map(self.meta.shards[shard], "codes"))

    def _check_shards(self) -> None:
        """Refuse incomplete entries, and file names that do not belong to the entry's index."""
        types = {"images": int, **dict.fromkeys(("codes", "labels", "codes_sha256", "labels_sha256"), str)}
        for index, shard in enumerate(self.meta.shards):
            names = [shard_names(index, count) for count in (len(self.meta.shards), None)]
            complete = {key: type(value) for key, value in shard.items()} == types
            if not complete or (shard["codes"], shard["labels"]) not in names:
                raise damaged(self.folder / META, f"its entry {index} is not of that shard", "tokenize again")

    @cached_property
    def empty_classes(self) -> list[int]:
        """The classes without images."""
        return sorted(set(range(len(self.meta.class_names))) - set(np.unique(self.labels).tolist()))

    def _map(self, shard: dict[str, str | int], what: str) -> np.ndarray:
        path = self.folder / str(shard[what])
        shape, dtype = (shard["images"],), np.int32
        if what == "codes":
            shape, dtype = (shard["images"], len(self.meta.crops), self.meta.grid**2), np.uint16
        try:
            array = open_array(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing from the token store; tokenize again into a new folder") from None
        except ValueError as error:
            raise UserError(f"{path} is truncated or damaged ({error}); tokenize again into a new folder") from error
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path} is {array.dtype} {list(array.shape)}, but meta.json says {np.dtype(dtype)} {list(shape)}: "
                "tokenize again into a new folder"
            )
        return array

    def __len__(self) -> int:
        """Number of images."""
        return self.meta.images

    def codes(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Codes uint16 [n, M, T] of the crops [n, M] of the images [n]."""
        shards = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[shards]
        out = np.empty((*crops.shape, self.meta.grid**2), np.uint16)
        for shard in np.unique(shards):
            selected = shards == shard
            out[selected] = self._codes(int(shard))[rows[selected][:, None], crops[selected]]
        return out

    @property
    def center(self) -> int:
        """Index of the centre crop, which evaluation reads; 0 if no crop has that name."""
        return self.meta.crops.index(POSITIONS[-1]) if POSITIONS[-1] in self.meta.crops else 0

    def center_codes(self, images: np.ndarray) -> np.ndarray:
        """Codes uint16 [n, T] of the centre crops of the images [n]."""
        return self.codes(images, np.full((len(images), 1), self.center))[:, 0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' checksums."""
        sums = [str(shard[key]) for shard in self.meta.shards for key in ("codes_sha256", "labels_sha256")]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """What a run records about its token store."""
        source = {"source": self.meta.source, "tokenizer": self.meta.tokenizer, "images": len(self)}
        return {**source, "crops": self.meta.crops, "fingerprint": self.fingerprint}

    def check_classes(self, names: Sequence[str], whose: object) -> None:
        """Refuse a store with other class names than those of `whose`."""
        ours = self.meta.class_names
        if not same_names(names, ours):
            raise UserError(
                f"{self.folder} and {whose} have different class names ({difference(names, ours)}): give stores of one data set"
            )

    def verify(self) -> None:
        """Check every shard's checksum, and its codes against the vocabulary size."""
        for shard in self.meta.shards:
            for what in ("codes", "labels"):
                path = self.folder / str(shard[what])
                if sha256(path) != shard[f"{what}_sha256"]:
                    raise damaged(path, "its content does not match the checksum in meta.json", "tokenize again")
        highest = max(int(codes.max()) for shard in self.meta.shards if (codes := self._map(shard, "codes")).size)
        if highest >= self.meta.vocab_size:
            raise UserError(
                f"{self.folder} has codes up to {highest}, but its meta.json says vocab_size {self.meta.vocab_size}; tokenize again"
            )

    def check_model(self, config: ModelConfig, tokenizer: str | None = None) -> None:
        """Refuse a model of another codebook, grid, number of classes (if it is a class model) or tokenizer (if given)."""
        must_agree = [
            ("tokens in the codebook", "vocab-size", self.meta.vocab_size, config.vocab_size),
            ("tokens a side", "grid", self.meta.grid, config.grid),
        ]
        if config.condition == "class":
            must_agree.append(("classes", "num-classes", len(self.meta.class_names), config.num_classes))
        for name, flag, ours, model in must_agree:
            if ours != model:
                raise UserError(
                    f"{self.folder} has {ours} {name}, the model {model}: train with --model.{flag} {ours}, "
                    "or use the store that the model was made for"
                )
        if tokenizer and tokenizer != self.meta.tokenizer:
            raise UserError(
                f"{self.folder} was made by tokenizer {self.meta.tokenizer[:12]}, the model uses the codes of "
                f"{tokenizer[:12]}: tokenize the images with the model's tokenizer"
            )


class TokenBatches:
    """Batches of M different crops of B images. Every image occurs once an epoch, in a new random order.

    Epochs follow one another without a gap, so a batch may span two of them.

    Args:
        batch_size: images of a step over all ranks; each rank gets an equal part.
        conditions: maps images [B] to a text model's labels [B, ..]; None gives classes.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        views: int,
        seed: int,
        conditions: Callable[[np.ndarray], Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        crops = len(store.meta.crops)
        if views > crops:
            raise UserError(
                f"--views {views} asks for different crops of an image, {store.folder} has {crops} of each: "
                "tokenize with --crops ten, or train with fewer views"
            )
        self.store, self.batch_size, self.views, self.seed = store, batch_size, views, seed
        self.conditions = conditions or (lambda images: torch.from_numpy(store.labels[images]))
        self.share = (ranks or Ranks()).share(batch_size)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, RandomStream.ORDER, epoch).permutation(len(self.store))

    def images(self, step: int) -> np.ndarray:
        """Indices [B] of a step's images on all ranks."""
        epochs, offsets = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), len(self.store))
        images = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            images[selected] = self._order(int(epoch))[offsets[selected]]
        return images

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The tokens int64 [B / ranks, M, T] of this rank at a step, with classes int64 [B / ranks] or captions
        [B / ranks, N, width].
        """
        images = self.images(step)[self.share]
        rng = numpy_generator(self.seed, RandomStream.CROPS, step)
        crops = rng.random((self.batch_size, len(self.store.meta.crops))).argsort(axis=1)[:, : self.views]
        codes = self.store.codes(images, crops[self.share]).astype(np.int64)
        return torch.from_numpy(codes), self.conditions(images)
