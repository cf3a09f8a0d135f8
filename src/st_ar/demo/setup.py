"""What the page has to work with: weights, a tokenizer, stores of images and runs; given, or the quickstart's."""

import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.demo.inputs import cut_upload, decode_upload
from st_ar.demo.models import ModelPool
from st_ar.demo.reading import Guesser, Guesses, Reading, Readings
from st_ar.errors import UserError
from st_ar.evaluation.attention import center_crops
from st_ar.model.weights import call_models
from st_ar.quickstart import METHODS
from st_ar.tokenizer import decode_to_images, to_pixels
from st_ar.training.run import trained_config


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An image that the models can read."""

    title: str
    tokens: Tensor
    """int64 [T]."""
    label: int | None
    """Its class, if it is known."""
    picture: np.ndarray
    """uint8 [S, S, 3], as the tokenizer paints it."""


@dataclass(kw_only=True)
class Setup:
    """All of it, shared by every visitor of the page."""

    shelf: ModelPool
    store: TokenStore | None = None
    """Images to look at."""
    probe_store: TokenStore | None = None
    """Images with classes, to fit quick probes on."""
    probe_images: int = 4000
    """At most, for each."""
    runs: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """To follow, by name."""
    readings: Readings = field(default_factory=Readings)
    guessers: dict[str, Guesser] = field(default_factory=dict[str, Guesser])

    def __post_init__(self) -> None:
        for store in (self.store, self.probe_store):
            if store is not None:
                for name, weights in self.shelf.weights.items():
                    store.check_model(
                        weights.config, self.shelf.tokenizer.fingerprint if store.meta.tokenizer else None
                    )
                    store.check_classes(weights.class_names, name)

    def from_store(self, image: int) -> Seen:
        """An image of the store, centre crop."""
        if self.store is None:
            raise UserError("the page has no token store: start it with --tokens STORE")
        if not 0 <= image < len(self.store):
            raise UserError(f"{self.store.folder} has images 0 to {len(self.store) - 1}, and no {image}")
        tokens, labels = center_crops(self.store, [image])
        label = int(labels[0])
        name = self.store.meta.class_names[label]
        return self.shelf.run(lambda: self._seen(f"image {image} of the store: {name}", tokens[0], label))

    def from_upload(self, data: bytes, weights_name: str) -> Seen:
        """An uploaded image, its centre cut, resized and tokenized to the grid of some weights."""
        grid = self.shelf.find(weights_name).config.grid
        image = decode_upload(data)
        return self.shelf.run(lambda: self._tokenized(cut_upload(image, grid * self.shelf.tokenizer.patch), grid))

    def _tokenized(self, pixels: np.ndarray, grid: int) -> Seen:
        codes = self.shelf.tokenizer.encode(to_pixels(torch.from_numpy(pixels.copy())[None])).cpu()
        assert codes.shape == (1, grid, grid)
        return self._seen("the uploaded image, as the tokenizer has it", codes.flatten(), None)

    def _seen(self, title: str, tokens: Tensor, label: int | None) -> Seen:
        return Seen(
            title=title, tokens=tokens, label=label, picture=decode_to_images(self.shelf.tokenizer, tokens[None])[0]
        )

    def read(self, name: str, seen: Seen, label: int) -> Reading:
        """What some weights do as they read an image of that class."""
        self.shelf.find(name)
        return self.shelf.run(lambda: self.readings.read(self.shelf.open(name), seen.tokens, label))

    def guess(self, name: str, seen: Seen) -> Generator[Guesses, None, None]:
        """What the quick probe of some weights takes an image for; first how far it is fitted.

        Raises:
            UserError: no store to fit one on, or as `Guesser`.
        """
        self.shelf.find(name)
        return self.shelf.each(self._guess(name, seen))

    def _guess(self, name: str, seen: Seen) -> Generator[Guesses, None, None]:
        if self.probe_store is None:
            raise UserError("the page has no images to fit a probe on: start it with --probe-tokens STORE")
        opened = self.shelf.open(name)
        if len(seen.tokens) != opened.weights.config.sequence_length:
            raise UserError(
                f"{name} reads {opened.weights.config.sequence_length} tokens, the image has {len(seen.tokens)}"
            )
        guesser = self.guessers.get(name) or Guesser(opened, self.probe_store, self.probe_images)
        yield from guesser.guess(seen.tokens)
        self.guessers[name] = guesser  # a fit that was left is begun anew


def quickstart_setup(folder: Path, *, device: str, dtype: str, probe_images: int) -> Setup:
    """The quickstart's models, stores and runs, which are made first if the folder has no finished quickstart.

    Raises:
        UserError: the folder holds something else.
    """
    if not (folder / "summary.json").exists():
        from st_ar.quickstart import quickstart

        print(f"{folder} holds no finished quickstart: making it, which takes some minutes once", file=sys.stderr)
        quickstart(folder)
    runs = {name: folder / METHODS[name][0] for name in ("AR", "ST-AR")}
    return Setup(
        shelf=ModelPool(list(runs.values()), folder / "tokenizer", names=list(runs), device=device, dtype=dtype),
        store=open_store(folder / "tokens-test"),
        probe_store=open_store(folder / "tokens-train"),
        probe_images=probe_images,
        runs=runs,
    )


def open_store(folder: Path) -> TokenStore:
    """A token store whose every checksum agrees."""
    store = TokenStore(folder)
    store.verify()
    return store


def find_runs(models: Sequence[Path], runs: Sequence[Path]) -> dict[str, Path]:
    """The runs among some models, and others, by their names.

    Raises:
        UserError: one of `runs` is none, or two are called alike.
    """
    for run in runs:
        trained_config(run)
    found = [path for path in models if (path / "log.jsonl").exists()]
    found += [run for run in runs if run.resolve() not in {path.resolve() for path in found}]
    return dict(zip(call_models(found, ()), found, strict=True)) if found else {}
