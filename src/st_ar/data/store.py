"""The token store: images' codes on disk, in a folder that says what it is (docs/formats.md)."""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.source import PLACES
from st_ar.distributed import Ranks
from st_ar.errors import UserError, damaged, note
from st_ar.files import open_array, read_json, sha256, write_json
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.settings import Checked, from_dict

FORMAT_VERSION = 1
SHARD_KEYS = ("images", "codes", "labels", "codes_sha256", "labels_sha256")
OPEN = 256
"""Shards that are mapped at once: each takes a file descriptor, and a process is often given 1,024."""
META, JOB, SKIPPED = "meta.json", "job.json", "skipped.jsonl"


def shard_names(index: int, shards: int | None) -> tuple[str, str]:
    """File names of a shard's codes and labels; `shards` is None if their number was not known when they were written."""
    which = f"{index:05d}.npy" if shards is None else f"{index:05d}-of-{shards:05d}.npy"
    return f"codes-{which}", f"labels-{which}"


@dataclass(frozen=True, kw_only=True)
class StoreMeta(Checked, prefix=""):
    """What meta.json says."""

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
    """One {images, codes, labels, codes_sha256, labels_sha256} for each shard."""
    skipped: int = 0
    """Images of the source that could not be used; skipped.jsonl lists them."""
    notes: list[str] = field(default_factory=list)
    """What was noted about the source when it was read."""
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write meta.json: from then on the folder is a complete store."""
        write_json(folder / META, asdict(self))


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two lists of class names agree. The numbers from 0, which stand for missing names, agree with any real names."""
    lists = [[unicodedata.normalize("NFC", name) for name in names] for names in (ours, theirs)]
    if lists[0] == lists[1] or len(ours) != len(theirs):
        return lists[0] == lists[1]
    numbered = [all(name.isdecimal() for name in names) for names in lists]
    return not all(numbered) and [str(index) for index in range(len(ours))] in lists


def difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Where two lists of class names first differ."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"class {index} is {a!r} and {b!r}"
    return "the first of which have the same names"


def note_same_images(train: "TokenStore", test: "TokenStore") -> None:
    """Note that images are tested on which were trained on."""
    same_source = (train.meta.source, train.meta.images) == (test.meta.source, test.meta.images)
    if train.fingerprint == test.fingerprint or same_source:
        note(
            f"{test.folder} has the images of {train.folder}: what is measured on it is measured on the training images"
        )


