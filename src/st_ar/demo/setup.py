"""What the demo works with: models, a tokenizer, token stores and runs, given by the user or from the quickstart."""

import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.demo.inputs import crop_upload, decode_upload
from st_ar.demo.models import ModelPool
from st_ar.demo.reading import ClassProbe, Prediction, Reading, read_tokens
from st_ar.errors import UserError
from st_ar.evaluation.attention import center_crops
from st_ar.model.weights import name_models
from st_ar.quickstart import METHODS
from st_ar.tokenizer import decode_to_images, to_pixels
from st_ar.training.run import trained_config

CACHED_READINGS = 4
"""Forward passes kept in memory, so that clicks on one image are answered at once."""


@dataclass(frozen=True, kw_only=True)
class DemoImage:
    """An image that the models can read."""

    title: str
    tokens: Tensor
    """int64 [T]."""
    label: int | None
    """Its class, if known."""
    pixels: np.ndarray
    """uint8 [S, S, 3], decoded from the tokens."""


@dataclass(kw_only=True)
class Setup:
    """Everything that the visitors share."""

    pool: ModelPool
    store: TokenStore | None = None
    """Images to inspect."""
    probe_store: TokenStore | None = None
    """Images with classes to fit probes on."""
    probe_images: int = 4000
    """Largest number of images to fit a probe on."""
    runs: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Runs to follow, by name."""
    probes: dict[str, ClassProbe] = field(default_factory=dict[str, ClassProbe])

    def __post_init__(self) -> None:
        self.read_cached = lru_cache(CACHED_READINGS)(self._read)
        for store in filter(None, (self.store, self.probe_store)):
            for name, weights in self.pool.weights.items():
                store.check_model(weights.config, self.pool.tokenizer.fingerprint if store.meta.tokenizer else None)
                store.check_classes(weights.class_names, name)

    def from_store(self, index: int) -> DemoImage:
        """Return the centre crop of an image of the store."""
        if self.store is None:
            raise UserError("the demo has no token store: start it with --tokens STORE")
        if not 0 <= index < len(self.store):
            raise UserError(f"{self.store.folder} has no image {index}: choose 0 to {len(self.store) - 1}")
        tokens, labels = center_crops(self.store, [index])
        label = int(labels[0])
        title = f"image {index} of the store: {self.store.meta.class_names[label]}"
        return self.pool.run(lambda: self._decode(title, tokens[0], label))

    def from_upload(self, data: bytes, weights_name: str) -> DemoImage:
        """Return an uploaded image, cropped and tokenized for some weights."""
        grid = self.pool.find(weights_name).config.grid
        pixels = torch.from_numpy(crop_upload(decode_upload(data), grid * self.pool.tokenizer.patch).copy())

        def tokenize() -> DemoImage:
            codes = self.pool.tokenizer.encode(to_pixels(pixels[None])).flatten().cpu()
            return self._decode("the uploaded image after tokenization, whose class is unknown", codes, None)

        return self.pool.run(tokenize)

    def _decode(self, title: str, tokens: Tensor, label: int | None) -> DemoImage:
        pixels = decode_to_images(self.pool.tokenizer, tokens[None])[0]
        return DemoImage(title=title, tokens=tokens, label=label, pixels=pixels)

    def read(self, name: str, image: DemoImage, label: int) -> Reading:
        """Read an image with some weights, given a class."""
        tokens = tuple(image.tokens.tolist())
        return self.pool.run(lambda: self.read_cached(name, tokens, label))

    def _read(self, name: str, tokens: tuple[int, ...], label: int) -> Reading:
        return read_tokens(self.pool.open(name), torch.tensor(tokens), label)

    def predict(self, name: str, image: DemoImage) -> Generator[Prediction, None, None]:
        """Yield the progress of fitting the probe of some weights, then its predictions for an image."""
        return self.pool.iterate(self._predict(name, image))

    def _predict(self, name: str, image: DemoImage) -> Generator[Prediction, None, None]:
        if self.probe_store is None:
            raise UserError("the demo has no images to fit a probe on: start it with --probe-tokens STORE")
        model = self.pool.open(name)
        if len(image.tokens) != model.info.config.sequence_length:
            raise UserError(
                f"{name} reads {model.info.config.sequence_length} tokens, and the image has {len(image.tokens)}: "
                "choose an image of this model's size"
            )
        probe = self.probes.get(name) or ClassProbe(model, self.probe_store, self.probe_images)
        yield from probe.predict(image.tokens)
        self.probes[name] = probe  # an interrupted fit starts again


def quickstart_setup(folder: Path, *, device: str, dtype: str, probe_images: int) -> Setup:
    """Return the quickstart's models, stores and runs. Run the quickstart first if `folder` has no finished one."""
    if not (folder / "summary.json").exists():
        from st_ar.quickstart import quickstart

        print(f"{folder} has no finished quickstart: running it, which takes some minutes once", file=sys.stderr)
        quickstart(folder)
    runs = {name: folder / METHODS[name][0] for name in ("AR", "ST-AR")}
    return Setup(
        pool=ModelPool(list(runs.values()), folder / "tokenizer", names=list(runs), device=device, dtype=dtype),
        store=open_store(folder / "tokens-test"),
        probe_store=open_store(folder / "tokens-train"),
        probe_images=probe_images,
        runs=runs,
    )


def open_store(folder: Path) -> TokenStore:
    """Open a token store and verify its checksums."""
    store = TokenStore(folder)
    store.verify()
    return store


def find_runs(models: Sequence[Path], runs: Sequence[Path]) -> dict[str, Path]:
    """Return the runs among `models` and all of `runs`, by name; UserError if one of `runs` is not a run."""
    for run in runs:
        trained_config(run)
    found = [path for path in models if (path / "log.jsonl").exists()]
    found += [run for run in runs if run.resolve() not in {path.resolve() for path in found}]
    return dict(zip(name_models(found, ()), found, strict=True)) if found else {}