class TokenStore:
    """A store opened for reading; its shards are memory-mapped when they are read, some of them at a time.

    Opening checks that every shard is there with the shape and type that meta.json promises; `verify` also its content.

    Raises:
        UserError: not a store, another format version, or a shard that is missing or cut short.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"{folder} is no token store: no such folder; `st-ar tokenize` makes one")
        if not (self.folder / META).exists() and (self.folder / JOB).exists():
            verb = read_json(self.folder / JOB, "an unfinished token store").get("verb", "tokenize")
            raise UserError(f"{folder} is an unfinished token store: run the same `st-ar {verb}` again to finish it")
        saved = read_json(self.folder / META, "a token store")
        if saved.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{self.folder / META} has format version {saved.get('format_version')}; this st-ar reads {FORMAT_VERSION}"
            )
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
                f"{self.folder} holds {len(self.labels)} images, its meta.json says {self.meta.images}; tokenize again"
            )
        classes = len(self.meta.class_names)
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise UserError(
                f"{self.folder} has labels {self.labels.min()} to {self.labels.max()}, its meta.json names "
                f"{classes} classes; tokenize again"
            )
        self._starts = np.cumsum([0, *sizes])
        self._codes = lru_cache(maxsize=OPEN)(lambda shard: self._map(self.meta.shards[shard], "codes"))

    def _check_shards(self) -> None:
        """The entries of the shards must be whole, and name the files that are theirs by their order."""
        shards = self.meta.shards
        for index, shard in enumerate(shards):
            names = [shard_names(index, number) for number in (len(shards), None)]
            types = {key: int if key == "images" else str for key in SHARD_KEYS}
            if {key: type(value) for key, value in shard.items()} != types or (
                shard["codes"],
                shard["labels"],
            ) not in names:
                raise damaged(self.folder / META, f"its entry of shard {index} is not of that shard", "tokenize again")

    def _map(self, shard: dict[str, str | int], what: str) -> np.ndarray:
        path = self.folder / str(shard[what])
        tokens = self.meta.grid**2
        shape, dtype = {
            "codes": ((shard["images"], len(self.meta.crops), tokens), np.uint16),
            "labels": ((shard["images"],), np.int32),
        }[what]
        try:
            array = open_array(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing from the token store; tokenize again into a new folder") from None
        except ValueError as error:
            raise UserError(f"{path} is truncated or damaged ({error}); tokenize again into a new folder") from error
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path} holds {array.dtype} {list(array.shape)}, meta.json promises {np.dtype(dtype)} {list(shape)}"
            )
        return array

    def __len__(self) -> int:
        """Number of images."""
        return self.meta.images

    def codes(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Codes uint16 [n, M, T] of chosen crops [n, M] of chosen images [n]."""
        shards = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[shards]
        out = np.empty((*crops.shape, self.meta.grid**2), np.uint16)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._codes(int(shard))[rows[here][:, None], crops[here]]
        return out

    @property
    def center(self) -> int:
        """Which of the crops is the centre, not mirrored: what evaluation reads. The first where none is called so."""
        return next((i for i, name in enumerate(self.meta.crops) if name == PLACES[-1]), 0)

    def center_codes(self, images: np.ndarray) -> np.ndarray:
        """Codes uint16 [n, T] of the centre crops of chosen images [n]."""
        return self.codes(images, np.full((len(images), 1), self.center))[:, 0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shards' checksums: equal for stores with the same content."""
        sums = [str(shard[key]) for shard in self.meta.shards for key in ("codes_sha256", "labels_sha256")]
        return hashlib.sha256(" ".join(sums).encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """What a run records of the store that it was trained on."""
        meta = self.meta
        return {
            "source": meta.source,
            "tokenizer": meta.tokenizer,
            "images": len(self),
            "crops": meta.crops,
            "fingerprint": self.fingerprint,
        }

    def check_classes(self, names: Sequence[str], whose: object) -> None:
        """Refuse a store whose classes have other names than `whose` have; UserError with the first that differs."""
        ours = self.meta.class_names
        if not same_names(names, ours):
            raise UserError(
                f"{self.folder} names its classes otherwise than {whose} ({difference(names, ours)}): give stores of one data set"
            )

    def verify(self) -> None:
        """Compare every shard with its checksum, and its codes with the size of the codebook; names the one that differs."""
        for shard in self.meta.shards:
            for what in ("codes", "labels"):
                path = self.folder / str(shard[what])
                if sha256(path) != shard[f"{what}_sha256"]:
                    raise damaged(path, "its content does not match the checksum in meta.json", "tokenize again")
        highest = max(int(codes.max()) for shard in self.meta.shards if (codes := self._map(shard, "codes")).size)
        if highest >= self.meta.vocab_size:
            raise UserError(
                f"{self.folder} has codes up to {highest}, its meta.json says that there are {self.meta.vocab_size}; tokenize again"
            )

    def check_model(self, config: ModelConfig, tokenizer: str | None = None) -> None:
        """Refuse a model whose codebook, grid, classes (of a class model) or (if given) tokenizer are not the store's."""
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
                f"{self.folder} was made by tokenizer {self.meta.tokenizer[:12]}, the model speaks the codes of "
                f"{tokenizer[:12]}: tokenize the images with the model's tokenizer"
            )


class TokenBatches:
    """M different crops of each of B images a step, every image once an epoch, in an order drawn for each epoch.

    Epochs follow one another without a gap: a batch may hold the end of one and the beginning of the next.

    batch_size: images of a step, over all ranks; this rank gets its share of them.
    conditions: gives images [B] a text model's labels [B, ..]; their classes if None.
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
        self.mine = (ranks or Ranks()).share(batch_size)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return numpy_generator(self.seed, RandomStream.ORDER, epoch).permutation(len(self.store))

    def images(self, step: int) -> np.ndarray:
        """Indices [B] of the images of step `step`, all ranks'."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, within = np.divmod(places, len(self.store))
        images = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            images[here] = self._order(int(epoch))[within[here]]
        return images

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """What is this rank's of step `step`: tokens int64 [B / ranks, M, T], and labels, classes int64 [B / ranks] or
        captions [B / ranks, N, width].
        """
        images = self.images(step)[self.mine]
        rng = numpy_generator(self.seed, RandomStream.CROPS, step)
        crops = rng.random((self.batch_size, len(self.store.meta.crops))).argsort(axis=1)[:, : self.views]
        codes = self.store.codes(images, crops[self.mine]).astype(np.int64)
        return torch.from_numpy(codes), self.conditions(images)
